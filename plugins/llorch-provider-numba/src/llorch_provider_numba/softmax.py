"""The softmax of a segment of attention, as LLVM IR: from rows of scores to weights in the layout that products take.

    kernel(scores, first, last, weights, largest, sums)

scores: rows of SEGMENT float32, as many rows as the kernel's tile has. Vectors first to last - 1 of 16 scores are read;
weights, a tile [SEGMENT, rows], gets exp(score - the row's largest), and zeros where a row sees nothing. A row sees
columns low <= column < high, which come as int32 where its results go: `largest` [rows] and `sums` [rows].

A row's result is made by the same operations whatever rows are beside it. Exponential: the polynomial of Cephes' expf
(Moshier).
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from llorch_provider_numba.formats import LANES, SEGMENT
from llorch_provider_numba.ir_tools import (
    BYTES,
    F32,
    I32,
    I64,
    F32x16,
    I32x16,
    at,
    constant,
    counted,
    fma,
    load,
    pieces,
    scaled,
    splat,
)

SIGNATURE = ir.FunctionType(ir.VoidType(), [BYTES, I64, I64, BYTES, BYTES, BYTES])

LOG2E, LN2_HIGH, LN2_LOW, LOWEST = 1.44269504, 0.693359375, -2.12194440e-4, -87.0
POLYNOMIAL = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
)  # fmt: skip
MAGIC, MAGIC_BITS = 12582912.0, 0x4B400000  # 1.5 * 2^23: adding it rounds to a whole number


def kernel_name(rows: int) -> str:
    return f"softmax_{rows}"


def softmax_module(tiles: tuple[int, ...], triple: str) -> ir.Module:
    """The kernels for tiles of these numbers of rows."""
    made = ir.Module(name="softmax")
    made.triple = triple
    for rows in tiles:
        _emit(ir.Function(made, SIGNATURE, kernel_name(rows)), rows)
    return made


def _emit(function: ir.Function, rows: int) -> None:
    b = ir.IRBuilder(function.append_basic_block("entry"))
    scores, first, last, weights, largest, sums = function.args
    low = [splat(b, load(b, at(b, largest, 4 * r), I32, 4), LANES) for r in range(rows)]
    high = [splat(b, load(b, at(b, sums, 4 * r), I32, 4), LANES) for r in range(rows)]
    most = [b.alloca(F32x16) for _ in range(rows)]
    total = [b.alloca(F32x16) for _ in range(rows)]
    nothing, zero = constant(F32x16, float("-inf")), constant(F32x16, 0.0)
    for r in range(rows):
        b.store(nothing, most[r])
        b.store(zero, total[r])

    def seen(index: ir.Value, r: int, otherwise: ir.Value) -> tuple[ir.Value, ir.Value]:
        """A row's 16 scores, and which of them count."""
        column = b.add(splat(b, b.trunc(scaled(b, index, LANES), I32), LANES), _LANE)
        mask = b.and_(b.icmp_signed(">=", column, low[r]), b.icmp_signed("<", column, high[r]))
        found = load(b, at(b, at(b, scores, scaled(b, index, 4 * LANES)), 4 * SEGMENT * r), F32x16, 4)
        return b.select(mask, found, otherwise), mask

    vectors = b.sub(last, first)
    with counted(b, vectors) as i:
        for r in range(rows):
            found, _ = seen(b.add(first, i), r, nothing)
            b.store(_larger(b, found, b.load(most[r])), most[r])
    peaks = [_folded(b, b.load(most[r]), _larger) for r in range(rows)]
    with counted(b, vectors) as i:
        index = b.add(first, i)
        columns = []
        for r in range(rows):
            found, mask = seen(index, r, zero)
            weight = b.select(mask, exponential(b, b.fsub(found, splat(b, peaks[r], LANES))), zero)
            b.store(b.fadd(b.load(total[r]), weight), total[r])
            columns.append(weight)
        for j, value in enumerate(_interleaved(b, columns)):
            place = at(b, at(b, weights, scaled(b, index, 4 * LANES * rows)), 4 * LANES * j)
            b.store(value, b.bitcast(place, F32x16.as_pointer()), align=4)
    for r in range(rows):
        total_of_row = _folded(b, b.load(total[r]), ir.IRBuilder.fadd)
        b.store(peaks[r], b.bitcast(at(b, largest, 4 * r), F32.as_pointer()), align=4)
        b.store(total_of_row, b.bitcast(at(b, sums, 4 * r), F32.as_pointer()), align=4)
    b.ret_void()


_LANE = ir.Constant(I32x16, [ir.Constant(I32, i) for i in range(LANES)])


def exponential(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x within 2e-7 for x <= 0; x is cut to -87."""
    x = _larger(b, x, constant(F32x16, LOWEST))
    shifted = fma(b, x, constant(F32x16, LOG2E), constant(F32x16, MAGIC))
    n = b.fsub(shifted, constant(F32x16, MAGIC))
    r = fma(b, n, constant(F32x16, -LN2_HIGH), x)
    r = fma(b, n, constant(F32x16, -LN2_LOW), r)
    p = constant(F32x16, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        p = fma(b, p, r, constant(F32x16, coefficient))
    value = b.fadd(fma(b, p, b.fmul(r, r), r), constant(F32x16, 1.0))
    exponent = b.add(b.sub(b.bitcast(shifted, I32x16), constant(I32x16, MAGIC_BITS)), constant(I32x16, 127))
    return b.fmul(value, b.bitcast(b.shl(exponent, constant(I32x16, 23)), F32x16))


def _larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _folded(b: ir.IRBuilder, value: ir.Value, combine: Callable[..., ir.Value]) -> ir.Value:
    """All lanes into one, by halves."""
    while value.type.count > 1:
        x, y = pieces(b, value, 2)
        value = combine(b, x, y)
    return b.extract_element(value, constant(I32, 0))


def _interleaved(b: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """16 columns of each row, as all rows' first column, then all rows' second."""
    sequences = [[row] for row in rows]
    while len(sequences) > 1:  # rows r and r + half come together, element by element
        half = len(sequences) // 2
        pairs = [zip(sequences[r], sequences[r + half], strict=True) for r in range(half)]
        sequences = [[part for x, y in pair for part in _zipped(b, x, y)] for pair in pairs]
    return sequences[0]


def _zipped(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> list[ir.Value]:
    masks = [[i // 2 + LANES * (i % 2) for i in range(start, start + LANES)] for start in (0, LANES)]
    return [b.shuffle_vector(x, y, ir.Constant(I32x16, [ir.Constant(I32, i) for i in mask])) for mask in masks]
