"""Runs what the documents show: commands and their output, Python and what it prints.

A block fenced as `console` holds commands behind `$ ` and their output; `...` in the output stands for anything. A
`text` block behind a `python` block is what that prints. `llorch serve` and `make serve` go on in the background.
A `sh` block is a script to copy whole: it runs as it stands, with other values for the variables that have a default in
it. A comment `not run: REASON` before a block says why nobody runs it.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from llorch.demo import DEMO_MODEL

PORT = "8080"  # as the documents have it
# of the environment: settings of the one who runs the tests, and what an outer make hands on to an inner one
FOREIGN = re.compile(r"LLORCH_|.*proxy|MAKE|MFLAGS|ARGS$", re.IGNORECASE)


@dataclass
class Command:
    line: str
    output: str


def blocks_of(document: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, without those that are not run."""
    return [(language, text) for reason, language, text in _fences(document) if not reason]


def not_run(document: Path) -> list[tuple[str, str, str]]:
    """(reason, language, text) of the blocks that are not run."""
    return [fence for fence in _fences(document) if fence[0]]


def _fences(document: Path) -> list[tuple[str, str, str]]:
    comment = r"(?:^<!-- not run: ([^\n]+) -->\n+)?"
    return re.findall(comment + r"^```(\w*)\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)


def commands_of(block: str) -> list[Command]:
    """The commands of one console block."""
    found = []
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        while lines[0].endswith("\\"):
            lines[:2] = [lines[0] + "\n" + lines[1]]
        found.append(Command(lines[0], "\n".join(lines[1:])))
    return found


def matches(printed: str, expected: str) -> bool:
    """Whether the expected text, `...` standing for anything or nothing, is what was printed. Where lines end does not
    count: a document has shorter ones."""
    parts = re.split(r" ?\.\.\. ?", " ".join(expected.split()))
    pattern = ".*?".join(re.escape(part) for part in parts)
    return re.fullmatch(pattern, " ".join(printed.split())) is not None


@dataclass
class Reader:
    """Somebody who works through a document in a folder. The document's port is replaced by a free one, `model.gguf` by
    the demo model under another name."""

    folder: Path
    scratch: Path
    servers: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.scratch / "some-model.gguf"
        self.model.symlink_to(DEMO_MODEL)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        kept = {k: v for k, v in os.environ.items() if not FOREIGN.match(k)}
        self.environment = {
            **kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120",
            "NO_COLOR": "1", "TERM": "dumb", "LLORCH_PORT": self.port, "LLORCH_LOG_FORMAT": "console",
            "PYTHONPATH": str(self.scratch),
        }  # fmt: skip

    def adapted(self, text: str) -> str:
        return text.replace(PORT, self.port).replace("model.gguf", str(self.model))

    def run(self, command: Command) -> None:
        line, expected = self.adapted(command.line), self.adapted(command.output)
        if "serve" in line.split("#")[0].split()[:3]:
            self._start(line, expected)
            return
        self._check(["bash", "-c", line], expected, f"$ {line}")

    def python(self, code: str, expected: str | None) -> None:
        self._check([sys.executable, "-c", self.adapted(code)], expected, code)

    def script(self, text: str, variables: dict[str, str]) -> None:
        """Runs a block as it stands, but for variables that have a default in it."""
        status, said = self.script_status(text, variables)
        assert status == 0, f"{text}\n{said}"

    def script_status(self, text: str, variables: dict[str, str]) -> tuple[int, str]:
        """The exit status of such a block, and what it prints."""
        for name in variables:
            assert f"${{{name}:-" in text, f"{name} has no default in\n{text}"
        done = self._run(["sh", "-euc", text], self.environment | variables, 1200)
        return done.returncode, done.stdout

    def _check(self, command: list[str], expected: str | None, shown: str) -> None:
        done = self._run(command, self.environment, 300)
        assert done.returncode == 0, f"{shown}\n{done.stdout}"
        assert expected is None or matches(done.stdout, expected), (
            f"{shown}\nprinted:\n{done.stdout}\nthe document says:\n{expected}"
        )

    def _run(self, command: list[str], environment: dict[str, str], seconds: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=environment, text=True, timeout=seconds, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _start(self, line: str, expected: str) -> None:
        """Starts a server, in place of the one before, and waits until it has printed what the document shows."""
        self.close()
        log = self.scratch / f"serve-{len(self.servers)}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}"], cwd=self.folder, env=self.environment, text=True, stdout=out,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.servers.append(process)
        end = time.monotonic() + 120
        while not matches(log.read_text(), expected):
            assert process.poll() is None, f"{line} ended with {process.returncode}:\n{log.read_text()}"
            assert time.monotonic() < end, f"{line} printed:\n{log.read_text()}\nthe document says:\n{expected}"
            time.sleep(0.1)

    def close(self) -> None:
        for process in self.servers:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                assert process.wait(40) is not None
