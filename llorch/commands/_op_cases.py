"""What `llorch bench --ops` times: a Llama-like model's operations at its shapes, with arguments in device memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llorch.core.binder import Binder
from llorch.core.plan import Limits
from llorch.core.quant import row_bytes
from llorch.core.runner import PASSED_ON, batch_shapes, kernel_error, make_batch
from llorch.errors import BindError
from llorch.providers.conformance.weights import random_weight, vector
from llorch.providers.device import CacheSpec, Device, HostWeight
from llorch.providers.spec import (
    OPTIONAL,
    REQUIRED,
    AddRMSNormSpec,
    AddSpec,
    AttentionSpec,
    EmbedSpec,
    GateUpSwigluSpec,
    GatherSpec,
    MatmulGroupSpec,
    MatmulSpec,
    OpSpec,
    RMSNormSpec,
    RopePairSpec,
    RopeSpec,
    SwigluSpec,
    TopkSpec,
    Use,
)

CACHES = 256 << 20  # bytes: more than a processor's caches hold, so that weights come from memory as in a model
COPIES = 512  # of a weight, at most, to get there
TOPK = 64


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A model's."""

    dim: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    context: int  # tokens in the cache once one more is decoded
    prompt: int  # tokens of a prefill

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Case:
    """An operation to time. `calls` are argument lists taken in turn: the same work on different copies of weights."""

    operation: str
    spec: OpSpec
    shape: str
    calls: Sequence[tuple[Any, ...]]
    nbytes: int  # that a call has to move: every input and output once
    flops: int  # a multiplication and an addition are two
    weight_type: str | None = None

    @property
    def streams(self) -> bool:
        """Whether its memory is more than caches hold."""
        return self.nbytes * len(self.calls) >= CACHES


@contextmanager
def naming(provider: str, site: str) -> Iterator[None]:
    """Raises KernelError, which names the site, for what a kernel raises within."""
    try:
        yield
    except PASSED_ON:
        raise
    except Exception as error:
        raise kernel_error(provider, site, error) from error


class Cases:
    """Makes the cases of one opened device."""

    def __init__(self, device: Device, binder: Binder, shapes: Shapes) -> None:
        self._device, self._binder, self._shapes = device, binder, shapes
        self._rng = np.random.default_rng(0)

    def plain_type(self, use: Use) -> str:
        """The most exact unquantised type that the device takes."""
        taken = self._device.weight_types[use]
        for kind in ("F32", "F16"):
            if kind in taken:
                return kind
        raise BindError(f"the device takes neither F32 nor F16 as {use}, only {', '.join(sorted(taken)) or 'nothing'}")

    def every(self, tokens: int, types: Sequence[str], only: Collection[str] = REQUIRED + OPTIONAL) -> Iterator[Case]:
        """The operations `only` for this many tokens; products once for each weight type."""
        if "embed" in only or "gather" in only:  # else no vocabulary is loaded
            yield from (case for case in self._lookups(tokens) if case.operation in only)
        between = itertools.chain(self._elementwise(tokens), self._rotations(tokens))
        yield from (case for case in between if case.operation in only)
        if "attention" in only:
            yield self._attention(tokens)
        for kind in types:
            yield from self._products(tokens, kind, only)
        if tokens == 1 and "topk" in only:
            yield from self._topk()

    # ---- memory ----

    def _floats(self, *shape: int) -> Any:
        tensor = self._device.empty(shape, "float32")
        self._device.write(tensor, self._rng.standard_normal(shape, dtype=np.float32))
        return tensor

    def _ints(self, values: Sequence[int]) -> Any:
        tensor = self._device.empty((len(values),), "int32")
        self._device.write(tensor, np.array(values, np.int32))
        return tensor

    def _weights(self, t: int, kind: str, *shapes: tuple[int, int]) -> tuple[list[list[Any]], int]:
        """Copies of a group of matrices, and a group's bytes; for one token so many that no cache holds them.

        Many tokens share a weight that was fetched once: what they wait for is arithmetic.
        """
        hosts = [self._matrix(kind, rows, cols) for rows, cols in shapes]

        def group() -> list[Any]:
            return [self._device.weight(replace(host, data=host.data.copy())) for host in hosts]

        groups = [group()]
        nbytes = sum(self._device.weight_bytes(weight) for weight in groups[0])
        count = min(COPIES, math.ceil(CACHES / nbytes)) if t == 1 else 1
        return groups + [group() for _ in range(count - 1)], nbytes

    def _matrix(self, kind: str, rows: int, cols: int) -> HostWeight:
        """Random values, repeated every few rows: making them must not take longer than timing them."""
        some = random_weight(self._rng, kind, min(rows, 32), cols, frozenset({"matmul"}))
        return replace(some, shape=(rows, cols), data=np.resize(some.data, row_bytes(kind, cols) * rows))

    # ---- products ----

    def _products(self, t: int, kind: str, only: Collection[str]) -> Iterator[Case]:
        s = self._shapes
        if "matmul" in only:
            yield self.matmul(t, s.ffn, s.dim, kind)
            yield self.matmul(t, s.dim, s.ffn, kind)
        if "matmul_group" in only:
            yield self._matmul_group(t, kind)
        if "gate_up_swiglu" in only:
            yield self._gate_up_swiglu(t, kind)

    def matmul(self, t: int, rows: int, cols: int, kind: str) -> Case:
        spec = MatmulSpec(max_tokens=t, rows=rows, cols=cols, type=kind)
        groups, nbytes = self._weights(t, kind, (rows, cols))
        out, x = self._floats(t, rows), self._floats(t, cols)
        calls = [(out, x, w, None) for (w,) in groups]
        moved, flops = nbytes + 4 * t * (rows + cols), 2 * t * rows * cols
        return Case("matmul", spec, f"{rows} x {cols}", calls, moved, flops, kind)

    def _matmul_group(self, t: int, kind: str) -> Case:
        """Queries, keys and values of one x."""
        s = self._shapes
        heights = (s.dim, s.kv_dim, s.kv_dim)
        parts = tuple(
            MatmulSpec(max_tokens=t, rows=rows, cols=s.dim, type=kind, label=name)
            for name, rows in zip("qkv", heights, strict=True)
        )
        groups, nbytes = self._weights(t, kind, *((rows, s.dim) for rows in heights))
        outs, x = [self._floats(t, rows) for rows in heights], self._floats(t, s.dim)
        calls = [(*outs, x, *weights, None, None, None) for weights in groups]
        moved, flops = nbytes + 4 * t * (sum(heights) + s.dim), 2 * t * sum(heights) * s.dim
        shape = f"({' + '.join(map(str, heights))}) x {s.dim}"
        return Case("matmul_group", MatmulGroupSpec(max_tokens=t, parts=parts), shape, calls, moved, flops, kind)

    def _gate_up_swiglu(self, t: int, kind: str) -> Case:
        s = self._shapes
        gate, up = (MatmulSpec(max_tokens=t, rows=s.ffn, cols=s.dim, type=kind, label=name) for name in ("gate", "up"))
        groups, nbytes = self._weights(t, kind, (s.ffn, s.dim), (s.ffn, s.dim))
        out, x = self._floats(t, s.ffn), self._floats(t, s.dim)
        calls = [(out, x, *weights, None, None) for weights in groups]
        moved, flops = nbytes + 4 * t * (s.ffn + s.dim), 4 * t * s.ffn * s.dim + 5 * t * s.ffn
        spec = GateUpSwigluSpec(max_tokens=t, gate=gate, up=up, label="ffn_swiglu")
        return Case("gate_up_swiglu", spec, f"2 x {s.ffn} x {s.dim}", calls, moved, flops, kind)

    # ---- lookups ----

    def _lookups(self, t: int) -> Iterator[Case]:
        s, kind = self._shapes, self.plain_type("embed")
        host = replace(self._matrix(kind, s.vocab, s.dim), uses=frozenset[Use]({"embed"}))
        ids = self._ints(self._rng.integers(0, s.vocab, t).tolist())
        spec = EmbedSpec(max_tokens=t, rows=s.vocab, cols=s.dim, type=kind)
        call = (self._floats(t, s.dim), ids, self._device.weight(host))
        yield Case("embed", spec, f"{s.vocab} x {s.dim}", [call], t * (row_bytes(kind, s.dim) + 4 * s.dim), 0, kind)
        gathered = (self._floats(1, s.dim), self._floats(t, s.dim), self._ints([t - 1]))
        yield Case("gather", GatherSpec(max_tokens=1, dim=s.dim), f"1 of {t} x {s.dim}", [gathered], 8 * s.dim, 0)

    def _topk(self) -> Iterator[Case]:
        vocab = self._shapes.vocab
        spec = TopkSpec(max_tokens=1, vocab=vocab, k=min(TOPK, vocab))
        if self._binder.bind_if_offered("topk", spec) is not None:
            ids = self._device.empty((1, spec.k), "int32")
            call = (self._floats(1, spec.k), ids, self._floats(1, vocab))
            yield Case("topk", spec, f"{spec.k} of {vocab}", [call], 4 * vocab + 8 * spec.k, vocab)

    # ---- between the products ----

    def add(self, rows: int, width: int) -> Case:
        out, x, y = (self._floats(rows, width) for _ in range(3))
        size = rows * width
        return Case("add", AddSpec(max_tokens=rows, dim=width), f"{rows} x {width}", [(out, x, y)], 12 * size, size)

    def _elementwise(self, t: int) -> Iterator[Case]:
        s, size, shape = self._shapes, t * self._shapes.dim, f"{t} x {self._shapes.dim}"
        out, x, y = (self._floats(t, s.dim) for _ in range(3))
        weight = self._device.weight(vector("norm", self._rng.standard_normal(s.dim, dtype=np.float32)))
        norm, add = RMSNormSpec(max_tokens=t, dim=s.dim, eps=1e-5), AddSpec(max_tokens=t, dim=s.dim)
        yield Case("rmsnorm", norm, shape, [(out, x, weight)], 8 * size, 4 * size)
        yield self.add(t, s.dim)
        both = AddRMSNormSpec(max_tokens=t, add=add, norm=norm)
        yield Case("add_rmsnorm", both, shape, [(out, x, y, weight)], 16 * size, 5 * size)
        call, wide = tuple(self._floats(t, s.ffn) for _ in range(3)), t * s.ffn
        yield Case("swiglu", SwigluSpec(max_tokens=t, dim=s.ffn), f"{t} x {s.ffn}", [call], 12 * wide, 5 * wide)

    def _rotations(self, t: int) -> Iterator[Case]:
        s, dim = self._shapes, self._shapes.head_dim
        frequencies = tuple(float(f) for f in 10000.0 ** -(np.arange(0, dim, 2) / dim))
        rope = RopeSpec(max_tokens=t, heads=s.heads, head_dim=dim, pairing="adjacent", frequencies=frequencies)
        q, k, positions = self._floats(t, s.dim), self._floats(t, s.kv_dim), self._ints(range(t))
        yield Case("rope", rope, f"{t} x {s.heads} x {dim}", [(q, positions)], 8 * t * s.dim, 3 * t * s.dim)
        pair = RopePairSpec(max_tokens=t, q=rope, k=replace(rope, heads=s.kv_heads))
        both = t * (s.dim + s.kv_dim)
        shape = f"{t} x ({s.heads} + {s.kv_heads}) x {dim}"
        yield Case("rope_pair", pair, shape, [(q, k, positions)], 8 * both, 3 * both)

    def _attention(self, t: int) -> Case:
        """One sequence: a token behind a context, or a prompt from its start."""
        s, size, dtype = self._shapes, self._device.block_sizes[0], self._device.cache_dtypes[0]
        length = s.context if t == 1 else t
        blocks = -(-length // size)
        paged = CacheSpec(
            layers=1, kv_heads=s.kv_heads, head_dim=s.head_dim, block_size=size, blocks=blocks + 1, dtype=dtype
        )
        spec = AttentionSpec(
            max_tokens=length, heads=s.heads, kv_heads=s.kv_heads, head_dim=s.head_dim, scale=s.head_dim**-0.5,
            block_size=size, max_blocks=blocks, max_sequences=1, cache_dtype=dtype,
        )  # fmt: skip
        limits = Limits(max_tokens=length, max_sequences=1, max_outputs=1, max_context=length)
        inputs, layer = self._device.inputs(batch_shapes(limits, blocks)), self._device.kv_cache(paged).layers[0]
        batch, tensors = make_batch(inputs), [self._floats(length, n) for n in (s.dim, s.dim, s.kv_dim, s.kv_dim)]

        def step(first: int) -> tuple[Any, ...]:
            """The arguments that attend from position `first` to the end."""
            places = np.arange(first, length, dtype=np.int32)
            inputs.host["positions"][: len(places)] = places
            inputs.host["slots"][: len(places)] = places + size  # block 0 belongs to nobody
            inputs.host["block_tables"][0] = np.arange(1, blocks + 1)
            inputs.host["query_starts"][:] = 0, len(places)
            inputs.host["context_lengths"][0] = length
            inputs.upload()
            batch.tokens, batch.sequences, batch.max_query, batch.max_context = len(places), 1, len(places), length
            return *(self._device.rows(tensor, len(places)) for tensor in tensors), layer, batch

        shape = f"{s.heads} / {s.kv_heads} x {s.head_dim}, {length} keys"
        with naming(self._binder.provider, f"attention, {shape}"):
            self._binder.bind("attention", spec)(*step(0))  # fills the cache
        pairs = sum(range(length - t + 1, length + 1))  # of a query and a key that it sees
        nbytes = paged.nbytes // paged.blocks // size * length + 8 * t * (s.dim + s.kv_dim)
        return Case("attention", spec, shape, [step(length - t)], nbytes, 4 * s.dim * pairs)
