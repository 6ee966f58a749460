"""How long a start takes, and the memory that it leaves: each figure from a process of its own.

    python benchmarks/start.py model.gguf --provider numba-cpu

The first process is not counted: it compiles what is not in the cache yet, and reads the file into the page cache. Then
in turn: one that loads the model, decodes, and says how long `llorch.load` took and the most memory that it held; and
`llorch serve`, from its start to its readiness. Medians over the rounds, from the lowest to the highest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from server import serving

TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--provider", default="numba-cpu")
    parser.add_argument("--context", type=int, default=2048, help="tokens (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(_load(arguments)))
        return
    _loaded(arguments)
    rounds = [(*_loaded(arguments), _seconds_to_readiness(arguments)) for _ in range(arguments.rounds)]
    loads, peaks, starts = zip(*rounds, strict=True)
    size = arguments.model.stat().st_size >> 20
    print(
        f"{arguments.model.name}: load {_spread(loads)} s; most memory {_spread(peaks)} MiB, the file has {size}; "
        f"serve is ready after {_spread(starts)} s"
    )


def _loaded(arguments: argparse.Namespace) -> tuple[float, float]:
    """Seconds that loading took in a new process, and the MiB that it held at most."""
    command = [sys.executable, __file__, str(arguments.model), "--provider", arguments.provider, "--worker"]
    command += ["--context", str(arguments.context)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def _load(arguments: argparse.Namespace) -> tuple[float, float]:
    import llorch
    from llorch.machine import peak_memory

    start = time.perf_counter()
    with llorch.load(arguments.model, provider=arguments.provider, context=arguments.context, parallel=1) as llm:
        seconds = time.perf_counter() - start
        llm.bench_decode(TOKENS)
        return seconds, (peak_memory() or 0) / 2**20


def _seconds_to_readiness(arguments: argparse.Namespace) -> float:
    options = {"provider": arguments.provider, "context": arguments.context, "parallel": 1}
    with serving(arguments.model, **options) as served:
        return served.seconds


def _spread(values: tuple[float, ...]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
