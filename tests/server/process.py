"""The real server process, and a client for its streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from tests.support import ROOT

START_SECONDS = 60.0
Found = TypeVar("Found")


def eventually(check: Callable[[], Found | None], seconds: float = 10.0, what: str = "") -> Found:
    """The first result of `check` that is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what or check} did not come true within {seconds} s")


class Server:
    """`llorch serve` as a user starts it, on a free port of 127.0.0.1."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        env: Mapping[str, str] | None = None,
        port: int | str | None = 0,
        wrapper: Sequence[str] = (),
    ) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("LLORCH_") and "proxy" not in k.lower()}
        command = [*wrapper, sys.executable, "-m", "llorch", "serve", "--log-format", "json", *options]
        if port is not None:
            command += ["--port", str(port)]
        self.process = subprocess.Popen(
            command,
            cwd=folder,  # so that no llorch.toml is picked up
            env={**inherited, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        self.stderr = ""
        self._readers = [threading.Thread(target=read) for read in (self._read_log, self._read_stderr)]
        for reader in self._readers:
            reader.start()

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))  # whatever is no JSON fails the test with a missing line

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr += line

    # ---- what it says ----

    def logged(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The log lines of an event whose fields have these values."""
        wanted = {"event": event, **fields}.items()
        return [line for line in list(self.lines) if all(line.get(name) == value for name, value in wanted)]

    @property
    def url(self) -> str:
        """Its address, from its first log line."""

        def found() -> str | None:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}: {self.stderr}")
            loading = self.logged("loading")
            return str(loading[0]["uri"]) if loading else None

        return eventually(found, START_SECONDS, "the server's address")

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def wait_healthy(self) -> Server:
        with self.client() as client:
            eventually(lambda: client.get("/health").status_code == 200, START_SECONDS, "a healthy worker")
        return self

    def metrics(self, headers: Mapping[str, str] | None = None) -> dict[str, float]:
        """GET /metrics as {name{labels}: value}."""
        with self.client() as client:
            text = client.get("/metrics", headers=headers).raise_for_status().text
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    # ---- its end ----

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 20.0) -> int:
        """The exit status."""
        status = self.process.wait(timeout)
        for reader in self._readers:
            reader.join(5)
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


class Stream:
    """An SSE response being read. `comments` counts comment lines; each event is checked for its shape."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.comments = 0
        self._events = self._parse()

    def _parse(self) -> Iterator[dict[str, Any]]:
        kind: str | None = None
        for line in self.response.iter_lines():
            if line.startswith(":"):
                self.comments += 1
            elif line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                assert event["type"] == kind, "the event line and the JSON name the same type"
                yield event
            else:
                assert line == "", f"unexpected line {line!r}"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._events

    def next(self, kind: str) -> dict[str, Any]:
        """The next event of a type; others are passed over."""
        return next(event for event in self._events if event["type"] == kind)


@contextmanager
def execute(client: httpx.Client, **body: Any) -> Iterator[Stream]:
    """POST /execute, its stream open."""
    with client.stream("POST", "/execute", json=body) as response:
        if response.status_code != 200:
            response.read()
            raise AssertionError(f"{response.status_code}: {response.text}")
        yield Stream(response)


def run(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """All events of a job."""
    with execute(client, **body) as stream:
        return list(stream)


def text(events: Sequence[Mapping[str, Any]]) -> str:
    return "".join(event["t"] for event in events if event["type"] == "token")


def paced(folder: Path) -> dict[str, str]:
    """The environment in which the provider `paced` (tests/server/paced.py) is installed, as any third party's is."""
    metadata = folder / "paced-1.0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: paced\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[llorch.providers]\npaced = tests.server.paced:provider\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
