"""llorch on a GPU beside what the GPU allows, and beside PyTorch, in one run of less than ten minutes.

    python benchmarks/gpu.py                          # needs a card, and 25 GB of disk for three models
    python benchmarks/gpu.py --without-torch --json gpu.json

Decode of one sequence at context 512 (Q4_0, Q8_0, F16), prefill of 2,048 tokens, and 64 sequences that decode
together (F16), on Llama 2 7B's shape with random weights. Each figure stands beside its limit: bytes of weights and
cache that a step reads over the copy bandwidth, or operations over the rate of matrix products, whichever takes
longer; both rates are measured on the card in the same run. For Q4_0 the parts of a step stand beside what was
planned for them, and every kernel beside its own limit. PyTorch is transformers' Llama in bf16, eager and compiled.

Each measurement is a process of its own, so that one that fails or takes too long takes nothing with it: its last lines
are shown, the rest is measured. The figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_limits
import gpu_models
import numpy as np
from gpu_limits import SHAPES, Rates, Shape

PROVIDER = "cupy-cuda"
KINDS = ("Q4_0", "Q8_0", "F16")
TARGETS = {  # tokens a second on an H200
    ("Q4_0", "decode"): 500,
    ("Q8_0", "decode"): 350,
    ("F16", "decode"): 250,
    ("Q4_0", "prefill"): 20000,
    ("F16", "together"): 6000,
}
MOST_SECONDS = 240  # of one measurement
Figures = dict[str, Any]


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.worker:
        print(json.dumps(_WORKERS[arguments.worker](arguments)))
        return
    if (missing := no_card(arguments.provider)) is not None:
        raise SystemExit(f"benchmarks/gpu.py needs a card: {missing}")
    found: dict[str, Figures] = {}
    for name, figures in measure(arguments):
        if figures is not None:
            found[name] = figures
            if arguments.json:  # at once: who ends the run early has what there is
                arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if "rates" not in found:
        raise SystemExit("the card's own rates could not be measured: there is nothing to compare with")
    for line in report(found, arguments):
        print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "llorch-gpu", help="their folder")
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b", help="of the model (%(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens behind which decoding starts (%(default)s)")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--sequences", type=int, default=64, help="that decode together (%(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="decoded in a measurement (%(default)s)")
    parser.add_argument("--passes", type=int, default=3, help="measurements of each (%(default)s)")
    parser.add_argument("--without-torch", action="store_true", help="leave PyTorch out")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--provider", default=PROVIDER, help=argparse.SUPPRESS)
    parser.add_argument("--torch-device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=8192, help=argparse.SUPPRESS)  # of the matrix rate's products
    parser.add_argument("--worker", choices=[*_WORKERS], help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="F16", help=argparse.SUPPRESS)
    return parser


def no_card(provider: str) -> str | None:
    """Why there is none, or None."""
    from llorch.errors import ProviderError
    from llorch.providers import registry

    try:
        registry.choose(provider)[0].devices()
    except ProviderError as error:
        return str(error)
    return None


def measure(arguments: argparse.Namespace) -> Iterator[tuple[str, Figures | None]]:
    """Every measurement by name, in the order of what matters; None for one that failed."""
    runs = [("rates", "rates", "F16"), *((kind, "one", kind) for kind in KINDS), ("together", "together", "F16")]
    if not arguments.without_torch:
        runs += [("eager", "eager", "bf16"), ("compiled", "compiled", "bf16")]
    for name, worker, kind in runs:
        start = time.perf_counter()
        figures = _run(worker, kind, arguments)
        print(f"{name}: {time.perf_counter() - start:.0f} s, {figures}", file=sys.stderr, flush=True)
        yield name, figures


def _run(worker: str, kind: str, arguments: argparse.Namespace) -> Figures | None:
    """What a process of its own measures; None where it failed, with its last lines on standard error."""
    command = [sys.executable, __file__, "--worker", worker, "--kind", kind]
    for name in ("models", "shape", "context", "prompt", "sequences", "steps", "passes", "provider", "size"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--torch-device", arguments.torch_device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"{worker} {kind} took more than {MOST_SECONDS} s: left out", file=sys.stderr, flush=True)
        return None
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-15:])
        print(f"{worker} {kind} failed with status {done.returncode}:\n{last}", file=sys.stderr, flush=True)
        return None
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


# ---- measurements, each in its process ----


def _measure_rates(arguments: argparse.Namespace) -> Figures:
    """Copies within the card's memory, and products of square matrices of halves."""
    from llorch_provider_cupy.runtime import Gemm

    from llorch.providers import registry

    device = registry.choose(arguments.provider)[0].open()
    runtime, n = device.runtime, arguments.size
    nbytes = 16 * n * n
    a, b, out = (runtime.allocate(size) for size in (nbytes, nbytes, 4 * n * n))
    rng = np.random.default_rng(0)  # products of zeros are faster than others
    for memory in (a, b):
        runtime.upload(memory.address, rng.standard_normal((n, n), dtype=np.float32).astype(np.float16))
    product = Gemm("f16", out.address, n, a.address, n, b.address, n, n, n, n)
    multiplying = _seconds(runtime, lambda: runtime.gemm(product), arguments.passes)
    copying = _seconds(runtime, lambda: runtime.copy(a.address, b.address, nbytes), arguments.passes)
    found = {"device": device.info.description, "copy_gb_s": 2 * nbytes / copying / 1e9}
    device.close()
    return found | {"tflop_s": 2 * n**3 / multiplying / 1e12}


def _seconds(runtime: Any, work: Callable[[], None], passes: int, each: int = 10) -> float:
    """Seconds of one, the median over passes of `each`."""
    for _ in range(3):
        work()
    found = []
    for _ in range(passes):
        first = runtime.mark()
        for _ in range(each):
            work()
        found.append(runtime.seconds(first, runtime.mark()) / each)
    return statistics.median(found)


def _load(arguments: argparse.Namespace, sequences: int, longest: int) -> Any:
    import llorch

    shape = SHAPES[arguments.shape]
    name = f"{arguments.shape}-{arguments.kind}-{max(arguments.prompt, longest)}.gguf"
    arguments.models.mkdir(parents=True, exist_ok=True)
    path = gpu_models.write(arguments.models / name, shape, arguments.kind, max(arguments.prompt, longest))
    options = {"context": longest, "parallel": sequences, "chunk": arguments.prompt}
    return llorch.load(path, provider=arguments.provider, **options)


def _measure_one(arguments: argparse.Namespace) -> Figures:
    """One sequence: decode and prefill, and the steps of a decode plan one by one."""
    longest = max(arguments.context + arguments.steps, arguments.prompt)
    with _load(arguments, 1, longest) as llm:
        decode = _decode(llm, 1, arguments)
        llm.bench_prefill(arguments.prompt)
        prefill = [arguments.prompt / llm.bench_prefill(arguments.prompt) for _ in range(arguments.passes)]
        steps = _step_seconds(llm, arguments)
        loading, bound = llm.load_seconds, llm.start_lines
    return {
        "decode": decode,
        "prefill": statistics.median(prefill),
        "steps": steps,
        "load_seconds": loading,
        "start": bound,
    }


def _measure_together(arguments: argparse.Namespace) -> Figures:
    longest = arguments.context + arguments.steps
    with _load(arguments, arguments.sequences, longest) as llm:
        return {"together": _decode(llm, arguments.sequences, arguments)}


def _decode(llm: Any, sequences: int, arguments: argparse.Namespace) -> float:
    """Tokens a second of greedy steps behind a context, as served: the card chooses, candidates travel."""
    from llorch.core.runner import Chunk

    context, steps, chunk = arguments.context, arguments.steps, llm.limits.max_tokens
    count = llm.allocator.blocks_for(context + steps)
    tables = [llm.allocator.allocate(count) for _ in range(sequences)]
    rng, vocab = np.random.default_rng(0), llm.config.vocab_size
    for table in tables:
        ids = rng.integers(3, vocab, context).tolist()
        for at in range(0, context, chunk):
            llm.runner.candidates([Chunk(ids[at : at + chunk], at, table)], 1)
    rates = []
    for i in range(arguments.passes + 1):  # the first captures
        tokens = rng.integers(3, vocab, sequences).tolist()
        start = time.perf_counter()
        for at in range(context, context + steps):
            _, ids = llm.runner.candidates([Chunk([t], at, b) for t, b in zip(tokens, tables, strict=True)], 1)
            tokens = ids[:, 0].tolist()
        rates += [sequences * steps / (time.perf_counter() - start)] if i else []
    for table in tables:
        llm.allocator.release(table)
    return statistics.median(rates)


def _step_seconds(llm: Any, arguments: argparse.Namespace) -> dict[str, tuple[float, int]]:
    """(seconds of all, how many there are) of the steps of a decode plan by label; medians of the passes.

    They run one after another, so that each finds its weights in memory and not in a cache. Copies go before them,
    long enough for the host to be ahead: what is measured is the card.
    """
    from llorch.core.runner import Chunk

    runtime, found = llm.device.runtime, []
    ballast = [runtime.allocate(256 << 20 if arguments.size >= 1024 else 1 << 20) for _ in range(2)]
    blocks = llm.allocator.allocate(llm.allocator.blocks_for(arguments.context + 1))
    entries = llm.runner.entries([Chunk([3], arguments.context, blocks)])
    for _ in range(arguments.passes + 1):
        for _ in range(100):
            runtime.copy(ballast[0].address, ballast[1].address, ballast[0].nbytes)
        marks = [runtime.mark()]
        for kernel, args, _ in entries:
            kernel(*args)
            marks.append(runtime.mark())
        seconds: dict[str, float] = {}
        for entry, first, second in zip(entries, marks, marks[1:], strict=False):
            label = entry.outputs[0][0].split(".")[-1]
            seconds[label] = seconds.get(label, 0.0) + runtime.seconds(first, second)
        found.append(seconds)
    llm.allocator.release(blocks)
    labels = [entry.outputs[0][0].split(".")[-1] for entry in entries]
    return {label: (statistics.median(each[label] for each in found[1:]), labels.count(label)) for label in found[0]}


def _measure_torch(arguments: argparse.Namespace, *, compiled: bool) -> Figures:
    from gpu_torch import Peer

    longest = max(arguments.context + arguments.steps, arguments.prompt)
    peer, given = Peer(SHAPES[arguments.shape], longest, arguments.torch_device), arguments
    found = {"prefill": peer.prefill(given.prompt, given.passes)}
    if compiled:
        peer.compile()
    found["decode"] = peer.decode(1, given.context, given.steps, given.passes)
    return found | {"together": peer.decode(given.sequences, given.context, given.steps, given.passes)}


_WORKERS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "rates": _measure_rates,
    "one": _measure_one,
    "together": _measure_together,
    "eager": lambda arguments: _measure_torch(arguments, compiled=False),
    "compiled": lambda arguments: _measure_torch(arguments, compiled=True),
}


# ---- results ----


def report(found: dict[str, Figures], arguments: argparse.Namespace) -> Iterator[str]:
    """The tables, line by line."""
    shape, rates = SHAPES[arguments.shape], Rates(found["rates"]["copy_gb_s"], found["rates"]["tflop_s"])
    yield f"{arguments.shape} on {found['rates']['device']}"
    yield f"copies move {rates.copy_gb_s:,.0f} GB/s, products of halves reach {rates.tflop_s:,.0f} TFLOP/s"
    yield ""
    yield f"{'engine':<16}{'weights':<9}{'test':<26}{'tokens/s':>10}{'limit':>10}{'of limit':>10}{'target':>9}"
    for engine, kind, test, speed in _speeds(found):
        limit, name = _limit(shape, kind, test, rates, arguments)
        target = TARGETS.get((kind, test)) if engine == "llorch" and arguments.shape == "llama2-7b" else None
        yield (
            f"{engine:<16}{kind:<9}{name:<26}{speed:>10,.0f}{limit:>10,.0f}{speed / limit:>10.0%}"
            f"{'' if target is None else format(target, ',d'):>9}"
        )
    for kind in KINDS:
        if kind in found:
            yield from _steps(found[kind], shape, kind, rates, arguments.context)


def _speeds(found: dict[str, Figures]) -> Iterator[tuple[str, str, str, float]]:
    """(engine, weights, test, tokens a second) of all that was measured."""
    for test in ("decode", "prefill"):
        for kind in KINDS:
            if kind in found:
                yield "llorch", kind, test, found[kind][test]
    if "together" in found:
        yield "llorch", "F16", "together", found["together"]["together"]
    for engine in ("eager", "compiled"):
        for test, speed in found.get(engine, {}).items():
            yield f"torch {engine}", "bf16", test, speed


def _limit(shape: Shape, kind: str, test: str, rates: Rates, arguments: argparse.Namespace) -> tuple[float, str]:
    """(tokens a second, the test in words)."""
    if test == "prefill":
        return gpu_limits.prefill_limit(shape, kind, arguments.prompt, rates), f"prefill {arguments.prompt}"
    sequences = arguments.sequences if test == "together" else 1
    middle = arguments.context + arguments.steps // 2
    limit = gpu_limits.decode_limit(shape, kind, middle, sequences, rates)
    return limit, f"decode {sequences} at {arguments.context}"


def _steps(figures: Figures, shape: Shape, kind: str, rates: Rates, context: int) -> Iterator[str]:
    """The parts of a decode step beside the plan, and its kernels beside their limits."""
    steps, whole = figures["steps"], 1 / figures["decode"]
    parts: dict[str, float] = {}
    for label, (seconds, _) in steps.items():
        part = gpu_limits.part_of(label)
        parts[part] = parts.get(part, 0.0) + seconds
    planned = gpu_limits.predicted(shape, kind, rates)
    yield ""
    yield f"{kind}: a decode step, planned and measured in ms"
    for part, seconds in planned.items():
        yield f"  {part:<16}{1e3 * seconds:>9.3f}{1e3 * parts.get(part, 0.0):>9.3f}"
    yield f"  {'sum':<16}{1e3 * sum(planned.values()):>9.3f}{1e3 * sum(parts.values()):>9.3f}"
    yield f"  {'whole step':<16}{'':>9}{1e3 * whole:>9.3f}  as served: replayed, with the host"
    yield f"  {'kernels':<22}{'us each':>9}{'limit':>9}{'of limit':>10}"
    for label, (seconds, count) in steps.items():
        each = seconds / count
        limit = gpu_limits.step_limit(shape, label, kind, context, rates)
        shown = "" if limit is None else f"{1e6 * limit:>9.1f}{limit / each:>10.0%}"
        yield f"  {label:<22}{1e6 * each:>9.1f}{shown}"


if __name__ == "__main__":
    main()
