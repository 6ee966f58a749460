"""The factories: which records of a program an operation is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llorch.providers import (
    AddRMSNormSpec,
    AddSpec,
    AttentionSpec,
    Batch,
    EmbedSpec,
    GateUpSwigluSpec,
    GatherSpec,
    Kernel,
    MatmulGroupSpec,
    MatmulSpec,
    RMSNormSpec,
    RopePairSpec,
    RopeSpec,
    SwigluSpec,
    TopkSpec,
    hookimpl,
)
from llorch_provider_numba import emitter, protocol
from llorch_provider_numba.device import NumbaDevice
from llorch_provider_numba.formats import BLOCK, FORMATS, SEGMENT, Format, PlainFormat, groups_of, units_of
from llorch_provider_numba.hosts import Host
from llorch_provider_numba.memory import LayerCache, Weight
from llorch_provider_numba.program import Record, Site, address, record

Array = Any  # a NumPy array

TILES = (1, 2, 4, 8)  # tokens of the tiles that compiled code chooses from


class NumbaOps:
    """Every operation of the contract; `topk` for k = 1 alone, where a row is one number instead of the vocabulary."""

    @hookimpl
    def embed(self, device: NumbaDevice, spec: EmbedSpec) -> Kernel:
        form = FORMATS[spec.type]
        numbers = form.numbers() if isinstance(form, Format) else np.zeros(1, np.int64)
        group_bytes = units_of(form, spec.cols) * form.unit_bytes

        def records(out: Array, tokens: Array, table: Weight) -> list[Record]:
            where = (address(out), address(tokens), table.address)
            sizes = (spec.cols, group_bytes, form.unit_bytes, form.code, numbers.ctypes.data)
            return [record(protocol.EMBED, len(out), (*where, *sizes))]

        return Site(device.launcher, spec, records)

    @hookimpl
    def rmsnorm(self, device: NumbaDevice, spec: RMSNormSpec) -> Kernel:
        return Site(device.launcher, spec, lambda out, x, weight: [_norm(spec, out, x, None, weight)])

    @hookimpl
    def add_rmsnorm(self, device: NumbaDevice, spec: AddRMSNormSpec) -> Kernel:
        return Site(device.launcher, spec, lambda out, x, y, weight: [_norm(spec.norm, out, x, y, weight)])

    @hookimpl
    def matmul(self, device: NumbaDevice, spec: MatmulSpec) -> Kernel:
        product = _Products(device, (spec,), spec.max_tokens)
        return Site(device.launcher, spec, lambda out, x, w, bias: product.records((out,), x, (w,), (bias,)))

    @hookimpl
    def matmul_group(self, device: NumbaDevice, spec: MatmulGroupSpec) -> Kernel:
        product, n = _Products(device, spec.parts, spec.max_tokens), len(spec.parts)

        def records(*args: Any) -> list[Record]:
            return product.records(args[:n], args[n], args[n + 1 : 2 * n + 1], args[2 * n + 1 :])

        return Site(device.launcher, spec, records)

    @hookimpl
    def gate_up_swiglu(self, device: NumbaDevice, spec: GateUpSwigluSpec) -> Kernel | None:
        """Declined where the two are of different types: they share x as it is prepared."""
        if spec.gate.type != spec.up.type:
            return None
        product = _Products(device, (spec.gate,), spec.max_tokens, gated=True)

        def records(out: Array, x: Array, w_gate: Weight, w_up: Weight, b_gate: Any, b_up: Any) -> list[Record]:
            return product.records((out,), x, (w_gate,), (b_gate,), up=(w_up.address, address(b_up)))

        return Site(device.launcher, spec, records)

    @hookimpl
    def rope(self, device: NumbaDevice, spec: RopeSpec) -> Kernel:
        rotate = _rotation(device, spec, kv_heads=0)
        return Site(device.launcher, spec, lambda x, positions: [rotate(x, None, positions)])

    @hookimpl
    def rope_pair(self, device: NumbaDevice, spec: RopePairSpec) -> Kernel | None:
        """Declined where q and k are rotated differently: no model's are."""
        q, k = spec.q, spec.k
        if (q.head_dim, q.pairing, q.frequencies, q.magnitude) != (k.head_dim, k.pairing, k.frequencies, k.magnitude):
            return None
        rotate = _rotation(device, q, kv_heads=k.heads)
        return Site(device.launcher, spec, lambda q, k, positions: [rotate(q, k, positions)])

    @hookimpl
    def attention(self, device: NumbaDevice, spec: AttentionSpec) -> Kernel:
        return Site(device.launcher, spec, _attention(device, spec), live=True)

    @hookimpl
    def swiglu(self, device: NumbaDevice, spec: SwigluSpec) -> Kernel:
        return Site(device.launcher, spec, lambda *tensors: [_elementwise(protocol.SWIGLU, *tensors)])

    @hookimpl
    def add(self, device: NumbaDevice, spec: AddSpec) -> Kernel:
        return Site(device.launcher, spec, lambda *tensors: [_elementwise(protocol.ADD, *tensors)])

    @hookimpl
    def gather(self, device: NumbaDevice, spec: GatherSpec) -> Kernel:
        def records(out: Array, x: Array, rows: Array) -> list[Record]:
            return [record(protocol.GATHER, len(out), (address(out), address(x), address(rows), spec.dim))]

        return Site(device.launcher, spec, records)

    @hookimpl
    def topk(self, device: NumbaDevice, spec: TopkSpec) -> Kernel | None:
        if spec.k != 1:
            return None

        def records(values: Array, ids: Array, logits: Array) -> list[Record]:
            where = (address(values), address(ids), address(logits), spec.vocab)
            return [record(protocol.ARGMAX, len(logits), where)]

        return Site(device.launcher, spec, records)


def _norm(spec: RMSNormSpec, out: Array, x: Array, y: Array | None, weight: Weight) -> Record:
    slots = (address(out), address(x), address(y), weight.address, spec.dim, float(spec.eps))
    return record(protocol.RMSNORM, len(out), slots)


def _elementwise(operation: int, out: Array, x: Array, y: Array) -> Record:
    return record(operation, -(-out.size // protocol.ELEMENTS), (address(out), address(x), address(y), out.size))


def _rotation(device: NumbaDevice, spec: RopeSpec, kv_heads: int) -> Callable[..., Record]:
    frequencies = np.array(spec.frequencies, np.float64)
    pairs, half = len(frequencies), int(spec.pairing == "half")
    turns = device.scratch("turns", spec.max_tokens * pairs * 8)

    def rotate(q: Array, k: Array | None, positions: Array) -> Record:
        where = (address(q), address(k), address(positions), frequencies.ctypes.data)
        sizes = (pairs, spec.heads, kv_heads, spec.head_dim, half, float(spec.magnitude), turns.ctypes.data)
        return record(protocol.ROPE, len(q), (*where, *sizes))

    return rotate


class _Products:
    """Products of one x: it is prepared once for all parts whose kernels want it alike."""

    def __init__(
        self, device: NumbaDevice, parts: Sequence[MatmulSpec], max_tokens: int, *, gated: bool = False
    ) -> None:
        self._device, self._parts, self._host = device, parts, device.host
        self._kernels = {part.type: device.kernels(part.type) for part in parts}
        self._areas: dict[tuple[int, ...], int] = {}  # how x is prepared: where
        end = 0
        for part in parts:
            if self._way(part) not in self._areas:
                self._areas[self._way(part)] = end
                end += -(-max_tokens * self._row_bytes(part) // 64) * 64
        self._prepared = device.scratch("prepared", end)
        self._gated = device.scratch("gated", 8 * max_tokens * parts[0].rows) if gated else None

    def _row_bytes(self, part: MatmulSpec) -> int:
        """Bytes of a token's prepared x."""
        return self._way(part)[0] * emitter.record_bytes(FORMATS[part.type], self._host)

    def _way(self, part: MatmulSpec) -> tuple[int, ...]:
        """blocks, kind, segment, offset, minima of `prepare`."""
        form = FORMATS[part.type]
        columns = units_of(form, part.cols) * form.unit
        if not isinstance(form, Format):
            return columns, protocol.PLAIN, 0, 0, 0
        kind = protocol.ROUNDED if self._host.rounds else protocol.KEPT
        return columns // BLOCK, kind, form.segment, self._host.offset(form), int(form.minima)

    def records(
        self,
        outs: Sequence[Array],
        x: Array,
        weights: Sequence[Weight],
        biases: Sequence[Any],
        up: tuple[int, int] = (0, 0),
    ) -> list[Record]:
        tokens, cols, largest, base = len(x), self._parts[0].cols, self._host.tiles[0], self._prepared.ctypes.data
        made = []
        for way, area in self._areas.items():
            slots = (address(x), base + area, tokens, cols, *way, largest)
            made.append(record(protocol.PREPARE, tokens, slots, barrier=len(made) == len(self._areas) - 1))
        for part, out, w, bias in zip(self._parts, outs, weights, biases, strict=True):
            form, groups = FORMATS[part.type], groups_of(part.rows)
            units = units_of(form, part.cols)
            slots = (
                w.address, units * form.unit_bytes, groups, units, base + self._areas[self._way(part)],
                self._row_bytes(part), address(out), part.rows, tokens, address(bias), largest,
                *_by_tile(self._kernels[part.type]), *_groups(form, self._host),
                *up, address(self._gated),
            )  # fmt: skip
            chunks = -(-groups // protocol.CHUNK)
            made.append(record(protocol.MULTIPLY, chunks, slots, barrier=part is self._parts[-1]))
        return made


def _by_tile(kernels: dict[int, int]) -> list[int]:
    """Addresses for tiles of 1, 2, 4 and 8 tokens; 0 where a host has none."""
    return [kernels.get(t, 0) for t in TILES]


def _groups(form: Format | PlainFormat, host: Host) -> list[int]:
    """Groups of rows that the kernels of `_by_tile` take at once."""
    return [emitter.groups_for(form, host, t) if t in host.tiles else 0 for t in TILES]


def _attention(device: NumbaDevice, spec: AttentionSpec) -> Callable[..., list[Record]]:
    kind = {"f32": "F32", "f16": "F16"}[spec.cache_dtype]
    kernels, softmax, form = device.kernels(kind), device.softmax_kernels(), FORMATS[kind]
    group, largest = spec.heads // spec.kv_heads, device.host.tiles[0]
    tile = max(1, largest // group)
    rows = tile * group
    thread_bytes = -(-4 * rows * (2 * SEGMENT + 3 * (spec.head_dim + 4)) // 64) * 64
    scratch = device.scratch("attention", thread_bytes * device.threads)
    most = 4 * device.threads  # fewer (token, key head) pairs than this are split over the context
    head_bytes = 4 * group * (spec.head_dim + 2)

    def records(out: Array, q: Array, k: Array, v: Array, cache: LayerCache, batch: Batch) -> list[Record]:
        tokens, pairs = len(out), len(out) * spec.kv_heads
        segments = -(-batch.max_context // SEGMENT)
        split = pairs < most and segments > 1
        partials = address(device.scratch("partials", pairs * segments * head_bytes)) if split else 0
        where = [address(a) for a in (q, k, v, out, cache.keys, cache.values, batch.slots, batch.positions)]
        slots = (
            *where, address(batch.sequence_ids), address(batch.block_tables), spec.max_blocks, spec.heads,
            spec.kv_heads, spec.head_dim, spec.block_size, tokens, form.width, spec.window or 0, float(spec.scale),
            float(spec.soft_cap or 0), address(scratch), thread_bytes, partials, segments, tile, largest,
            *_by_tile(kernels), *_groups(form, device.host), *_by_tile(softmax),
        )  # fmt: skip
        items = pairs * segments if split else -(-tokens // tile) * spec.kv_heads
        made = [record(protocol.APPEND, tokens, slots), record(protocol.ATTEND, items, slots)]
        return [*made, record(protocol.COMBINE, pairs, slots)] if split else made

    return records
