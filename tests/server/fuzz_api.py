"""schemathesis over the OpenAPI document, every route: right and wrong requests, and answers that are as described.

make fuzz-api [CASES=10000]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.server.process import Server
from tests.server.soak import TEMPLATE
from tests.support import shared

OPERATIONS = 4  # that have a body to vary; the others take a handful of cases


def options(folder: Path) -> list[str]:
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    return ["--max-tokens-limit", "64", "--max-queue", "256", "--chat-template", str(template)]


@dataclass
class Fuzzed:
    status: int
    output: str

    @property
    def cases(self) -> int:
        found = re.search(r"([\d,]+) generated", self.output)
        return int(found[1].replace(",", "")) if found else 0


def fuzz(server: Server, examples: int, *more: str, phases: str = "examples,coverage,fuzzing") -> Fuzzed:
    """Runs schemathesis with this many generated cases for each route."""
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    command += ["--config-file", str(Path(__file__).with_name("schemathesis.toml")), "run", "--no-color"]
    command += ["--max-examples", str(examples), "--phases", phases, "--request-timeout", "30", "--workers", "2"]
    command += ["--continue-on-failure", *more, f"{server.url}/docs/openapi.json"]
    with tempfile.TemporaryDirectory() as folder:  # for its database of examples
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return Fuzzed(done.returncode, done.stdout + done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    cases = parser.parse_args().cases
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = shared("models", "stories260K.gguf")
        server = Server(folder, "--model", str(model), "--provider", "numpy-cpu", *options(folder))
        try:
            found = fuzz(server.wait_healthy(), -(-cases // OPERATIONS))
        finally:
            server.close()
    print(found.output)
    failed = server.logged("request failed")
    print(f"{found.cases} cases; {len(failed)} errors in the log; stderr: {server.stderr or 'nothing'}")
    sys.exit(found.status or found.cases < cases or bool(failed))


if __name__ == "__main__":
    main()
