"""matmul, matmul_group, gate_up_swiglu: for a few tokens kernels that read the weights once (kernels/products.cu), for
more cuBLAS, over the weights' values in a plain type that tensor cores take.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from llorch.providers import GateUpSwigluSpec, Kernel, MatmulGroupSpec, MatmulSpec
from llorch_provider_cupy import programs
from llorch_provider_cupy.device import NATIVE, CudaDevice, padded_columns
from llorch_provider_cupy.formats import UNIT
from llorch_provider_cupy.launches import FLAT_THREADS, ROW_THREADS, Shares, Site, Work, blocks, f32, i32
from llorch_provider_cupy.memory import Tensor, Weight
from llorch_provider_cupy.programs import PRODUCT_TOKENS
from llorch_provider_cupy.runtime import PLAIN_BYTES, Gemm, Plain

MOST_TOKENS = PRODUCT_TOKENS[-1]  # more go to cuBLAS
PRODUCT_THREADS, PRODUCT_WARPS = 128, 4  # as kernels/products.cu has them
PARTS = 3  # products of a launch
SLAB_BYTES = 128 << 20  # of a weight's values at once, beside the weight itself
ROUNDED_BYTES = 16  # of a unit's scale and sums
UNIT_THREADS = 32 * UNIT  # of kernels whose blocks make the rows of a unit
NEXT = "next numbers", "next rounded", "next squares"


def _address(weight: Weight | None) -> int:
    return 0 if weight is None else weight.address


def rounded_twin(device: CudaDevice) -> tuple[int, int]:
    """Where the rounded activations of the next product lie: numbers, and each unit's scale and sums."""
    return device.scratch("numbers").address, device.scratch("rounded").address


def next_twin(device: CudaDevice) -> tuple[int, int, int]:
    """Another, for a product that writes it while it reads the first; and the sums of squares that divide it."""
    numbers, rounded, squares = (device.scratch(name).address for name in NEXT)
    return numbers, rounded, squares


def round_rows(device: CudaDevice, x: Tensor) -> list[Work]:
    """x rounded, where `rounded_twin` says."""
    tokens, cols = x.shape
    units = padded_columns(cols) // UNIT
    launch = device.function(programs.program("rows"), "round_rows", FLAT_THREADS)
    grid = (blocks(units, FLAT_THREADS // 32), tokens)
    return [launch.work(grid, *rounded_twin(device), x.address, i32(cols), i32(units))]


class Products:
    """Products of weights of one type with the same x."""

    def __init__(self, device: CudaDevice, spec: MatmulSpec) -> None:
        self._device, self._spec = device, spec
        self._program = programs.products(spec.type)
        self._units = padded_columns(spec.cols) // UNIT
        self._plain = spec.type in NATIVE
        rows, tokens = padded_columns(spec.cols), spec.max_tokens
        if not self._plain:
            device.reserve("numbers", MOST_TOKENS * self._units * UNIT)
            device.reserve("rounded", MOST_TOKENS * self._units * ROUNDED_BYTES)
        if device.joins_norms:
            for name, nbytes in zip(NEXT, (UNIT, ROUNDED_BYTES, 4), strict=True):
                device.reserve(name, nbytes * blocks(spec.rows, UNIT))
        if tokens > MOST_TOKENS:
            device.reserve("x", tokens * rows * 2)
            device.reserve("x scales", 4 * tokens)
            device.reserve("values", min(4 * rows * spec.rows, max(SLAB_BYTES, 4 * rows)))

    # ---- few tokens ----

    def prepare(self, x: Tensor) -> list[Work]:
        """Rounds x for products of quantised weights."""
        return [] if self._plain else round_rows(self._device, x)

    def takes(self, x: Tensor) -> Tensor | None:
        """x where it is rounded before this product."""
        return None if self._plain or x.shape[0] > MOST_TOKENS else x

    def joins(self, out: Tensor) -> bool:
        """Whether blocks may make whole units of one token's rows."""
        return self._device.joins_norms and out.shape[0] == 1 and self._spec.rows % UNIT == 0

    def divides(self, x: Tensor) -> Tensor | None:
        """x where it may come before a norm's division."""
        return x if self._device.joins_norms and x.shape[0] == 1 and self._spec.cols % UNIT == 0 else None

    def few(
        self, x: Tensor, parts: Sequence[tuple[Tensor, Weight, Weight | None]], normed: float | None = None
    ) -> list[Work]:
        """Products of up to PARTS weights in one launch."""
        tokens = x.shape[0]
        variant = next(t for t in PRODUCT_TOKENS if t >= tokens)
        launch = self._device.function(self._program, f"product_{variant}", PRODUCT_THREADS)
        grid = sum(blocks(w.shape[0], self._rows_per_block(variant)) for _, w, _ in parts)
        arguments: list[Any] = []
        for out, w, bias in parts:
            arguments += [out.address, w.address, _address(bias), i32(w.shape[0])]
        arguments += [0, 0, 0, i32(0)] * (PARTS - len(parts))
        x_arguments = (*self._x(x, normed), *self._norm(normed), i32(tokens), *self._columns)
        return [launch.work((grid,), *x_arguments, *arguments)]

    def few_normed(
        self, x: Tensor, part: tuple[Tensor, Weight, Weight | None], into: tuple[Any, Any, Any]
    ) -> list[Work]:
        """One token's product, added to the residual stream, and the sum times a norm's weight, not yet divided."""
        (out, w, bias), (stream, weight, normed) = part, into
        launch = self._device.function(self._program, "product_norm", UNIT_THREADS)
        pointers = (out.address, w.address, _address(bias), stream.address, weight.address, normed.address)
        grid = (self._spec.rows // UNIT,)
        return [launch.work(grid, *self._x(x), *self._columns, *pointers, *next_twin(self._device))]

    def few_gated(
        self, out: Tensor, x: Tensor, weights: Sequence[Weight | None], normed: float | None, *, rounds: bool
    ) -> list[Work]:
        """`weights`: of gate and up, then their biases."""
        tokens, rows, variant = x.shape[0], self._spec.rows, next(t for t in PRODUCT_TOKENS if t >= x.shape[0])
        pointers = (out.address, *map(_address, weights))
        before = (*self._x(x, normed), *self._norm(normed))
        if rounds:
            launch = self._device.function(self._program, "gate_up_round", UNIT_THREADS)
            return [launch.work((rows // UNIT,), *before, *self._columns, *pointers, *rounded_twin(self._device))]
        launch = self._device.function(self._program, f"gate_up_{variant}", PRODUCT_THREADS)
        grid = (blocks(rows, self._rows_per_block(variant)),)
        return [launch.work(grid, *before, i32(tokens), *self._columns, *pointers, i32(rows))]

    def _rows_per_block(self, variant: int) -> int:
        """As kernels/products.cu has them."""
        return PRODUCT_WARPS * (1 if variant == 1 and not self._plain else 2)

    @property
    def _columns(self) -> tuple[Any, Any]:
        return i32(self._spec.cols), i32(self._units)

    def _x(self, x: Tensor, normed: float | None = None) -> tuple[int, ...]:
        if self._plain:
            return (x.address,)
        return rounded_twin(self._device) if normed is None else next_twin(self._device)[:2]

    def _norm(self, normed: float | None) -> tuple[Any, Any]:
        """The division that is left to do, with the eps of its norm."""
        return (0, f32(0)) if normed is None else (next_twin(self._device)[2], f32(normed))

    # ---- many tokens ----

    def convert(self, x: Tensor, kind: Plain) -> list[Work]:
        """x as cuBLAS takes it. Halves come with a scale a row."""
        tokens, cols = x.shape
        if kind == "f32":
            return []
        target, stride = self._device.scratch("x").address, padded_columns(cols)
        rows = programs.program("rows")
        if kind == "f16":
            launch = self._device.function(rows, "to_halves", ROW_THREADS)
            scales = self._device.scratch("x scales").address
            return [launch.work((tokens,), target, scales, x.address, i32(cols), i32(stride))]
        launch = self._device.function(rows, "to_brains", FLAT_THREADS)
        return [launch.work((blocks(stride, FLAT_THREADS), tokens), target, x.address, i32(cols), i32(stride))]

    def many(self, out: int, x: Tensor, w: Weight) -> list[Work]:
        """A product of the converted x, without the scales of its rows. `out`: an address."""
        (tokens, cols), (rows, _), stride = x.shape, w.shape, padded_columns(self._spec.cols)
        source, x_stride = (x.address, cols) if w.kind == "f32" else (self._device.scratch("x").address, stride)
        product = Gemm(w.kind, out, rows, source, x_stride, w.address, stride, tokens, rows, cols)
        if NATIVE.get(w.type) == w.kind:
            return [functools.partial(self._device.runtime.gemm, product)]
        if w.kind == "f16" and w.halves is not None:
            return [functools.partial(self._device.runtime.gemm, product._replace(w=w.halves.address))]
        values = self._device.scratch("values")
        works: list[Work] = []
        slab = values.nbytes // (stride * PLAIN_BYTES[w.kind])
        for first in range(0, rows, slab):
            count = min(slab, rows - first)
            works += self._device.expand(w, w.kind, values.address, first, count)
            part = product._replace(out=out + 4 * first, w=values.address, rows=count)
            works.append(functools.partial(self._device.runtime.gemm, part))
        return works

    def finish(self, out: Tensor, kind: Plain, bias: Weight | None) -> list[Work]:
        """The scales of x's rows, and the bias."""
        scales = self._device.scratch("x scales").address if kind == "f16" else 0
        if not scales and bias is None:
            return []
        tokens, width = out.shape
        launch = self._device.function(programs.program("rows"), "finish", FLAT_THREADS)
        return [launch.work((blocks(width, FLAT_THREADS), tokens), out.address, scales, _address(bias), i32(width))]


def matmul(device: CudaDevice, spec: MatmulSpec) -> Kernel:
    product = Products(device, spec)

    def works(
        out: Tensor, x: Tensor, w: Weight, bias: Weight | None, *,
        rounded: bool = False, normed: float | None = None, into: tuple[Any, Any, Any] | None = None,
    ) -> list[Work]:  # fmt: skip
        if x.shape[0] > MOST_TOKENS:
            return product.convert(x, w.kind) + product.many(out.address, x, w) + product.finish(out, w.kind, bias)
        before = [] if rounded or normed is not None else product.prepare(x)
        if into is not None:
            return before + product.few_normed(x, (out, w, bias), into)
        return before + product.few(x, [(out, w, bias)], normed)

    def adds(out: Tensor, *_args: Any) -> Tensor | None:
        return out if product.joins(out) else None

    takes, divides = (lambda _out, x, *_weights, say=say: say(x) for say in (product.takes, product.divides))
    return Site(device, spec, works, Shares(takes=takes, adds=adds, divides=divides))


def matmul_group(device: CudaDevice, spec: MatmulGroupSpec) -> Kernel:
    """Weights of one type share a launch; x is prepared once for all that take it the same way."""
    products = {part.type: Products(device, part) for part in spec.parts}
    n = len(spec.parts)

    def works(*args: Any, rounded: bool = False, normed: float | None = None) -> list[Work]:
        outs, x, weights, biases = args[:n], args[n], args[n + 1 : 2 * n + 1], args[2 * n + 1 :]
        parts = list(zip(outs, weights, biases, strict=True))
        if x.shape[0] > MOST_TOKENS:
            return _many_parts(products, x, parts)
        return _few_parts(products, x, parts, rounded or normed is not None, normed)

    def takes(*args: Any) -> Tensor | None:
        return next((x for product in products.values() if (x := product.takes(args[n])) is not None), None)

    def divides(*args: Any) -> Tensor | None:
        return next(iter(products.values())).divides(args[n])

    return Site(device, spec, works, Shares(takes=takes, divides=divides))


def _few_parts(
    products: dict[str, Products],
    x: Tensor,
    parts: Sequence[tuple[Tensor, Weight, Weight | None]],
    rounded: bool,
    normed: float | None,
) -> list[Work]:
    works: list[Work] = []
    for kind, product in products.items():
        same = [part for part in parts if part[1].type == kind]
        if kind not in NATIVE and not rounded:  # rounding is the same for all quantised types
            works += product.prepare(x)
            rounded = True
        for first in range(0, len(same), PARTS):
            works += product.few(x, same[first : first + PARTS], normed)
    return works


def _many_parts(
    products: dict[str, Products], x: Tensor, parts: Sequence[tuple[Tensor, Weight, Weight | None]]
) -> list[Work]:
    works: list[Work] = []
    converted: Plain | None = None
    for out, w, bias in parts:
        product = products[w.type]
        if w.kind != converted:
            works += product.convert(x, w.kind)
            converted = w.kind
        works += product.many(out.address, x, w) + product.finish(out, w.kind, bias)
    return works


def gate_up_swiglu(device: CudaDevice, spec: GateUpSwigluSpec) -> Kernel | None:
    """One kernel for both products and the activation. Declined where the two weights are of different types."""
    if (spec.gate.type, spec.gate.rows, spec.gate.cols) != (spec.up.type, spec.up.rows, spec.up.cols):
        return None
    product = Products(device, spec.gate)
    if spec.max_tokens > MOST_TOKENS:
        for name in ("gate", "up"):
            device.reserve(name, 4 * spec.max_tokens * spec.gate.rows)

    def works(
        out: Tensor,
        x: Tensor,
        gate: Weight,
        up: Weight,
        bias_gate: Weight | None,
        bias_up: Weight | None,
        *,
        rounded: bool = False,
        normed: float | None = None,
        rounds: bool = False,
    ) -> list[Work]:
        if x.shape[0] > MOST_TOKENS:
            return _many_gated(device, product, out, x, (gate, up), (bias_gate, bias_up))
        before = [] if rounded or normed is not None else product.prepare(x)
        return before + product.few_gated(out, x, (gate, up, bias_gate, bias_up), normed, rounds=rounds)

    def gives(out: Tensor, *_args: Any) -> Tensor | None:
        return out if product.joins(out) else None

    takes, divides = (lambda _out, x, *_weights, say=say: say(x) for say in (product.takes, product.divides))
    return Site(device, spec, works, Shares(gives=gives, takes=takes, divides=divides))


def _many_gated(
    device: CudaDevice,
    product: Products,
    out: Tensor,
    x: Tensor,
    weights: tuple[Weight, Weight],
    biases: tuple[Weight | None, Weight | None],
) -> list[Work]:
    """Each product into scratch memory of its own, then one kernel with scales, biases and the activation."""
    # a value beyond halves makes both products float32, so that they share x and its scales
    kind: Plain = "f32" if "f32" in (weights[0].kind, weights[1].kind) else weights[0].kind
    tokens, width = out.shape
    gate, up = (device.scratch(name).address for name in ("gate", "up"))
    works = product.convert(x, kind)
    for target, weight in zip((gate, up), weights, strict=True):
        works += product.many(target, x, weight if weight.kind == kind else _as(weight, kind))
    scales = device.scratch("x scales").address if kind == "f16" else 0
    launch = device.function(programs.program("rows"), "finish_gated", FLAT_THREADS)
    pointers = (out.address, gate, up, scales, _address(biases[0]), _address(biases[1]))
    return [*works, launch.work((blocks(width, FLAT_THREADS), tokens), *pointers, i32(width))]


def _as(weight: Weight, kind: Plain) -> Weight:
    return dataclasses.replace(weight, kind=kind)
