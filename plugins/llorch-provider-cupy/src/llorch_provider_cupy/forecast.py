"""What the operations of a model will share as scratch memory, before any of them is bound: what they `reserve`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from llorch.providers import AttentionSpec, GateUpSwigluSpec, MatmulGroupSpec, MatmulSpec, OpSpec, TopkSpec
from llorch_provider_cupy.attention import ATTEND_HEADS, BLOCKS_PER_MULTIPROCESSOR, MOST_SPLITS, SHORTEST_SPLIT
from llorch_provider_cupy.device import padded_columns
from llorch_provider_cupy.formats import UNIT
from llorch_provider_cupy.launches import blocks
from llorch_provider_cupy.operations import SORTED
from llorch_provider_cupy.products import MOST_TOKENS, NATIVE, ROUNDED_BYTES, SLAB_BYTES


def scratch_bytes(specs: Sequence[OpSpec], multiprocessors: int) -> int:
    """Of each kind the largest that a site asks for."""
    largest: Counter[str] = Counter()
    for spec in specs:
        for name, size in _asked(spec, multiprocessors):
            largest[name] = max(largest[name], size)
    return largest.total()


def _asked(spec: OpSpec, multiprocessors: int) -> Iterator[tuple[str, int]]:
    match spec:
        case MatmulSpec():
            yield from _product(spec)
        case MatmulGroupSpec():
            for part in spec.parts:
                yield from _product(part)
        case GateUpSwigluSpec():
            yield from _product(spec.gate)
            if spec.max_tokens > MOST_TOKENS:
                yield "gate and up", 8 * spec.max_tokens * spec.gate.rows
        case AttentionSpec():
            floats = max(_partial_floats(spec, tokens, multiprocessors) for tokens in range(1, spec.max_sequences + 1))
            yield "attention", 4 * floats * spec.head_dim + 8 * floats
        case TopkSpec() if spec.k > 1:
            yield "candidates", 8 * spec.max_tokens * blocks(spec.vocab, SORTED) * spec.k


def _partial_floats(spec: AttentionSpec, tokens: int, multiprocessors: int) -> int:
    """At most what Attention._partial_floats says: splits are rounded to whole ones there."""
    per_key = spec.heads // spec.kv_heads
    together = next((n for n in ATTEND_HEADS if n >= per_key), ATTEND_HEADS[-1])
    wanted = blocks(BLOCKS_PER_MULTIPROCESSOR * multiprocessors, tokens * spec.kv_heads * blocks(per_key, together))
    splits = min(wanted, blocks(spec.max_blocks * spec.block_size, SHORTEST_SPLIT), MOST_SPLITS)
    return tokens * spec.heads * splits


def _product(spec: MatmulSpec) -> Iterator[tuple[str, int]]:
    rows, tokens = padded_columns(spec.cols), spec.max_tokens
    if spec.type not in NATIVE:
        yield "numbers", MOST_TOKENS * rows
        yield "rounded", MOST_TOKENS * (rows // UNIT) * ROUNDED_BYTES
    if tokens > MOST_TOKENS:
        yield "x", tokens * rows * 2
        yield "x scales", 4 * tokens
        yield "values", min(4 * rows * spec.rows, max(SLAB_BYTES, 4 * rows))
