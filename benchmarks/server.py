"""A `llorch serve` to measure: a process of its own, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Served:
    port: int
    seconds: float  # from the process's start to its readiness


@contextmanager
def serving(model: Path, **options: object) -> Iterator[Served]:
    """The server with these options, until the block ends. Raises SystemExit where it does not come up."""
    command = [sys.executable, "-m", "llorch", "serve", "--model", str(model), "--port", "0", "--log-format", "json"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            entry = json.loads(line)
            if entry["event"] == "ready":
                break
        else:
            raise SystemExit(f"the server ended: {' '.join(command)}")
        seconds = time.perf_counter() - start
        threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop it
        try:
            yield Served(int(entry["uri"].rpartition(":")[2]), seconds)
        finally:
            process.terminate()
