"""matmul, matmul_group, gate_up_swiglu: products of x with weights in groups of rows (kernels/matmul.cl)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llorch.providers import GateUpSwigluSpec, Kernel, MatmulGroupSpec, MatmulSpec
from llorch_provider_opencl.device import OpenCLDevice
from llorch_provider_opencl.formats import FORMATS, ROWS_PER_GROUP
from llorch_provider_opencl.launches import Launch, Site
from llorch_provider_opencl.memory import Tensor, Weight

DECODE_TILES = (1, 2, 4)  # tokens of a tile for as few tokens; more take the device's tile
MOST_RESULTS = 8  # groups times tokens of a decode tile: sums and running totals of more do not fit 32 registers
BUSY_ITEMS = 512  # work-items that keep a compute unit of a GPU busy: below that columns are shared out


@dataclass(frozen=True)
class Variant:
    """How a product is cut for a number of tokens. `splits` follows from the site alone: it decides the rounding."""

    type: str
    tokens: int
    groups: int
    splits: int
    items: int
    width: int
    segments_per_item: int
    unroll: int
    paired: bool

    @property
    def macros(self) -> dict[str, int]:
        return {
            f"TYPE_{self.type}": 1,
            "TOKENS": self.tokens,
            "GROUPS": self.groups,
            "SPLITS": self.splits,
            "GROUP_ITEMS": self.items,
            "SPAN": self.segments_per_item,
            "UNROLL": self.unroll,
            "PAIRED": int(self.paired),
        }

    @property
    def items_per_group(self) -> int:
        return ROWS_PER_GROUP // self.width


class Product:
    """The variants of one site's products, for any number of tokens."""

    def __init__(self, device: OpenCLDevice, spec: MatmulSpec, *, paired: bool = False) -> None:
        self.spec, self._device, self._paired = spec, device, paired
        self._makers: dict[tuple[str, Variant], Callable[[], Any]] = {}
        form = FORMATS[spec.type]
        self.units = form.units(spec.cols)
        self._splits = self._choose_splits()
        tiled_tokens = max(self.variant(t).tokens * -(-t // self.variant(t).tokens) for t in (1, 3, spec.max_tokens))
        columns = self.units * form.columns
        device.reserve_prepared(tiled_tokens * (columns + columns // form.segment))

    def _choose_splits(self) -> int:
        """More work-items a row until the device has enough of them; at most one a unit of columns."""
        settings, splits = self._device.settings, 1
        wanted = self._device.traits.compute_units * BUSY_ITEMS
        while splits * 2 <= min(settings.max_splits, self.units) and splits * self.spec.rows < wanted:
            splits *= 2
        return splits

    def variant(self, tokens: int) -> Variant:
        s = self._device.settings
        tile = next((t for t in DECODE_TILES if tokens <= t), s.prefill_tokens)
        groups = s.prefill_groups if tile == s.prefill_tokens else max(1, min(s.decode_groups, MOST_RESULTS // tile))
        groups = max(2, groups) if self._paired else groups
        form = FORMATS[self.spec.type]
        segments = form.columns // form.segment
        return Variant(
            type=self.spec.type,
            tokens=tile,
            groups=groups,
            splits=self._splits,
            items=s.product_items,
            width=s.width,
            segments_per_item=s.segments_per_item,
            unroll=segments if segments <= s.unroll else 1,  # whole units alone
            paired=self._paired,
        )

    def make(self, name: str, variant: Variant) -> Callable[[], Any]:
        """Always the same function for a variant: sites share kernel objects by it."""
        key = (name, variant)
        if key not in self._makers:
            self._makers[key] = functools.partial(self._device.kernel, name, ("weights", "matmul"), variant.macros)
        return self._makers[key]

    def prepare(self, x: Tensor) -> Launch:
        """Lays x out for products of this type and number of columns."""
        tokens, variant = x.shape[0], self.variant(x.shape[0])
        form = FORMATS[self.spec.type]
        segments = self.units * form.columns // form.segment
        size = (-(-segments // variant.segments_per_item), -(-tokens // variant.tokens))
        args = (self._device.prepared.cl, x.cl, np.int32(tokens), np.int32(self.spec.cols), np.int32(self.units))
        return Launch(self.make("prepare", variant), size, None, args)

    def launch(self, name: str, tokens: int, pointers: tuple[Any, ...]) -> Launch:
        """A product of the prepared x. `pointers`: the kernel's buffers."""
        variant = self.variant(tokens)
        groups = -(-self.spec.rows // ROWS_PER_GROUP)
        per_item = variant.groups // 2 if self._paired else variant.groups
        items = -(-groups // per_item) * variant.items_per_group
        work_groups = -(-items // variant.items) * -(-tokens // variant.tokens)
        local = variant.items * variant.splits
        args = (*pointers, np.int32(tokens), np.int32(self.spec.rows), np.int32(self.units))
        return Launch(self.make(name, variant), (work_groups * local,), (local,), args)


def _cl(weight: Weight | None) -> Any:
    return None if weight is None else weight.cl


def matmul(device: OpenCLDevice, spec: MatmulSpec) -> Kernel:
    product = Product(device, spec)

    def launches(out: Tensor, x: Tensor, w: Weight, bias: Weight | None) -> Sequence[Launch]:
        pointers = (out.cl, device.prepared.cl, w.cl, _cl(bias))
        return product.prepare(x), product.launch("matmul", x.shape[0], pointers)

    return Site(device.launcher, spec, launches)


def matmul_group(device: OpenCLDevice, spec: MatmulGroupSpec) -> Kernel:
    """x is prepared once for neighbours of the same type; the products follow each other without a gap."""
    products = [Product(device, part) for part in spec.parts]
    n = len(products)

    def launches(*args: Any) -> Sequence[Launch]:
        outs, x, weights, biases = args[:n], args[n], args[n + 1 : 2 * n + 1], args[2 * n + 1 :]
        found: list[Launch] = []
        prepared: MatmulSpec | None = None
        for product, out, w, bias in zip(products, outs, weights, biases, strict=True):
            if prepared is None or prepared.type != product.spec.type:
                found.append(product.prepare(x))
                prepared = product.spec
            pointers = (out.cl, device.prepared.cl, w.cl, _cl(bias))
            found.append(product.launch("matmul", x.shape[0], pointers))
        return found

    return Site(device.launcher, spec, launches)


def gate_up_swiglu(device: OpenCLDevice, spec: GateUpSwigluSpec) -> Kernel | None:
    """One kernel for both products and the activation. Declined where the two weights are of different types."""
    if (spec.gate.type, spec.gate.rows, spec.gate.cols) != (spec.up.type, spec.up.rows, spec.up.cols):
        return None
    product = Product(device, spec.gate, paired=True)

    def launches(
        out: Tensor, x: Tensor, w_gate: Weight, w_up: Weight, b_gate: Weight | None, b_up: Weight | None
    ) -> Sequence[Launch]:
        pointers = (out.cl, device.prepared.cl, w_gate.cl, w_up.cl, _cl(b_gate), _cl(b_up))
        return product.prepare(x), product.launch("gate_up_swiglu", x.shape[0], pointers)

    return Site(device.launcher, spec, launches)
