"""What the operations of a model will share as scratch memory, before any of them is bound (operations.py)."""

from __future__ import annotations

from collections.abc import Sequence

from llorch.providers import AttentionSpec, GateUpSwigluSpec, MatmulGroupSpec, MatmulSpec, OpSpec, RopePairSpec
from llorch_provider_numba.emitter import record_bytes
from llorch_provider_numba.formats import BLOCK, FORMATS, SEGMENT, Format, units_of
from llorch_provider_numba.hosts import Host


def scratch_bytes(specs: Sequence[OpSpec], host: Host, threads: int) -> int:
    """Of each kind the largest that a site asks for."""
    prepared = max((_prepared(spec, host) for spec in specs), default=0)
    gated = max((8 * s.max_tokens * s.gate.rows for s in specs if isinstance(s, GateUpSwigluSpec)), default=0)
    turns = max((8 * s.max_tokens * len(s.q.frequencies) for s in specs if isinstance(s, RopePairSpec)), default=0)
    attention = max((_attention(s, host, threads) for s in specs if isinstance(s, AttentionSpec)), default=0)
    return prepared + gated + turns + attention


def _prepared(spec: OpSpec, host: Host) -> int:
    """x of a product, once for each way in which its parts want it; types that want it alike are counted once."""
    match spec:
        case MatmulSpec():
            parts: Sequence[MatmulSpec] = (spec,)
        case MatmulGroupSpec():
            parts = spec.parts
        case GateUpSwigluSpec():
            parts = (spec.gate, spec.up)
        case _:
            return 0
    rows = {part.type: _row_bytes(part, host) for part in parts}
    return spec.max_tokens * sum(rows.values())


def _row_bytes(part: MatmulSpec, host: Host) -> int:
    form = FORMATS[part.type]
    columns = units_of(form, part.cols) * form.unit
    return (columns // BLOCK if isinstance(form, Format) else columns) * record_bytes(form, host)


def _attention(spec: AttentionSpec, host: Host, threads: int) -> int:
    """A tile of queries a thread, and the parts of a context that several threads share."""
    group = spec.heads // spec.kv_heads
    rows = max(1, host.tiles[0] // group) * group
    thread = 4 * rows * (2 * SEGMENT + 3 * (spec.head_dim + 4))
    segments = -(-spec.max_blocks * spec.block_size // SEGMENT)
    return threads * (thread + 4 * segments * 4 * group * (spec.head_dim + 2))
