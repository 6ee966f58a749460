"""Random weights of any GGML type, without a table of where each type keeps its scales."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import numpy.typing as npt

from llorch.providers.device import HostWeight
from llorch.providers.spec import Use

DISTINCT = 1 << 16  # blocks
DISTINCT_ROWS = 61  # of a tall weight
SMALLEST, LARGEST = 0.05, 4.0  # of a block's largest value: scales vary, and no block drowns the others


def random_blocks(rng: np.random.Generator, type_name: str, rows: int, cols: int) -> npt.NDArray[np.uint8]:
    """Flat raw blocks whose every bit is random but for what makes a block's values senseless (those are redrawn).

    Those of a large matrix repeat after DISTINCT.
    """
    kind = gguf.GGMLQuantizationType[type_name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    if type_name in ("F32", "F16", "BF16"):
        return _plain(rng, type_name, rows * cols)
    needed = rows * (cols // elements)
    wanted, kept, found = min(needed, DISTINCT), [], 0
    while found < wanted:
        blocks = rng.integers(0, 256, (max(64, 4 * (wanted - found)), size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            peak = np.abs(gguf.quants.dequantize(blocks, kind)).max(axis=1)
            sensible = blocks[(peak >= SMALLEST) & (peak <= LARGEST)]
        kept.append(sensible)
        found += len(sensible)
    return np.resize(np.concatenate(kept)[:wanted], (needed, size)).reshape(-1)


def _plain(rng: np.random.Generator, type_name: str, count: int) -> npt.NDArray[np.uint8]:
    values = rng.standard_normal(count, dtype=np.float32)
    if type_name == "F32":
        return values.view(np.uint8)
    if type_name == "F16":
        return values.astype(np.float16).view(np.uint8)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def random_weight(
    rng: np.random.Generator, type_name: str, rows: int, cols: int, uses: frozenset[Use], name: str = "w"
) -> HostWeight:
    return HostWeight(
        name=name, shape=(rows, cols), type=type_name, data=random_blocks(rng, type_name, rows, cols), uses=uses
    )


def repeated_weight(
    rng: np.random.Generator, type_name: str, rows: int, cols: int, uses: frozenset[Use]
) -> tuple[HostWeight, npt.NDArray[np.float64]]:
    """A tall weight, cheaply: row i is row i % len(values) of the values, which are returned beside it.

    Their number is odd, so that a row whose number was cut to fewer bits is another one.
    """
    few = random_weight(rng, type_name, min(rows, DISTINCT_ROWS), cols, uses)
    data = np.resize(few.data.reshape(few.shape[0], -1), (rows, few.nbytes // few.shape[0]))
    return replace(few, shape=(rows, cols), data=data.reshape(-1)), values_of(few)


def values_of(weight: HostWeight) -> npt.NDArray[np.float64]:
    """What a weight stands for, by the gguf package."""
    kind = gguf.GGMLQuantizationType[weight.type]
    blocks = weight.data.reshape(*weight.shape[:-1], -1)
    values: npt.NDArray[np.float32] = gguf.quants.dequantize(blocks, kind)
    return values.reshape(weight.shape).astype(np.float64)


def vector(name: str, values: npt.NDArray[np.float32]) -> HostWeight:
    """A norm's weight or a bias."""
    data = np.ascontiguousarray(values, np.float32).view(np.uint8)
    return HostWeight(name=name, shape=values.shape, type="F32", data=data, uses=frozenset({"vector"}))
