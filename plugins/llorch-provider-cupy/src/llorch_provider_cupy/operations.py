"""The factories: what each operation enqueues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llorch.providers import (
    AddRMSNormSpec,
    AddSpec,
    AttentionSpec,
    EmbedSpec,
    GateUpSwigluSpec,
    GatherSpec,
    Kernel,
    MatmulGroupSpec,
    MatmulSpec,
    OpSpec,
    RMSNormSpec,
    RopePairSpec,
    RopeSpec,
    SwigluSpec,
    TopkSpec,
    hookimpl,
)
from llorch_provider_cupy import attention, products, programs
from llorch_provider_cupy.device import CudaDevice, padded_columns
from llorch_provider_cupy.formats import UNIT
from llorch_provider_cupy.launches import FLAT_THREADS, ROW_THREADS, Function, Shares, Site, Work, blocks, f32, i32, u64
from llorch_provider_cupy.memory import Tensor, Weight

ROPE_THREADS, HEADS_PER_BLOCK = 64, 4  # as kernels/rope.cu has them
ARGMAX_THREADS, SORT_THREADS, SORTED = 1024, 512, 2048  # as kernels/topk.cu has them


class CudaOps:
    """Every operation of the contract."""

    @hookimpl
    def embed(self, device: CudaDevice, spec: EmbedSpec) -> Kernel:
        launch = device.function(programs.products(spec.type), "embed", FLAT_THREADS)
        numbers = i32(spec.rows), i32(padded_columns(spec.cols) // UNIT), i32(spec.cols)

        def works(out: Tensor, tokens: Tensor, table: Weight) -> Sequence[Work]:
            grid = (blocks(spec.cols, 8 * FLAT_THREADS), out.shape[0])
            return (launch.work(grid, out.address, tokens.address, table.address, *numbers),)

        return Site(device, spec, works)

    @hookimpl
    def rmsnorm(self, device: CudaDevice, spec: RMSNormSpec) -> Kernel:
        def works(out: Tensor, x: Tensor, weight: Weight, *, rounds: bool = False) -> Sequence[Work]:
            return (_rmsnorm(device, spec, out, x, None, weight, rounds),)

        return Site(device, spec, works, Shares(gives=_few_rows))

    @hookimpl
    def add_rmsnorm(self, device: CudaDevice, spec: AddRMSNormSpec) -> Kernel:
        def works(out: Tensor, x: Tensor, y: Tensor, weight: Weight, *, rounds: bool = False) -> Sequence[Work]:
            return (_rmsnorm(device, spec.norm, out, x, y, weight, rounds),)

        return Site(device, spec, works, Shares(gives=_few_rows, norm=spec.norm))

    @hookimpl
    def matmul(self, device: CudaDevice, spec: MatmulSpec) -> Kernel:
        return products.matmul(device, spec)

    @hookimpl
    def matmul_group(self, device: CudaDevice, spec: MatmulGroupSpec) -> Kernel:
        return products.matmul_group(device, spec)

    @hookimpl
    def gate_up_swiglu(self, device: CudaDevice, spec: GateUpSwigluSpec) -> Kernel | None:
        return products.gate_up_swiglu(device, spec)

    @hookimpl
    def rope(self, device: CudaDevice, spec: RopeSpec) -> Kernel:
        return Site(device, spec, lambda x, positions: (_rope(device, spec, x, None, 0, positions),))

    @hookimpl
    def rope_pair(self, device: CudaDevice, spec: RopePairSpec) -> Kernel | None:
        """Declined where q and k are rotated differently: no model's are."""
        q, k = spec.q, spec.k
        if (q.head_dim, q.pairing, q.frequencies, q.magnitude) != (k.head_dim, k.pairing, k.frequencies, k.magnitude):
            return None

        def works(x: Tensor, y: Tensor, positions: Tensor) -> Sequence[Work]:
            return (_rope(device, q, x, y, k.heads, positions),)

        return Site(device, spec, works, Shares(rope=q))

    @hookimpl
    def attention(self, device: CudaDevice, spec: AttentionSpec) -> Kernel | None:
        return attention.attention(device, spec)

    @hookimpl
    def swiglu(self, device: CudaDevice, spec: SwigluSpec) -> Kernel:
        return _elementwise(device, spec, "swiglu")

    @hookimpl
    def add(self, device: CudaDevice, spec: AddSpec) -> Kernel:
        return _elementwise(device, spec, "add")

    @hookimpl
    def gather(self, device: CudaDevice, spec: GatherSpec) -> Kernel:
        launch = _row_function(device, "gather", FLAT_THREADS)

        def works(out: Tensor, x: Tensor, rows: Tensor) -> Sequence[Work]:
            grid = (blocks(spec.dim, FLAT_THREADS), out.shape[0])
            return (launch.work(grid, out.address, x.address, rows.address, i32(spec.dim)),)

        return Site(device, spec, works)

    @hookimpl
    def topk(self, device: CudaDevice, spec: TopkSpec) -> Kernel | None:
        """Declined where more are wanted than a block sorts."""
        if spec.k > SORTED // 2:
            return None
        return _argmax(device, spec) if spec.k == 1 else _topk(device, spec)


def _row_function(device: CudaDevice, name: str, threads: int) -> Function:
    return device.function(programs.program("rows"), name, threads)


def _few_rows(out: Tensor, *_args: Any) -> Tensor | None:
    """What a norm writes, where the product behind it would round it."""
    return out if out.shape[0] <= products.MOST_TOKENS else None


def _rmsnorm(
    device: CudaDevice, spec: RMSNormSpec, out: Tensor, x: Tensor, y: Tensor | None, weight: Weight, rounds: bool
) -> Work:
    twin = products.rounded_twin(device) if rounds else (0, 0)
    pointers = (out.address, x.address, 0 if y is None else y.address, weight.address, *twin)
    launch = _row_function(device, "rmsnorm", ROW_THREADS)
    return launch.work((out.shape[0],), *pointers, i32(spec.dim), f32(spec.eps))


def _elementwise(device: CudaDevice, spec: OpSpec, name: str) -> Kernel:
    launch = _row_function(device, name, FLAT_THREADS)

    def works(out: Tensor, x: Tensor, y: Tensor) -> Sequence[Work]:
        count = int(np.prod(out.shape))
        return (launch.work((blocks(count, FLAT_THREADS),), out.address, x.address, y.address, u64(count)),)

    return Site(device, spec, works)


def _rope(device: CudaDevice, spec: RopeSpec, q: Tensor, k: Tensor | None, k_heads: int, positions: Tensor) -> Work:
    launch = device.function(programs.program("rope"), "rope", ROPE_THREADS)
    grid = (blocks(len(spec.frequencies), ROPE_THREADS), blocks(spec.heads + k_heads, HEADS_PER_BLOCK), q.shape[0])
    pointers = (q.address, 0 if k is None else k.address, positions.address)
    heads = (i32(spec.heads), i32(k_heads), i32(spec.head_dim))
    return launch.work(grid, *pointers, *device.rotation(spec), *heads)


def _argmax(device: CudaDevice, spec: TopkSpec) -> Kernel:
    launch = device.function(programs.program("topk"), "argmax", ARGMAX_THREADS)

    def works(values: Tensor, ids: Tensor, logits: Tensor) -> Sequence[Work]:
        pointers = values.address, ids.address, logits.address
        return (launch.work((logits.shape[0],), *pointers, i32(spec.vocab)),)

    return Site(device, spec, works)


def _topk(device: CudaDevice, spec: TopkSpec) -> Kernel:
    """Each block sorts a part of a row; one block a row then merges the parts' candidates."""
    parts = blocks(spec.vocab, SORTED)
    program = programs.program("topk")
    of_parts, merge = (device.function(program, name, SORT_THREADS) for name in ("topk_parts", "topk_merge"))
    device.reserve("candidates", 8 * spec.max_tokens * parts * spec.k)

    def works(values: Tensor, ids: Tensor, logits: Tensor) -> Sequence[Work]:
        rows, candidates = logits.shape[0], device.scratch("candidates").address
        merged: tuple[Any, ...] = (values.address, ids.address, candidates, i32(parts * spec.k), i32(spec.k))
        return (
            of_parts.work((parts, rows), candidates, logits.address, i32(spec.vocab), i32(spec.k)),
            merge.work((rows,), *merged),
        )

    return Site(device, spec, works)
