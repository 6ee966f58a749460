"""Sugar over llvmlite's builder: vector types, constants, loops, loads. `emitter.py` and `hosts.py` stand on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
BYTES = I8.as_pointer()


def vector(element: ir.Type, count: int) -> ir.VectorType:
    return ir.VectorType(element, count)


I8x64, I32x16, I8x16, F32x16, F16x16 = (
    vector(I8, 64), vector(I32, 16), vector(I8, 16), vector(F32, 16), vector(F16, 16),
)  # fmt: skip


def constant(kind: ir.Type, value: float) -> ir.Constant:
    """A number, or a vector of the same number."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)
    return ir.Constant(kind, value)


def intrinsic(b: ir.IRBuilder, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> ir.Function:
    found = b.module.globals.get(name)
    return found or ir.Function(b.module, ir.FunctionType(result, arguments), name)


def splat(b: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    kind = vector(value.type, count)
    undefined = ir.Constant(kind, ir.Undefined)
    one = b.insert_element(undefined, value, constant(I32, 0))
    return b.shuffle_vector(one, undefined, constant(vector(I32, count), 0))


def pieces(b: ir.IRBuilder, value: ir.Value, parts: int) -> list[ir.Value]:
    """A vector cut into equal parts."""
    size, undefined = value.type.count // parts, ir.Constant(value.type, ir.Undefined)
    masks = [[ir.Constant(I32, p * size + i) for i in range(size)] for p in range(parts)]
    return [b.shuffle_vector(value, undefined, ir.Constant(vector(I32, size), mask)) for mask in masks]


def join(b: ir.IRBuilder, parts: Sequence[ir.Value]) -> ir.Value:
    while len(parts) > 1:
        size = 2 * parts[0].type.count
        mask = ir.Constant(vector(I32, size), [ir.Constant(I32, i) for i in range(size)])
        parts = [b.shuffle_vector(parts[i], parts[i + 1], mask) for i in range(0, len(parts), 2)]
    return parts[0]


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z in one rounding, on every host: a result must not depend on the kernel that a tile size selects."""
    return b.call(intrinsic(b, "llvm.fma.v16f32", F32x16, [F32x16] * 3), [x, y, z])


def load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type, align: int = 1) -> ir.Value:
    """`address` is a pointer to bytes, as all addresses are."""
    found = b.load(b.bitcast(address, kind.as_pointer()))
    found.align = align
    return found


def at(b: ir.IRBuilder, address: ir.Value, offset: int | ir.Value) -> ir.Value:
    """`offset` bytes further. LLVM sees which pointers belong together, not which integers do: one register serves."""
    if isinstance(offset, int):
        offset = constant(I64, offset)
    return b.gep(address, [offset])


def scaled(b: ir.IRBuilder, index: ir.Value, size: int) -> ir.Value:
    return b.mul(index, constant(I64, size))


@contextmanager
def counted(b: ir.IRBuilder, count: ir.Value) -> Iterator[ir.Value]:
    """for index in range(count); the body may use allocas, which LLVM turns into registers."""
    place = b.alloca(I64)
    b.store(constant(I64, 0), place)
    head, body, end = (b.append_basic_block(name) for name in ("head", "body", "end"))
    b.branch(head)
    b.position_at_end(head)
    index = b.load(place)
    b.cbranch(b.icmp_signed("<", index, count), body, end)
    b.position_at_end(body)
    yield index
    b.store(b.add(index, constant(I64, 1)), place)
    b.branch(head)
    b.position_at_end(end)
