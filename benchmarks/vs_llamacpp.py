"""llorch's providers beside llama.cpp: the same file, the same threads, prefill and decode, in alternating runs.

    python benchmarks/vs_llamacpp.py model.gguf --provider opencl,numpy-cpu --llamacpp-python /path/to/venv/bin/python

llama.cpp is run through llama-cpp-python from an interpreter of its own, where it should be built for this machine:

    python -m venv llamacpp && CMAKE_ARGS=-DGGML_NATIVE=ON llamacpp/bin/pip install llama-cpp-python

With --without-llamacpp llorch stands beside the memory's limit alone.

(A virtual machine may show AMX and not allow it: llama.cpp then dies of SIGSEGV, and needs the addition
`-DCMAKE_C_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'` and the same for CMAKE_CXX_FLAGS.)

Each measurement is a process: it loads, warms up, and takes the median of its passes. The processes alternate
(llama.cpp, the providers, then in the opposite order, and again), so that whatever else the machine does meets all of
them alike. Figures are medians over the rounds, ratios medians of each round's own; spreads go from the lowest round
to the highest. The limit of decoding is the memory's bandwidth over the bytes of the matrices in the file; llorch's
processes measure it between their passes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARMUP_TOKENS = 8
PEER, MEMORY = "llama.cpp", "memory GB/s"
BUILD_PEER = (
    "build it in an environment of its own, python -m venv peer && CMAKE_ARGS=-DGGML_NATIVE=ON peer/bin/pip install "
    "llama-cpp-python, and name that with --llamacpp-python peer/bin/python; or leave it out with --without-llamacpp"
)
Figures = dict[str, float]


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.worker:
        print(json.dumps(_WORKERS[arguments.worker](arguments)))
        return
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:  # now, and not when all is measured
        raise SystemExit("--plot needs matplotlib: pip install 'llorch[bench]'")
    if not arguments.without_llamacpp and (missing := _no_peer(arguments.llamacpp_python)) is not None:
        raise SystemExit(f"llama.cpp cannot be measured: {missing}\n{BUILD_PEER}")
    peers = [] if arguments.without_llamacpp else [PEER]
    names = [*peers, *(name.strip() for name in arguments.provider.split(","))]
    rounds: dict[str, list[Figures]] = {name: [] for name in names}
    for i in range(arguments.rounds):
        for name in names if i % 2 == 0 else reversed(names):
            figures = _run(name, arguments)
            rounds[name].append(figures)
            shown = ", ".join(f"{test} {value:.2f}" for test, value in figures.items())
            print(f"round {i + 1} of {arguments.rounds}: {name}: {shown}", file=sys.stderr)
    result = _summary(rounds, arguments)
    _print_table(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        _plot(result, arguments.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file that both can load")
    parser.add_argument("--provider", default="numpy-cpu", help="llorch's providers, between commas (%(default)s)")
    parser.add_argument("--llamacpp-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--without-llamacpp", action="store_true", help="measure llorch and the memory alone")
    parser.add_argument("--threads", type=int, default=_cores(), help="threads of each (%(default)s, all cores)")
    parser.add_argument("-p", "--prefill", type=int, default=256, help="tokens of the prompt (%(default)s)")
    parser.add_argument("-n", "--decode", type=int, default=128, help="tokens to decode (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each (%(default)s)")
    parser.add_argument("--passes", type=int, default=3, help="measurements in a process (%(default)s)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--plot", type=Path, help="draw the comparison into this PNG (extra `bench`)")
    parser.add_argument("--worker", choices=[*_WORKERS], help=argparse.SUPPRESS)
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _no_peer(python: str) -> str | None:
    """Why that interpreter has no llama-cpp-python, or None."""
    try:
        done = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, text=True)
    except OSError as error:
        return f"{python} cannot be run: {error.strerror}"
    said = done.stderr.strip().splitlines() or [f"nothing, and ends with status {done.returncode}"]
    return f"{python} says: {said[-1]}" if done.returncode else None


# ---- one measurement: a process ----


def _run(name: str, arguments: argparse.Namespace) -> Figures:
    """Starts the process that measures `name`. Ends the program with its last words where it fails."""
    worker = "llamacpp" if name == PEER else "llorch"
    python = arguments.llamacpp_python if name == PEER else sys.executable
    command = [python, __file__, str(arguments.model), "--worker", worker, "--provider", name]
    for option in ("threads", "prefill", "decode", "passes"):
        command += [f"--{option}", str(getattr(arguments, option))]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    environment |= {"POCL_MAX_PTHREAD_COUNT": str(arguments.threads)}  # PoCL's pool is made when it is loaded
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-15:])
        raise SystemExit(f"{name} failed with status {done.returncode}: {' '.join(command)}\n{last}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def _rates(arguments: argparse.Namespace, prefill: Callable[[], float], decode: Callable[[int], float]) -> Figures:
    """Tokens a second, from functions that return seconds: medians, prefill and decode in turn."""
    prefill()
    decode(WARMUP_TOKENS)
    seconds = [(prefill(), decode(arguments.decode)) for _ in range(arguments.passes)]
    return {
        f"pp{arguments.prefill}": arguments.prefill / statistics.median(pp for pp, _ in seconds),
        f"tg{arguments.decode}": arguments.decode / statistics.median(tg for _, tg in seconds),
    }


def _measure_llorch(arguments: argparse.Namespace) -> Figures:
    """The memory is measured between the passes: its speed may change within seconds where others share it."""
    import llorch
    from llorch.machine import Bandwidth

    context = max(arguments.prefill, arguments.decode) + WARMUP_TOKENS
    bandwidth = Bandwidth(arguments.threads)
    with llorch.load(
        arguments.model, provider=arguments.provider, context=context, parallel=1, threads=arguments.threads
    ) as llm:

        def prefill() -> float:
            bandwidth.measure()
            return llm.bench_prefill(arguments.prefill)

        def decode(tokens: int) -> float:
            bandwidth.measure()
            seconds = llm.bench_decode(tokens)
            bandwidth.measure()
            return seconds

        return _rates(arguments, prefill, decode) | {MEMORY: bandwidth.best_gb_s}


def _measure_llamacpp(arguments: argparse.Namespace) -> Figures:
    import llama_cpp

    context = max(arguments.prefill, arguments.decode) + WARMUP_TOKENS
    threads = {"n_threads": arguments.threads, "n_threads_batch": arguments.threads}
    llm = llama_cpp.Llama(str(arguments.model), n_ctx=context, n_batch=512, n_gpu_layers=0, verbose=False, **threads)
    ids = [3 + 7 * i % 250 for i in range(context)]

    def seconds(chunks: list[list[int]]) -> float:
        llm.reset()
        start = time.perf_counter()
        for chunk in chunks:
            llm.eval(chunk)
        return time.perf_counter() - start

    return _rates(arguments, lambda: seconds([ids[: arguments.prefill]]), lambda n: seconds([[i] for i in ids[:n]]))


_WORKERS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "llorch": _measure_llorch,
    "llamacpp": _measure_llamacpp,
}


# ---- results ----


def _matrix_bytes(model: Path) -> int:
    """Bytes of the matrices that a decode step reads: all but an embedding that is only looked up."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(model).tensors}
    looked_up = {"token_embd.weight"} if "output.weight" in tensors else set()
    return sum(int(t.n_bytes) for name, t in tensors.items() if len(t.shape) == 2 and name not in looked_up)


def _summary(rounds: dict[str, list[Figures]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians and spreads; every test relative to the peer, and decode relative to the memory's limit."""
    bandwidth = statistics.median(f[MEMORY] for name in rounds if name != PEER for f in rounds[name])
    matrix_bytes = _matrix_bytes(arguments.model)
    rows = []
    tests = [test for test in next(iter(rounds.values()))[0] if test != MEMORY]
    for test in tests:
        for name, figures in rounds.items():
            values = [f[test] for f in figures]
            row = {"test": test, "engine": name, "tokens_per_second": statistics.median(values)}
            row |= {"low": min(values), "high": max(values), "to_peer": None, "of_limit": None}
            if PEER in rounds:
                ratios = [f[test] / peer[test] for f, peer in zip(figures, rounds[PEER], strict=True)]
                row |= {"to_peer": statistics.median(ratios), "to_peer_low": min(ratios), "to_peer_high": max(ratios)}
            if test.startswith("tg") and name != PEER:
                row["of_limit"] = statistics.median(f[test] * matrix_bytes / f[MEMORY] / 1e9 for f in figures)
            rows.append(row)
    return {
        "model": arguments.model.name,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "bandwidth_gb_s": bandwidth,
        "bytes_per_token": matrix_bytes,
        "limit_tokens_per_second": bandwidth * 1e9 / matrix_bytes,
        "rows": rows,
        "samples": rounds,
    }


def _print_table(result: dict[str, Any]) -> None:
    print(
        f"\n{result['model']}, {result['threads']} threads, medians of {result['rounds']} rounds\n"
        f"memory {result['bandwidth_gb_s']:.1f} GB/s; {result['bytes_per_token'] / 1e6:.0f} MB a token: "
        f"at most {result['limit_tokens_per_second']:.1f} tokens/s decode\n"
    )
    heads = "lowest - highest", "to llama.cpp", "of the limit"
    print(f"{'test':<7}{'engine':<16}{'tokens/s':>10}  {heads[0]:<18}{heads[1]:>28}{heads[2]:>14}")
    for row in result["rows"]:
        spread = f"{row['low']:.1f} - {row['high']:.1f}"
        ratio = ""
        if row["to_peer"] is not None:
            ratio = f"{row['to_peer']:.2f}x ({row['to_peer_low']:.2f} - {row['to_peer_high']:.2f})"
        share = "" if row["of_limit"] is None else f"{row['of_limit']:.0%}"
        print(
            f"{row['test']:<7}{row['engine']:<16}{row['tokens_per_second']:>10.1f}  {spread:<18}{ratio:>28}{share:>14}"
        )


def _plot(result: dict[str, Any], path: Path) -> None:
    """One panel a test, bars with the spread; the memory's limit is a line over decode."""
    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    from matplotlib import pyplot

    tests = list(dict.fromkeys(row["test"] for row in result["rows"]))
    figure, panels = pyplot.subplots(1, len(tests), figsize=(4.5 * len(tests), 4), layout="constrained", squeeze=False)
    for panel, test in zip(panels[0], tests, strict=True):
        rows = [row for row in result["rows"] if row["test"] == test]
        medians = [row["tokens_per_second"] for row in rows]
        below = [row["tokens_per_second"] - row["low"] for row in rows]
        above = [row["high"] - row["tokens_per_second"] for row in rows]
        colours = ["#888888" if row["engine"] == PEER else "#2a6fb0" for row in rows]
        names = [f"{row['engine']}\n{row['tokens_per_second']:.1f}" for row in rows]
        panel.bar(names, medians, yerr=[below, above], color=colours, capsize=4)
        if test.startswith("tg"):
            panel.axhline(result["limit_tokens_per_second"], color="#b03030", linestyle="--", label="memory bandwidth")
            panel.legend()
        panel.set(title=f"{test}: {'decode' if test.startswith('tg') else 'prefill'}", ylabel="tokens/s")
    figure.suptitle(f"{result['model']}, {result['threads']} threads")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
