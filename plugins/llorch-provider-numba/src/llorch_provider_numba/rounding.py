"""32 activations as int8 with one scale, in vectors: what LLVM does not make of a loop by itself."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from llorch_provider_numba.ir_tools import BYTES, F32, I8, I32, constant, load, pieces, splat, vector
from llorch_provider_numba.ir_tools import intrinsic as llvm_intrinsic

COUNT = 32
F32s, I32s, I8s = (vector(kind, COUNT) for kind in (F32, I32, I8))
MAGNITUDE = 0x7FFFFFFF
MAGIC, MAGIC_BITS = 12582912.0, 0x4B400000  # 1.5 * 2^23: adding it rounds to a whole number, to even where between two


@intrinsic
def round_block(_typing, x, to):
    """Writes 32 int8 at address `to`, of the 32 float32 at address x; the largest magnitude becomes 127.

    Returns the sums of the first and of the last 16, and the scale.
    """

    def codegen(context, b, signature, args):
        address, to = args
        values = load(b, b.inttoptr(address, BYTES), F32s, 4)
        magnitudes = b.and_(b.bitcast(values, I32s), constant(I32s, MAGNITUDE))  # integers, which order as they do
        most = b.bitcast(_reduced(b, "umax", magnitudes), F32)
        some = b.fcmp_ordered(">", most, constant(F32, 0.0))
        inverse = b.select(some, b.fdiv(constant(F32, 127.0), most), constant(F32, 0.0))
        shifted = b.fadd(b.fmul(values, splat(b, inverse, COUNT)), constant(F32s, MAGIC))
        quants = b.sub(b.bitcast(shifted, I32s), constant(I32s, MAGIC_BITS))
        stored = b.store(b.trunc(quants, I8s), b.inttoptr(to, I8s.as_pointer()))
        stored.align = 4
        low, high = (_reduced(b, "add", half) for half in pieces(b, quants, 2))
        return context.make_tuple(b, signature.return_type, [low, high, b.fdiv(most, constant(F32, 127.0))])

    return types.Tuple((types.int32, types.int32, types.float32))(types.int64, types.int64), codegen


def _reduced(b: ir.IRBuilder, how: str, values: ir.Value) -> ir.Value:
    name = f"llvm.vector.reduce.{how}.v{values.type.count}i32"
    return b.call(llvm_intrinsic(b, name, I32, [values.type]), [values])
