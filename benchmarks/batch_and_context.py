"""How decoding gains from sequences that share a step, what a long context costs, and what a scattered one.

    python benchmarks/batch_and_context.py model.gguf [model.gguf ...] --provider numba-cpu

Both sides of a ratio alternate; figures are medians over the rounds. Scattered: the blocks of all sequences are mixed
over the whole cache, each far from the one before it, which is the worst that the coming and going of requests does.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import llorch
from llorch.core.runner import Chunk

PROMPT, TOKENS = 16, 48  # of each sequence
SHORT, LONG, STEPS = 112, 1984, 32  # tokens of context, tokens decoded behind them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--provider", default="numba-cpu")
    parser.add_argument("--together", type=int, default=8, help="sequences that share a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    n = arguments.together
    for model in arguments.models:
        with llorch.load(model, provider=arguments.provider, context=2048, parallel=n) as llm:
            _rate(llm, 1), _rate(llm, n)
            pairs = [(_rate(llm, 1), _rate(llm, n)) for _ in range(arguments.rounds)]
            one, many = (statistics.median(rates) for rates in zip(*pairs, strict=True))
            times = [(llm.bench_decode(STEPS, SHORT), llm.bench_decode(STEPS, LONG)) for _ in range(arguments.rounds)]
            short, long = (1e3 * statistics.median(seconds) / STEPS for seconds in zip(*times, strict=True))
            scattered = {count: _scattered(llm, count, arguments.rounds) for count in (1, n)}
        print(
            f"{model}: 1 sequence {one:.1f} tokens/s, {n} together {many:.1f}, {many / one:.2f} times; a token behind "
            f"{SHORT} to {SHORT + STEPS} others {short:.2f} ms, behind {LONG} to {LONG + STEPS} {long:.2f} ms, "
            f"{long / short:.2f} times; in scattered blocks "
            + ", ".join(f"{ratio:.3f} times with {count} at once" for count, ratio in scattered.items())
        )


def _rate(llm: llorch.LLM, sequences: int) -> float:
    """Tokens a second of all sequences."""
    bound, last = llm._bound, PROMPT + TOKENS
    with bound.turn:
        blocks = [bound.allocator.allocate(bound.allocator.blocks_for(last)) for _ in range(sequences)]
        for table in blocks:
            llm.runner.logits([Chunk(range(3, 3 + PROMPT), 0, table)])
        start = time.perf_counter()
        for at in range(PROMPT, last):
            llm.runner.logits([Chunk([7 + s], at, table) for s, table in enumerate(blocks)])
        seconds = time.perf_counter() - start
        for table in blocks:
            bound.allocator.release(table)
    return sequences * TOKENS / seconds


def _scattered(llm: llorch.LLM, sequences: int, rounds: int) -> float:
    """How much longer a step of so many long contexts takes in scattered blocks than in consecutive ones."""
    bound, last = llm._bound, LONG + STEPS
    size, total = bound.allocator.block_size, bound.allocator.total
    each = bound.allocator.blocks_for(last)
    ordered, mixed = list(range(1, total + 1)), list(range(1, total + 1))
    random.Random(0).shuffle(mixed)

    def steps(blocks: list[int]) -> float:
        tables = [blocks[s * each : (s + 1) * each] for s in range(sequences)]
        start = time.perf_counter()
        for at in range(LONG, last):
            llm.runner.logits([Chunk([7 + s], at, table) for s, table in enumerate(tables)])
        return time.perf_counter() - start

    with bound.turn:
        bound.allocator.clear()
        llm.runner.logits([Chunk(range(3, 3 + size), 0, ordered[:1])])
        for block in ordered[1:]:  # memory that was never written is no memory yet
            bound._cache.copy(1, block)
        steps(ordered), steps(mixed)
        return statistics.median(steps(mixed) / steps(ordered) for _ in range(rounds))


if __name__ == "__main__":
    main()
