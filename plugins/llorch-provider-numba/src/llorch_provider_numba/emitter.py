"""Vector kernels for products, as LLVM IR: load, unpack, dot, scale.

A kernel computes the rows of `groups` groups side by side times `tokens` tokens of x, over all columns:

    kernel(w, group_bytes, groups, x, units, out, stride, rows, start, ahead)

w: address of the first group, the others group_bytes apart; where fewer than `groups` are left, the last is read again
and not stored. x: a tile of prepared activations (below). out[t * stride + row] is written for row < rows, or added to
where start is not 0. ahead: of plain weights, how far from each byte lies one that is read next; 0: in the same rows.
Weight types differ in `_unpack` and `_scale`, hosts in `Host.dot`.

A tile of x, for quantised weights: [blocks, tokens] records, of RECORD bytes on a host that rounds (32 int8, their
float32 scale, two corrections) or FLOAT_RECORD (32 float32, two corrections). A correction belongs to 32 columns (the
first) or to 16 (both): the sum of the segment, times the quants' offset, or in float32 and scaled where the type has
minima. For plain weights: [columns, tokens] float32.

Every result is computed by the same operations in the same order whatever groups and tokens are, so it does not
depend on the rows and tokens beside it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from llvmlite import ir

from llorch_provider_numba.formats import BLOCK, LANES, VECTOR, Format, PlainFormat
from llorch_provider_numba.hosts import Host
from llorch_provider_numba.ir_tools import (
    BYTES,
    F32,
    I1,
    I8,
    I32,
    I64,
    F16x16,
    F32x16,
    I8x16,
    I8x64,
    I32x16,
    at,
    constant,
    counted,
    fma,
    intrinsic,
    load,
    scaled,
    splat,
    vector,
)

RECORD, FLOAT_RECORD = BLOCK + 16, 4 * (BLOCK + 2)
SIGNATURE = ir.FunctionType(ir.VoidType(), [BYTES, I64, I64, BYTES, I64, BYTES, I64, I64, I64, I64])

# How far ahead of its reading memory is asked for, in bytes of each group: quantised and plain weights
ONE_TOKEN_AHEAD, TILE_AHEAD = (4096, 1024), (2048, 4096)
ONCE, AGAIN = 0, 3  # to LLVM, how long what was asked for is to stay: one token reads a weight once, tiles in turn


def record_bytes(form: Format | PlainFormat, host: Host) -> int:
    """Bytes of prepared x, for a token and a block (a column of plain weights)."""
    if isinstance(form, PlainFormat):
        return 4
    return RECORD if host.rounds else FLOAT_RECORD


def groups_for(form: Format | PlainFormat, host: Host, tokens: int) -> int:
    """Groups side by side: enough sums to keep a core's multipliers busy."""
    if isinstance(form, PlainFormat):
        return 4 if tokens == 1 else 2
    return host.groups[host.tiles.index(tokens)]


def kernel_name(form: Format | PlainFormat, tokens: int) -> str:
    return f"product_{form.type}_{tokens}"


def product_module(form: Format | PlainFormat, host: Host, triple: str) -> ir.Module:
    """The kernels of a weight type, one for each size of a tile."""
    module = ir.Module(name=f"{form.type}-{host.name}")
    module.triple = triple
    for tokens in host.tiles:
        _Kernel(module, form, host, tokens).emit()
    return module


@dataclass
class _Kernel:
    module: ir.Module
    form: Format | PlainFormat
    host: Host
    tokens: int

    def emit(self) -> None:
        function = ir.Function(self.module, SIGNATURE, kernel_name(self.form, self.tokens))
        self.b = b = ir.IRBuilder(function.append_basic_block("entry"))
        w, group_bytes, groups, self.x, units, out, stride, rows, start, ahead = function.args
        self.groups, self.record = groups_for(self.form, self.host, self.tokens), record_bytes(self.form, self.host)
        last = b.sub(groups, constant(I64, 1))
        self.w = []
        for g in range(self.groups):
            index = constant(I64, g)
            index = b.select(b.icmp_signed("<", index, last), index, last)
            self.w.append(at(b, w, b.mul(index, group_bytes)))
        places = self._places(out, stride, rows)
        plain = isinstance(self.form, PlainFormat)
        self.ahead = constant(I64, (ONE_TOKEN_AHEAD if self.tokens == 1 else TILE_AHEAD)[plain])
        if plain:
            self.ahead = b.select(b.icmp_signed("!=", ahead, constant(I64, 0)), ahead, self.ahead)
        self.acc = [[b.alloca(F32x16) for _ in range(self.tokens)] for _ in range(self.groups)]
        self._start(places, start)
        body = self._plain_unit if isinstance(self.form, PlainFormat) else self._unit
        with counted(b, units) as unit:
            body(unit)
        store = intrinsic(
            b, "llvm.masked.store.v16f32.p0", ir.VoidType(), [F32x16, F32x16.as_pointer(), I32, vector(I1, 16)]
        )
        for g in range(self.groups):
            for t in range(self.tokens):
                address, mask = places[g][t]
                b.call(store, [b.load(self.acc[g][t]), address, constant(I32, 4), mask])
        b.ret_void()

    def _places(self, out: ir.Value, stride: ir.Value, rows: ir.Value) -> list[list[tuple[ir.Value, ir.Value]]]:
        """Where each result goes, and which of its lanes are rows."""
        b, found = self.b, []
        lane = ir.Constant(I32x16, [ir.Constant(I32, i) for i in range(LANES)])
        for g in range(self.groups):
            left = b.trunc(b.sub(rows, constant(I64, g * LANES)), I32)
            mask = b.icmp_signed("<", lane, splat(b, left, 16))
            addresses = [
                at(b, at(b, out, scaled(b, b.mul(stride, constant(I64, t)), 4)), 4 * LANES * g)
                for t in range(self.tokens)
            ]
            found.append([(b.bitcast(address, F32x16.as_pointer()), mask) for address in addresses])
        return found

    def _start(self, places: list[list[tuple[ir.Value, ir.Value]]], start: ir.Value) -> None:
        """Sums begin at zero, or at what is in `out`."""
        b, zero = self.b, constant(F32x16, 0.0)
        read = intrinsic(b, "llvm.masked.load.v16f32.p0", F32x16, [F32x16.as_pointer(), I32, vector(I1, 16), F32x16])
        adds = splat(b, b.icmp_signed("!=", start, constant(I64, 0)), 16)
        for g in range(self.groups):
            for t in range(self.tokens):
                address, mask = places[g][t]
                b.store(b.call(read, [address, constant(I32, 4), b.and_(mask, adds), zero]), self.acc[g][t])

    def _add(self, g: int, t: int, x: ir.Value, y: ir.Value) -> None:
        place = self.acc[g][t]
        self.b.store(fma(self.b, x, y, self.b.load(place)), place)

    def _prefetch(self, address: ir.Value, lines: int) -> None:
        """Asks for what lies ahead, into the first-level cache: the hardware alone does not keep memory busy from a few
        cores, and a core that computes still waits for what is in the second level."""
        b, stay = self.b, ONCE if self.tokens == 1 else AGAIN
        fetch = intrinsic(b, "llvm.prefetch.p0", ir.VoidType(), [BYTES, I32, I32, I32])
        for line in range(lines):
            place = at(b, at(b, address, self.ahead), VECTOR * line)
            b.call(fetch, [place, constant(I32, 0), constant(I32, stay), constant(I32, 1)])

    # ---- plain weights ----

    def _plain_unit(self, unit: ir.Value) -> None:
        b, form = self.b, self.form
        offset = scaled(b, unit, form.unit_bytes)
        first = at(b, self.x, scaled(b, unit, form.unit * self.tokens * 4))
        for w in self.w:
            self._prefetch(at(b, w, offset), form.unit_bytes // VECTOR)
        for c in range(form.unit):
            for g in range(self.groups):
                values = self._floats(at(b, at(b, self.w[g], offset), c * LANES * form.width))
                for t in range(self.tokens):
                    x = load(b, at(b, first, 4 * (c * self.tokens + t)), F32, 4)
                    self._add(g, t, values, splat(b, x, 16))

    def _floats(self, address: ir.Value) -> ir.Value:
        b = self.b
        if self.form.type == "F32":
            return load(b, address, F32x16)
        if self.form.type == "F16":
            return b.fpext(load(b, address, F16x16), F32x16)
        bits = b.zext(load(b, address, vector(ir.IntType(16), 16)), I32x16)
        return b.bitcast(b.shl(bits, constant(I32x16, 16)), F32x16)

    # ---- quantised weights ----

    def _unit(self, unit: ir.Value) -> None:
        b, form = self.b, self.form
        bases = [at(b, w, scaled(b, unit, form.unit_bytes)) for w in self.w]
        x = at(b, self.x, scaled(b, unit, form.blocks * self.tokens * self.record))
        if not form.scales:  # two blocks: unrolled
            for block in range(form.blocks):
                self._block(bases, x, constant(I64, block), [None] * self.groups)
            return
        halves = [[self._half(base, i) for i in range(form.halves)] for base in bases]
        with counted(b, constant(I64, form.blocks)) as block:
            self._block(bases, x, block, halves)

    def _half(self, base: ir.Value, index: int) -> ir.Value:
        return self.b.fpext(load(self.b, at(self.b, base, 2 * LANES * index), F16x16, 2 * LANES), F32x16)

    def _block(self, bases: list[ir.Value], x: ir.Value, block: ir.Value, halves: list[list[ir.Value] | None]) -> None:
        """32 columns: for each segment, scale * x's scale * (quants . x), and the minimum times x's sum."""
        b, form = self.b, self.form
        x = at(b, x, scaled(b, block, self.tokens * self.record))
        per_segment, lines = form.segment // 4, -(-form.unit_bytes // VECTOR // form.blocks)  # a block's share
        step = self.tokens if form.segment == BLOCK else min(self.tokens, 4)  # more would wait for registers
        quants = []
        for base in bases:
            self._prefetch(at(b, base, scaled(b, block, VECTOR * lines)), lines)
            quants.append(self._unpack(at(b, at(b, base, form.blocks_at), scaled(b, block, form.bits * VECTOR))))
        for s in range(BLOCK // form.segment):
            scales = [self._scale(base, block, s, half) for base, half in zip(bases, halves, strict=True)]
            part = range(s * per_segment, (s + 1) * per_segment)
            for first in range(0, self.tokens, step):
                self._segment(x, s, part, quants, scales, range(first, first + step))

    def _segment(
        self,
        x: ir.Value,
        s: int,
        part: range,
        quants: list[list[ir.Value]],
        scales: list[tuple[ir.Value, ir.Value | None]],
        tokens: range,
    ) -> None:
        """Vector by vector for all tokens and groups: a sum waits for its last dot, others fill that time."""
        b, form, host = self.b, self.form, self.host
        element, zero = (I32, constant(I32x16, 0)) if host.rounds else (F32, constant(F32x16, 0.0))
        records = [at(b, x, t * self.record) for t in tokens]
        corrections = [at(b, record, (BLOCK + 4 if host.rounds else 4 * BLOCK) + 4 * s) for record in records]
        start = [splat(b, load(b, c, element, 4), 16) if host.offset(form) else zero for c in corrections]
        # whole numbers may be added in any order: a single sum in two parts has two dots at hand
        parts = 2 if self.tokens * self.groups == 1 and host.rounds else 1
        totals = [[[first, *[zero] * (parts - 1)] for first in start] for _ in range(self.groups)]
        for i, k in enumerate(part):
            for t, record in enumerate(records):
                four = host.four(b, record, k)
                for g in range(self.groups):
                    sums = totals[g][t]
                    sums[i % parts] = host.dot(b, sums[i % parts], quants[g][k], four, form.wide)
        for t, record in enumerate(records):
            x_scale = splat(b, load(b, at(b, record, BLOCK), F32, 4), 16) if host.rounds else None
            x_sum = splat(b, load(b, corrections[t], F32, 4), 16) if form.minima else None
            for g, (scale, minimum) in enumerate(scales):
                total = functools.reduce(b.add, totals[g][t])
                if host.rounds:
                    total, scale = b.sitofp(total, F32x16), b.fmul(scale, x_scale)
                self._add(g, tokens[t], total, scale)
                if minimum is not None:
                    self._add(g, tokens[t], minimum, x_sum)

    def _unpack(self, address: ir.Value) -> list[ir.Value]:
        """The eight vectors of a block's quants, gathered from its planes."""
        b, form = self.b, self.form
        values: list[ir.Value | None] = [None] * 8
        position = plane_at = 0
        for width in form.planes:
            packed = [load(b, at(b, address, VECTOR * (plane_at + v)), I8x64, VECTOR) for v in range(width)]
            for k in range(8):
                bits = _moved(b, packed[k % width], position - k // width * width)
                if width < 8:
                    bits = b.and_(bits, constant(I8x64, ((1 << width) - 1) << position))
                values[k] = bits if values[k] is None else b.or_(values[k], bits)
            position, plane_at = position + width, plane_at + width
        return [self._byte(value) for value in values]

    def _byte(self, value: ir.Value) -> ir.Value:
        """What a host multiplies: signed bytes may have to become unsigned."""
        b, form, unsigned = self.b, self.form, not self.host.signed_bytes
        if form.table is not None:
            table = tuple(v + 128 if unsigned else v for v in form.table)
            return self.host.lookup(b, tuple((v + 128) % 256 - 128 for v in table), value)
        if form.wide and unsigned:
            return b.xor(value, constant(I8x64, -128))
        return value

    def _scale(
        self, base: ir.Value, block: ir.Value, s: int, halves: list[ir.Value] | None
    ) -> tuple[ir.Value, ir.Value | None]:
        """Of a segment: the rows' scales, and their minima where the type has them."""
        b, form = self.b, self.form
        if halves is None:
            here = at(b, base, scaled(b, block, 2 * LANES * form.halves))
            return self._half(here, 0), self._half(here, 1) if form.minima else None
        index = b.add(scaled(b, block, BLOCK // form.segment), constant(I64, s))
        place = at(b, base, scaled(b, index, LANES))
        factors = load(b, at(b, place, form.scales_at), I8x16, LANES)
        scale = b.fmul(halves[0], b.sitofp(b.sext(factors, I32x16), F32x16))
        if not form.minima:
            return scale, None
        least = load(b, at(b, place, form.minima_at), I8x16, LANES)
        return scale, b.fmul(halves[1], b.sitofp(b.sext(least, I32x16), F32x16))


def _moved(b: ir.IRBuilder, value: ir.Value, left: int) -> ir.Value:
    """Each byte's bits moved left (or right); what comes from the byte beside is masked by the caller."""
    if left == 0:
        return value
    words = b.bitcast(value, I32x16)
    amount = constant(I32x16, abs(left))
    return b.bitcast(b.shl(words, amount) if left > 0 else b.lshr(words, amount), I8x64)


__all__ = ["FLOAT_RECORD", "I8", "RECORD", "groups_for", "kernel_name", "product_module", "record_bytes"]
