"""Every weight type that the gguf package dequantises, on every provider: the logits of the float32 twin.

Natively, or converted at load; what is converted is reported by type, tensors and bytes.
"""

from __future__ import annotations

import gguf
import numpy as np
import pytest

import llorch
from llorch.core.finite import first_not_finite
from llorch.core.quant import DEQUANTIZABLE, dequantize
from llorch.providers.conformance.models import TinyModel, write_model
from llorch.providers.conformance.rig import Rig
from tests.gguf_copy import rewrite
from tests.parity.test_llamacpp import QUANTISED_NMSE, TWIN_NMSE, assert_logits

TYPES = sorted(DEQUANTIZABLE)
PROMPT = [1, *np.random.default_rng(5).integers(3, 300, 20).tolist()]


def model(kind: str, seed: int = 7) -> TinyModel:
    return TinyModel(type=kind, layers=1, seed=seed)


def run(path, provider: str, rig: Rig) -> tuple[np.ndarray, list[str]]:
    exact = "f32" if "f32" in rig.device.cache_dtypes else None
    with llorch.load(path, provider=provider, cache_type=exact, parallel=1) as llm:
        return llm.logits(PROMPT), llm.start_lines


@pytest.mark.parametrize("kind", TYPES)
def test_logits_are_those_of_the_float32_twin(provider_name: str, rig: Rig, tmp_path, kind: str) -> None:
    path = write_model(model(kind), tmp_path / "model.gguf")
    found, lines = run(path, provider_name, rig)
    expected, _ = run(rewrite(path, tmp_path / "twin.gguf", dequantise=True), provider_name, rig)
    assert_logits(found, expected, TWIN_NMSE if rig.product_limit < TWIN_NMSE else QUANTISED_NMSE)
    other = write_model(model(kind, seed=8), tmp_path / "other.gguf")
    with pytest.raises(AssertionError, match="NMSE"):
        assert_logits(run(other, provider_name, rig)[0], expected, QUANTISED_NMSE)
    converted = [line for line in lines if line.startswith("weights converted")]
    taken = all(kind in types for use, types in rig.device.weight_types.items() if use != "vector")
    assert bool(converted) != taken
    if converted:
        elements = sum(t.n_elements for t in gguf.GGUFReader(path).tensors if t.tensor_type.name == kind)
        held = sum(t.n_bytes for t in gguf.GGUFReader(path).tensors if t.tensor_type.name == kind)
        width = 2 if f"from {kind} to F16" in converted[0] else 4
        assert f"9 tensors from {kind} to F{8 * width} ({width * elements - held:+,} bytes)" in converted[0]


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_that_are_no_numbers_are_found_where_dequantising_shows_them(kind: str) -> None:
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    elements = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    rng = np.random.default_rng(0)
    for _ in range(200):
        blocks = rng.integers(0, 256, (40, size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            wrong = ~np.isfinite(dequantize(blocks.reshape(-1), kind, (40, elements))).all(axis=1)
        found = first_not_finite(blocks.reshape(-1), kind)
        assert (None if found is None else found[0] // size) == (int(wrong.argmax()) if wrong.any() else None)
