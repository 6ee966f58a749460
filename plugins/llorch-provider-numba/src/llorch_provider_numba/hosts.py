"""The instruction sets that products are made for. A host says how four columns of 16 rows are multiplied and added.

`LLORCH_NUMBA_ISA` forces one of HOSTS; otherwise the first that the CPU has is taken.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from llorch.providers import ProviderUnavailableError
from llorch_provider_numba.formats import Format
from llorch_provider_numba.ir_tools import (
    F32,
    I8,
    I16,
    I32,
    F32x16,
    I8x64,
    I32x16,
    at,
    constant,
    fma,
    intrinsic,
    join,
    load,
    pieces,
    splat,
    vector,
)

VARIABLE = "LLORCH_NUMBA_ISA"

Dot = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value, bool], ir.Value]


@dataclass(frozen=True)
class Host:
    """`dot(b, total, quants, x, wide)` adds, in each of 16 lanes, the products of four bytes of quants with four of x.

    `wide` quants take the whole byte, others are 0 to 63. A host that multiplies float32 (`rounds` is False) leaves x
    as it is.
    """

    name: str
    triple: str  # architecture that it belongs to; "" for any
    needs: tuple[str, ...]  # LLVM's names of CPU features
    cpu: str  # what LLVM compiles for: "" the CPU it runs on
    features: str
    dot: Dot
    signed_bytes: bool  # whether quants of 8 bits may be negative; else they come 128 larger
    lookup: Callable[[ir.IRBuilder, tuple[int, ...], ir.Value], ir.Value]
    tiles: tuple[int, ...] = (4, 2, 1)  # tokens whose sums fit in registers, largest first
    # groups of rows that each takes side by side, of quantised weights; one token takes a single one, whose bytes are
    # then read in a row, as memory likes best
    groups: tuple[int, ...] = (1, 2, 1)
    rounds: bool = True

    def four(self, b: ir.IRBuilder, x: ir.Value, k: int) -> ir.Value:
        """What `dot` takes of x: columns 4 k to 4 k + 3 of the record at address x."""
        return load(b, at(b, x, 4 * k), I32, 4) if self.rounds else b.bitcast(at(b, x, 16 * k), F32.as_pointer())

    def offset(self, form: Format) -> int:
        """What is to be added to every quant: the format's own, or that of bytes which had to become unsigned."""
        return -128 if form.wide and not self.signed_bytes else form.offset


# ---- dot products ----


def _vnni512(b: ir.IRBuilder, total: ir.Value, quants: ir.Value, x: ir.Value, wide: bool) -> ir.Value:
    dot = intrinsic(b, "llvm.x86.avx512.vpdpbusd.512", I32x16, [I32x16, I8x64, I8x64])
    return b.call(dot, [total, quants, b.bitcast(splat(b, x, 16), I8x64)])


def _vnni256(b: ir.IRBuilder, total: ir.Value, quants: ir.Value, x: ir.Value, wide: bool) -> ir.Value:
    i32x8, i8x32 = vector(I32, 8), vector(I8, 32)
    dot = intrinsic(b, "llvm.x86.avx512.vpdpbusd.256", i32x8, [i32x8, i8x32, i8x32])
    xs = b.bitcast(splat(b, x, 8), i8x32)
    parts = zip(pieces(b, total, 2), pieces(b, quants, 2), strict=True)
    return join(b, [b.call(dot, [t, q, xs]) for t, q in parts])


def _avx2(b: ir.IRBuilder, total: ir.Value, quants: ir.Value, x: ir.Value, wide: bool) -> ir.Value:
    """vpmaddubsw adds pairs in 16 bits, saturating: |q| * x of signed bytes stays below 2 * 128 * 127 < 2^15."""
    i32x8, i8x32, i16x16 = vector(I32, 8), vector(I8, 32), vector(I16, 16)
    pairs = intrinsic(b, "llvm.x86.avx2.pmadd.ub.sw", i16x16, [i8x32, i8x32])
    fours = intrinsic(b, "llvm.x86.avx2.pmadd.wd", i32x8, [i16x16, i16x16])
    sign = intrinsic(b, "llvm.x86.avx2.psign.b", i8x32, [i8x32, i8x32])
    xs, sums = b.bitcast(splat(b, x, 8), i8x32), []
    for t, q in zip(pieces(b, total, 2), pieces(b, quants, 2), strict=True):
        magnitude, signed = (b.call(sign, [q, q]), b.call(sign, [xs, q])) if wide else (q, xs)
        pair = b.call(pairs, [magnitude, signed])
        sums.append(b.add(t, b.call(fours, [pair, constant(i16x16, 1)])))
    return join(b, sums)


def _neon(b: ir.IRBuilder, total: ir.Value, quants: ir.Value, x: ir.Value, wide: bool) -> ir.Value:
    i32x4, i8x16 = vector(I32, 4), vector(I8, 16)
    dot = intrinsic(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", i32x4, [i32x4, i8x16, i8x16])
    xs = b.bitcast(splat(b, x, 4), i8x16)
    parts = zip(pieces(b, total, 4), pieces(b, quants, 4), strict=True)
    return join(b, [b.call(dot, [t, q, xs]) for t, q in parts])


def _float(b: ir.IRBuilder, total: ir.Value, quants: ir.Value, x: ir.Value, wide: bool) -> ir.Value:
    """x is a pointer to four float32 here; a quant is a signed byte."""
    words = b.bitcast(quants, I32x16)
    for j in range(4):
        byte = b.ashr(b.shl(words, constant(I32x16, 24 - 8 * j)), constant(I32x16, 24))
        each = b.load(b.gep(x, [ir.Constant(I32, j)]))
        total = fma(b, b.sitofp(byte, F32x16), splat(b, each, 16), total)
    return total


# ---- lookups of 16 values ----


def _shuffled(name: str, parts: int) -> Callable[[ir.IRBuilder, tuple[int, ...], ir.Value], ir.Value]:
    """With the instruction that takes bytes of one vector as places in another of 16 bytes."""

    def lookup(b: ir.IRBuilder, table: tuple[int, ...], index: ir.Value) -> ir.Value:
        size = vector(I8, 64 // parts)
        values = ir.Constant(size, [ir.Constant(I8, v) for v in table * (size.count // 16)])
        shuffle = intrinsic(b, name, size, [size, size])
        return join(b, [b.call(shuffle, [values, part]) for part in pieces(b, index, parts)])

    return lookup


def _selected(b: ir.IRBuilder, table: tuple[int, ...], index: ir.Value) -> ir.Value:
    """A tree of choices by the index's bits, which any host has."""
    values = [constant(I8x64, v) for v in table]
    for bit in range(4):
        chosen = b.icmp_unsigned("!=", b.and_(index, constant(I8x64, 1 << bit)), constant(I8x64, 0))
        values = [b.select(chosen, values[i + 1], values[i]) for i in range(0, len(values), 2)]
    return values[0]


HOSTS = {
    h.name: h
    for h in (
        Host(
            "avx512-vnni", "x86_64", ("avx512vnni", "avx512bw", "avx512vl"), "", "", _vnni512, False,
            _shuffled("llvm.x86.avx512.pshuf.b.512", 1), (8, 4, 2, 1), (2, 2, 4, 1),
        ),
        Host(
            "avx-vnni", "x86_64", ("avxvnni",), "x86-64-v3", "+avxvnni", _vnni256, False,
            _shuffled("llvm.x86.avx2.pshuf.b", 2),
        ),
        Host(
            "avx2", "x86_64", ("avx2", "fma", "f16c"), "x86-64-v3", "", _avx2, True,
            _shuffled("llvm.x86.avx2.pshuf.b", 2),
        ),
        Host(
            "neon", "aarch64", ("dotprod",), "", "+dotprod", _neon, True,
            _shuffled("llvm.aarch64.neon.tbl1.v16i8", 4),
        ),
        Host("float", "", (), "", "", _float, True, _selected, rounds=False),
    )
}  # fmt: skip


@functools.cache
def cpu_features() -> frozenset[str]:
    """LLVM's names of what this CPU has."""
    import llvmlite.binding as llvm

    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


def usable() -> list[str]:
    """The hosts that this machine can run, best first."""
    import llvmlite.binding as llvm

    machine = llvm.get_process_triple().partition("-")[0].replace("arm64", "aarch64")
    return [h.name for h in HOSTS.values() if h.triple in ("", machine) and set(h.needs) <= cpu_features()]


def choose() -> Host:
    """Raises ProviderUnavailableError where LLORCH_NUMBA_ISA asks for what this machine has not."""
    names = usable()
    name = os.environ.get(VARIABLE) or names[0]
    if name not in names:
        why = "this CPU lacks it" if name in HOSTS else f"there is no such path, only {', '.join(HOSTS)}"
        raise ProviderUnavailableError(f"{VARIABLE}={name}: {why}; unset it, or take one of {', '.join(names)}")
    return HOSTS[name]
