"""How long /health takes while others keep the server busy: a process of its own, so that it measures the server alone.

python -m tests.server.probe URL asks every 50 ms until its stdin is closed, then prints the seconds that each answer
took, as JSON. They count from the moment when the question was due: one that had to wait for the answer before it
counts its wait as well.
"""

from __future__ import annotations

import http.client
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.support import ROOT

INTERVAL = 0.05


class Probe:
    """The answers' times, once it is over."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def percentile(self, share: float) -> float:
        return sorted(self.seconds)[min(int(len(self.seconds) * share), len(self.seconds) - 1)]

    def __str__(self) -> str:
        shown = ", ".join(f"{share:.0%} {1000 * self.percentile(share):.1f} ms" for share in (0.5, 0.99, 1.0))
        return f"/health, {len(self.seconds)} times: {shown}"


@contextmanager
def probing(url: str) -> Iterator[Probe]:
    """Asks while the block runs. Raises AssertionError where an answer was not 200."""
    command = [sys.executable, "-m", "tests.server.probe", url]
    probe = Probe()
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        yield probe
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    probe.seconds = json.loads(out)


def main() -> None:
    url = httpx.URL(sys.argv[1])
    connection = http.client.HTTPConnection(url.host, url.port, timeout=60)
    connection.connect()
    print("begins", flush=True)
    found: list[float] = []
    due = time.perf_counter()
    while not select.select([sys.stdin], [], [], max(0.0, due - time.perf_counter()))[0]:
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
        assert response.status == 200, response.status
        found.append(time.perf_counter() - due)
        due += INTERVAL
    print(json.dumps(found))


if __name__ == "__main__":
    main()
