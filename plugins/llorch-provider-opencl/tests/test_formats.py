"""Repacking loses no bit: unpacked by the layout that weights.cl documents, blocks are worth what gguf says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from llorch_provider_opencl import formats
from llorch_provider_opencl.formats import FORMATS, ROWS_PER_GROUP, repacked

from llorch.providers import HostWeight
from llorch.providers.conformance.weights import random_weight, values_of

SHAPES = [(16, 256), (1, 256), (33, 512)]


def whole(weight: HostWeight) -> npt.NDArray[np.uint32]:
    """All words [groups, units, words, 16], from the slabs."""
    form = FORMATS[weight.type]
    packed = np.zeros(form.nbytes(weight.shape) // 4, np.uint32)
    for offset, slab in repacked(weight):
        packed[offset // 4 : offset // 4 + slab.size] = slab.reshape(-1)
    return packed.reshape(-1, form.units(weight.shape[1]), form.words, ROWS_PER_GROUP)


def fields(words: npt.NDArray[np.uint32], width: int, count: int) -> npt.NDArray[np.int64]:
    """[..., n] words -> [..., n * count] fields of `width` bits, lowest first."""
    shifts = np.arange(count, dtype=np.uint32) * np.uint32(width)
    found = (words[..., None] >> shifts) & np.uint32((1 << width) - 1)
    return found.reshape(*words.shape[:-1], -1).astype(np.int64)


def halves(unit: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """[words, 16] -> float16 [2 words, 16] as float64."""
    return unit.view(np.float16).reshape(-1, ROWS_PER_GROUP).astype(np.float64)


def high_bits(words: npt.NDArray[np.uint32], width: int) -> npt.NDArray[np.int64]:
    """[16, width] words -> [16, 32]: of column 8 w + k, they lie 4 bits above nibble k, wrapping round."""
    per_word, found = 4 // width, np.empty((ROWS_PER_GROUP, 32), np.int64)
    for column in range(32):
        word, nibble = column // 8, column % 8
        place = ((nibble + 1) % 8) * 4 + (word % per_word) * width
        found[:, column] = words[:, word // per_word] >> np.uint32(place) & np.uint32((1 << width) - 1)
    return found


def unpack_unit(kind: str, unit: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """[words, 16] -> values [16, columns]."""
    rows = np.ascontiguousarray(unit.T)
    if kind == "F32":
        return rows.view(np.float32).astype(np.float64)
    if kind == "F16":
        return halves(unit).T
    if kind == "Q8_0":
        return (fields(rows[:, 1:], 8, 4) - 128) * np.repeat(halves(unit[:1]), 32, axis=0).T
    if kind == "Q4_0":
        return (fields(rows[:, 1:], 4, 8) - 8) * np.repeat(halves(unit[:1]), 32, axis=0).T
    if kind == "Q6_K":
        blocks = rows[:, 5:].reshape(-1, 8, 6)
        quants = [fields(blocks[:, b, :4], 4, 8) + 16 * high_bits(blocks[:, b, 4:], 2) for b in range(8)]
        scales = (fields(rows[:, 1:5], 8, 4) - 128) * halves(unit[:1])[0][:, None]
        return (np.concatenate(quants, axis=1) - 32) * np.repeat(scales, 16, axis=1)
    words = {"Q4_K": 4, "Q5_K": 5}[kind]
    blocks = rows[:, 5:].reshape(-1, 8, words)
    quants = [fields(blocks[:, b, :4], 4, 8) for b in range(8)]
    if kind == "Q5_K":
        quants = [q + 16 * high_bits(blocks[:, b, 4:], 1) for b, q in enumerate(quants)]
    d, dmin = halves(unit[:1])
    scales, minima = fields(rows[:, 1:3], 8, 4) * d[:, None], fields(rows[:, 3:5], 8, 4) * dmin[:, None]
    return np.concatenate(quants, axis=1) * np.repeat(scales, 32, axis=1) - np.repeat(minima, 32, axis=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_unpacked_words_are_worth_what_gguf_says(kind: str, shape: tuple[int, int]) -> None:
    weight = random_weight(np.random.default_rng(1), kind, *shape, frozenset({"matmul"}))
    packed = whole(weight)
    values = np.stack([np.concatenate([unpack_unit(kind, unit) for unit in group], axis=1) for group in packed])
    values = values.reshape(-1, values.shape[-1])
    expected = values_of(weight)
    np.testing.assert_allclose(values[: shape[0], : shape[1]], expected, rtol=2e-7, atol=1e-6)
    assert not values[shape[0] :].any(), "padding rows are not zero"


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_columns_are_padded_with_zeros(kind: str) -> None:
    cols = 33 if kind in ("F32", "F16") else 96
    weight = random_weight(np.random.default_rng(2), kind, 5, cols, frozenset({"matmul"}))
    (group,) = whole(weight)
    values = np.concatenate([unpack_unit(kind, unit) for unit in group], axis=1)
    np.testing.assert_allclose(values[:5, :cols], values_of(weight), rtol=2e-7)
    assert not values[:, cols:].any()


@pytest.mark.parametrize("kind", FORMATS)
def test_slabs_give_what_one_piece_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(np.random.default_rng(3), kind, 100, 512, frozenset({"matmul"}))
    at_once = whole(weight)
    monkeypatch.setattr(formats, "SLAB_BYTES", 1)
    assert len(list(repacked(weight))) == 7
    np.testing.assert_array_equal(whole(weight), at_once)
