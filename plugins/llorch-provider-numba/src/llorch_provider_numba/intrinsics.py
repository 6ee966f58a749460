"""What Numba's Python lacks: memory at an address, float16, bit patterns, atomics, calls of compiled kernels."""

from __future__ import annotations

from functools import partial

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))

# no reference counts (arrays are views of memory at an address), no exceptions: nothing of Numba's is needed to run it
native = partial(njit, error_model="numpy", _nrt=False)
inlined = native(inline="always")


def _loader(kind, result):
    """A load from an address that need not be aligned."""

    @intrinsic
    def load(_typing, address):
        def codegen(_context, b, _signature, args):
            found = b.load(b.inttoptr(args[0], kind.as_pointer()))
            found.align = 1
            return found

        return result(types.int64), codegen

    return load


load_u8, load_u16 = _loader(I8, types.uint8), _loader(I16, types.uint16)
load_u32, load_i64 = _loader(I32, types.uint32), _loader(I64, types.int64)
load_i32, load_f64 = _loader(I32, types.int32), _loader(ir.DoubleType(), types.float64)


def _viewer(kind):
    """view(address, count): an array of memory that belongs to somebody else."""
    array_type = types.Array(kind, 1, "C")

    @intrinsic
    def view(_typing, address, count):
        def codegen(context, b, _signature, args):
            array = context.make_array(array_type)(context, b)
            size = context.get_constant(types.intp, kind.bitwidth // 8)
            arrayobj.populate_array(
                array, data=b.inttoptr(args[0], array.data.type), shape=[args[1]], strides=[size], itemsize=size,
                meminfo=None,
            )  # fmt: skip
            return array._getvalue()

        return array_type(types.int64, types.int64), codegen

    return view


floats, doubles, ints = _viewer(types.float32), _viewer(types.float64), _viewer(types.int32)
bytes_at, halves, words = _viewer(types.int8), _viewer(types.uint16), _viewer(types.uint32)


@intrinsic
def room_for_words(_typing):
    """The address of eight 32-bit words that live as long as the function's call."""

    def codegen(_context, b, _signature, _args):
        return b.ptrtoint(cgutils.alloca_once(b, I32, size=I32(8)), I64)

    return types.int64(), codegen


def _converter(convert, argument, result):
    @intrinsic
    def converted(_typing, value):
        def codegen(_context, b, _signature, args):
            return convert(b, args[0])

        return result(argument), codegen

    return converted


bits_of = _converter(lambda b, v: b.bitcast(v, I32), types.float32, types.int32)
float_of = _converter(lambda b, v: b.bitcast(v, ir.FloatType()), types.int32, types.float32)
half_of = _converter(lambda b, v: b.bitcast(b.fptrunc(v, ir.HalfType()), I16), types.float32, types.uint16)
float_of_half = _converter(
    lambda b, v: b.fpext(b.bitcast(v, ir.HalfType()), ir.FloatType()), types.uint16, types.float32
)


@intrinsic
def atomic_add(_typing, address, value):
    """Adds to an int64 in memory; returns what was there."""

    def codegen(_context, b, _signature, args):
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_swap(_typing, address, value):
    def codegen(_context, b, _signature, args):
        return b.atomic_rmw("xchg", b.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(_typing, address):
    def codegen(_context, b, _signature, args):
        return b.load_atomic(b.inttoptr(args[0], I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def pause(_typing):
    """Tells the core that a loop waits for another."""

    def codegen(context, b, _signature, _args):
        machine = b.module.triple.partition("-")[0]
        if machine == "x86_64":
            b.call(
                cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"), []
            )
        elif machine in ("aarch64", "arm64"):
            kind = ir.FunctionType(ir.VoidType(), [I32])
            b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.aarch64.hint"), [I32(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_yield(_typing, address):
    """Calls int f(void), the system's way to let another thread run."""

    def codegen(context, b, _signature, args):
        b.call(b.inttoptr(args[0], ir.FunctionType(I32, []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def call_product(_typing, kernel, w, group_bytes, groups, x, units, out, stride, rows, start, ahead):
    """Calls a kernel of emitter.py."""

    def codegen(context, b, _signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64] * 10)
        b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), codegen


@intrinsic
def call_softmax(_typing, kernel, scores, first, last, weights, largest, sums):
    """Calls a kernel of softmax.py."""

    def codegen(context, b, _signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64] * 6)
        b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen
