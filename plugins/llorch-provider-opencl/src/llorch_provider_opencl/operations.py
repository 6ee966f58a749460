"""The factories: what each operation launches, and over which range."""

from __future__ import annotations

import functools
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
    OpSpec,
    RMSNormSpec,
    RopePairSpec,
    RopeSpec,
    SwigluSpec,
    TopkSpec,
    hookimpl,
)
from llorch_provider_opencl import products
from llorch_provider_opencl.device import OpenCLDevice
from llorch_provider_opencl.formats import FORMATS
from llorch_provider_opencl.launches import Launch, Site
from llorch_provider_opencl.memory import LayerCache, Tensor, Weight, cache_macros, padded_dim


class OpenCLOps:
    """Every operation of the contract; `topk` for k = 1 alone, where a row is one number instead of the vocabulary."""

    @hookimpl
    def embed(self, device: OpenCLDevice, spec: EmbedSpec) -> Kernel:
        form = FORMATS[spec.type]
        make = _maker(device, "embed", ("weights", "embed"), {f"TYPE_{spec.type}": 1, "WIDTH": 1})
        units, segments = form.units(spec.cols), -(-spec.cols // form.segment)

        def launches(out: Tensor, tokens: Tensor, table: Weight) -> Sequence[Launch]:
            args = (out.cl, tokens.cl, tokens.at, table.cl, np.int32(spec.cols), np.int32(units))
            return (Launch(make, (segments, out.shape[0]), None, args),)

        return Site(device.launcher, spec, launches)

    @hookimpl
    def rmsnorm(self, device: OpenCLDevice, spec: RMSNormSpec) -> Kernel:
        norm = _rmsnorm(device, spec)
        return Site(device.launcher, spec, lambda out, x, weight: (norm(out, x, None, weight),))

    @hookimpl
    def add_rmsnorm(self, device: OpenCLDevice, spec: AddRMSNormSpec) -> Kernel:
        norm = _rmsnorm(device, spec.norm)
        return Site(device.launcher, spec, lambda out, x, y, weight: (norm(out, x, y, weight),))

    @hookimpl
    def matmul(self, device: OpenCLDevice, spec: MatmulSpec) -> Kernel:
        return products.matmul(device, spec)

    @hookimpl
    def matmul_group(self, device: OpenCLDevice, spec: MatmulGroupSpec) -> Kernel:
        return products.matmul_group(device, spec)

    @hookimpl
    def gate_up_swiglu(self, device: OpenCLDevice, spec: GateUpSwigluSpec) -> Kernel | None:
        return products.gate_up_swiglu(device, spec)

    @hookimpl
    def rope(self, device: OpenCLDevice, spec: RopeSpec) -> Kernel:
        rotate = _rope(device, spec, kv_heads=0)
        return Site(device.launcher, spec, lambda x, positions: (rotate(x, None, positions),))

    @hookimpl
    def rope_pair(self, device: OpenCLDevice, spec: RopePairSpec) -> Kernel | None:
        """Declined where q and k are rotated differently: no model's are."""
        q, k = spec.q, spec.k
        if (q.head_dim, q.pairing, q.frequencies, q.magnitude) != (k.head_dim, k.pairing, k.frequencies, k.magnitude):
            return None
        rotate = _rope(device, q, kv_heads=k.heads)
        return Site(device.launcher, spec, lambda q, k, positions: (rotate(q, k, positions),))

    @hookimpl
    def attention(self, device: OpenCLDevice, spec: AttentionSpec) -> Kernel:
        return _attention(device, spec)

    @hookimpl
    def swiglu(self, device: OpenCLDevice, spec: SwigluSpec) -> Kernel:
        return _elementwise(device, spec, "swiglu")

    @hookimpl
    def add(self, device: OpenCLDevice, spec: AddSpec) -> Kernel:
        return _elementwise(device, spec, "add")

    @hookimpl
    def gather(self, device: OpenCLDevice, spec: GatherSpec) -> Kernel:
        make = _row_maker(device, "gather")

        def launches(out: Tensor, x: Tensor, rows: Tensor) -> Sequence[Launch]:
            args = (out.cl, x.cl, rows.cl, rows.at, np.int32(spec.dim))
            return (Launch(make, (spec.dim, out.shape[0]), None, args),)

        return Site(device.launcher, spec, launches)

    @hookimpl
    def topk(self, device: OpenCLDevice, spec: TopkSpec) -> Kernel | None:
        if spec.k != 1:
            return None
        make, items = _row_maker(device, "argmax"), device.settings.row_items

        def launches(values: Tensor, ids: Tensor, logits: Tensor) -> Sequence[Launch]:
            args = (values.cl, ids.cl, ids.at, logits.cl, np.int32(spec.vocab))
            return (Launch(make, (logits.shape[0] * items,), (items,), args),)

        return Site(device.launcher, spec, launches)


def _maker(device: OpenCLDevice, name: str, files: Sequence[str], macros: dict[str, Any]) -> Callable[[], Any]:
    return functools.partial(device.kernel, name, tuple(files), macros)


def _row_maker(device: OpenCLDevice, name: str) -> Callable[[], Any]:
    s = device.settings
    return _maker(device, name, ("rows",), {"LOCAL": s.row_items, "PER_ITEM": s.vectors_per_item})


def _rmsnorm(device: OpenCLDevice, spec: RMSNormSpec) -> Callable[..., Launch]:
    make, items = _row_maker(device, "rmsnorm"), device.settings.row_items

    def launch(out: Tensor, x: Tensor, y: Tensor | None, weight: Weight) -> Launch:
        args = (out.cl, x.cl, None if y is None else y.cl, weight.cl, np.int32(spec.dim), np.float32(spec.eps))
        return Launch(make, (out.shape[0] * items,), (items,), args)

    return launch


def _elementwise(device: OpenCLDevice, spec: OpSpec, name: str) -> Kernel:
    make = _row_maker(device, name)
    per_item = device.settings.vectors_per_item * device.settings.width

    def launches(out: Tensor, x: Tensor, y: Tensor) -> Sequence[Launch]:
        count = out.shape[0] * out.shape[1]
        return (Launch(make, (-(-count // per_item),), None, (out.cl, x.cl, y.cl, np.uint32(count))),)

    return Site(device.launcher, spec, launches)


def _rope(device: OpenCLDevice, spec: RopeSpec, kv_heads: int) -> Callable[..., Launch]:
    heads_per_item = device.settings.rope_heads
    macros = {"HEADS_PER_ITEM": heads_per_item, "HALF_PAIRS": int(spec.pairing == "half")}
    make = _maker(device, "rope", ("rope",), macros)
    frequencies = device.frequencies(spec.frequencies)
    pairs = len(spec.frequencies)
    numbers = (pairs, spec.heads, kv_heads, spec.head_dim)
    parts = -(-(spec.heads + kv_heads) // heads_per_item)

    def launch(q: Tensor, k: Tensor | None, positions: Tensor) -> Launch:
        pointers = (q.cl, None if k is None else k.cl, positions.cl, positions.at, frequencies.cl)
        args = (*pointers, *map(np.int32, numbers), np.float32(spec.magnitude))
        return Launch(make, (pairs, q.shape[0], parts), None, args)

    return launch


def _attention(device: OpenCLDevice, spec: AttentionSpec) -> Kernel:
    items = device.settings.attention_items
    macros = cache_macros(spec) | {"LOCAL": items}
    append = _maker(device, "append", ("attention",), macros)
    attend = _maker(device, "attend", ("attention",), macros)

    def launches(out: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, batch: Batch) -> Sequence[Launch]:
        tokens, slots, tables = out.shape[0], _tensor(batch.slots), _tensor(batch.block_tables)
        new = (cache.keys.cl, cache.values.cl, k.cl, v.cl, slots.cl, slots.at)
        places = [_tensor(t) for t in (batch.positions, batch.sequence_ids, batch.block_tables)]
        where = [arg for tensor in places for arg in (tensor.cl, tensor.at)]
        old = (out.cl, q.cl, cache.keys.cl, cache.values.cl, *where, np.int32(tables.shape[1]))
        return (
            Launch(append, (padded_dim(spec.head_dim), spec.kv_heads, tokens), None, new),
            Launch(attend, (spec.heads * items, tokens), (items, 1), old),
        )

    return Site(device.launcher, spec, launches)


def _tensor(tensor: Any) -> Tensor:
    """The batch's tensors are typed as opaque; they are this device's."""
    found: Tensor = tensor
    return found
