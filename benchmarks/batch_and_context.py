"""How decoding gains from sequences that share a step, and what a long context costs.

    python benchmarks/batch_and_context.py model.gguf [model.gguf ...] --provider numba-cpu

Both sides of a ratio alternate; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
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
        print(
            f"{model}: 1 sequence {one:.1f} tokens/s, {n} together {many:.1f}, {many / one:.2f} times; a token behind "
            f"{SHORT} to {SHORT + STEPS} others {short:.2f} ms, behind {LONG} to {LONG + STEPS} {long:.2f} ms, "
            f"{long / short:.2f} times"
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


if __name__ == "__main__":
    main()
