"""Whether weights are numbers: one NaN or infinity in a file turns every answer into noise, and says nothing of itself.

Of quantised blocks only the scales can be anything else, so a file is checked at about the speed it is read.
Block formats: ggml's `ggml-common.h`.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

SLAB_BYTES = 1 << 22
# type -> offsets of the float16 scales in a block
_SCALES: dict[str, tuple[int, ...]] = {
    "F16": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}
_FINITE = "NVFP4"  # whatever its bits
_LARGE = 250  # exponents of MXFP4's blocks below are finite times any of its values


def first_not_finite(data: npt.NDArray[np.uint8], type_name: str) -> tuple[int, float] | None:
    """The byte at which the first block (or plain number) with a NaN or an infinity begins, and that value."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    if type_name == _FINITE:
        return None
    blocks = data.reshape(-1, size)
    step = max(1, SLAB_BYTES // size)
    for start in range(0, len(blocks), step):
        wrong = _wrong(blocks[start : start + step], type_name)
        if wrong.any():
            index = start + int(wrong.argmax())
            values = _values(blocks[index : index + 1], type_name)
            return index * size, float(values[~np.isfinite(values)][0])
    return None


def _wrong(blocks: npt.NDArray[np.uint8], type_name: str) -> npt.NDArray[np.bool_]:
    """Blocks [n, bytes] with a scale that is no number, [n]."""
    if type_name in _SCALES:
        words = blocks.view("<u2")
        scales = words[:, [offset // 2 for offset in _SCALES[type_name]]]
        found: npt.NDArray[np.bool_] = np.logical_or.reduce(_all_ones(scales, _EXPONENT["F16"]), axis=1)
        return found
    if type_name in _EXPONENT:
        words = blocks.view("<u4" if type_name == "F32" else "<u2")
        return _all_ones(words, _EXPONENT[type_name])[:, 0]
    if type_name == "IQ1_M":  # the scale's four nibbles are the highest of four words
        words = blocks[:, 48:].view("<u2")
        both: npt.NDArray[np.bool_] = _all_ones(words[:, 3], 0x7000) & _all_ones(words[:, 2], 0xC000)
        return both
    if type_name == "MXFP4":
        large: npt.NDArray[np.bool_] = np.greater_equal(blocks[:, 0], _LARGE)
        large[large] = ~np.isfinite(_values(blocks[large], type_name)).all(axis=-1)
        return large
    finite: npt.NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(_values(blocks, type_name)), axis=-1)
    return ~finite


def _all_ones(words: npt.NDArray[Any], mask: int) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = (words & words.dtype.type(mask)) == mask
    return found


def _values(blocks: npt.NDArray[np.uint8], type_name: str) -> npt.NDArray[np.float32]:
    with np.errstate(all="ignore"):
        values: npt.NDArray[np.float32] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type_name])
    return values
