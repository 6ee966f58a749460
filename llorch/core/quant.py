"""GGUF block formats: their sizes and the values they stand for. The gguf package is the oracle for both."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from llorch.errors import UnsupportedModelError

FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})
# Every type that the gguf package can turn into float32.
DEQUANTIZABLE = frozenset({t.name for t in gguf.quants._type_traits} | {"F32", "F16"})


def row_bytes(type_name: str, cols: int) -> int:
    """Bytes of one row of `cols` elements."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    return cols // elements * size


def dequantize(data: npt.NDArray[np.uint8], type_name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """float32 values, of `shape`, of flat blocks. Raises UnsupportedModelError for a type nobody can expand."""
    if type_name not in DEQUANTIZABLE:
        known = ", ".join(sorted(DEQUANTIZABLE))
        raise UnsupportedModelError(f"weight type {type_name} cannot be expanded; convert the model to one of: {known}")
    rows = data.reshape(*shape[:-1], row_bytes(type_name, shape[-1]))
    values: npt.NDArray[Any] = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type_name])
    return values.reshape(shape)
