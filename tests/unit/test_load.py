"""Loading a model: what is refused, and that a failure gives everything back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import llorch
from llorch.core.config import ModelConfig
from llorch.core.gguf import GGUFFile
from llorch.errors import (
    BindError,
    DeviceMemoryError,
    GGUFError,
    InvalidRequestError,
    LlorchError,
    SettingsError,
    TokenizerError,
    UnsupportedModelError,
)
from llorch.providers.conformance.models import TinyModel, write_model
from llorch.providers.numpy_cpu import NumpyDevice
from tests.gguf_copy import rewrite

TINY = TinyModel(layers=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_model(TINY, tmp_path_factory.mktemp("models") / "tiny.gguf")


def load(path: Path, **settings: Any) -> llorch.LLM:
    return llorch.load(path, provider="numpy-cpu", **settings)


BAD: dict[str, tuple[dict[str, Any], type[LlorchError], str]] = {
    "no block count": ({"fields": {"llama.block_count": None}}, GGUFError, "llama.block_count is missing"),
    "zero heads": ({"fields": {"llama.attention.head_count": 0}}, GGUFError, "is 0, expected 1 to 65536"),
    "heads that don't group": ({"fields": {"llama.attention.head_count_kv": 3}}, GGUFError, "not a multiple.*3"),
    "NaN eps": ({"fields": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, GGUFError, "is nan, expected"),
    "odd rotation": ({"fields": {"llama.rope.dimension_count": 63}}, GGUFError, "63, expected an even number"),
    "too many layers": ({"fields": {"llama.block_count": 2}}, GGUFError, r"blk\.1\.attn_norm\.weight is missing"),
    "a missing tensor": ({"drop": ["blk.0.ffn_up.weight"]}, GGUFError, "ffn_up.weight is missing: this is not a whole"),
    "another shape": (
        {"tensors": {"output_norm.weight": np.ones(128, np.float32)}}, GGUFError, r"has shape \(128,\).*\(256,\)"
    ),
    "experts": ({"fields": {"llama.expert_count": 8}}, UnsupportedModelError, "mixture of 8 experts"),
    "ntk": ({"fields": {"llama.rope.scaling.type": "ntk"}}, UnsupportedModelError, "'ntk': not supported; supported"),
    "longrope without factors": (
        {"fields": {"llama.rope.scaling.type": "longrope"}}, GGUFError, "rope_factors_long.weight is missing"
    ),
    "value length": ({"fields": {"llama.attention.value_length": 32}}, UnsupportedModelError, "32, key_length is 64"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_model_is_refused_with_the_field_and_both_numbers(tiny, tmp_path, case) -> None:
    changes, error, message = BAD[case]
    path = rewrite(tiny, tmp_path / "bad.gguf", **changes)
    with pytest.raises(error, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(str(path), "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="'mamba' is not supported; supported: llama"):
        load(path)


def test_a_vocabulary_of_another_size_than_the_embedding_is_refused(tiny, tmp_path) -> None:
    table = np.ones((TINY.vocab + 8, TINY.dim), np.float32)
    path = rewrite(tiny, tmp_path / "padded.gguf", tensors={"token_embd.weight": table, "output.weight": table})
    with pytest.raises(TokenizerError, match=r"has 300 tokens, token_embd\.weight 308 rows"):
        load(path)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"context": 10**6}, SettingsError, "context 1000000 is outside 2 to 256"),
        ({"parallel": 0}, SettingsError, "parallel is 0"),
        ({"cache_type": "q8_0"}, SettingsError, "'q8_0' is not offered by provider numpy-cpu; it offers f32, f16"),
        ({"device": "cuda:7"}, LlorchError, "no device 'cuda:7', only 'cpu'"),
    ],
)
def test_bad_settings_are_refused(tiny, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        load(tiny, **settings)


def test_a_failed_load_closes_the_device(tiny, monkeypatch) -> None:
    closed = []
    monkeypatch.setattr(NumpyDevice, "close", lambda self: closed.append(self))
    monkeypatch.setattr(NumpyDevice, "kv_cache", lambda _self, _spec: (_ for _ in ()).throw(DeviceMemoryError("full")))
    with pytest.raises(DeviceMemoryError):
        load(tiny)
    assert len(closed) == 1


def test_linear_scaling_and_its_older_name_divide_positions(tiny, tmp_path) -> None:
    with GGUFFile.open(tiny) as file:
        plain = ModelConfig.from_gguf(file)
    new = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    for i, fields in enumerate((new, {"llama.rope.scale_linear": 4.0})):
        with GGUFFile.open(rewrite(tiny, tmp_path / f"{i}.gguf", fields=fields)) as file:
            scaled = ModelConfig.from_gguf(file)
        assert scaled == replace(plain, rope_scaling=replace(plain.rope_scaling, factor=4.0))
        np.testing.assert_allclose(np.array(scaled.rope_frequencies()) * 4, plain.rope_frequencies())


def test_rope_factors_divide_the_frequencies(tiny) -> None:
    with GGUFFile.open(tiny) as file:
        config = ModelConfig.from_gguf(file)
    factors = np.linspace(1, 8, config.rope_dim // 2).astype(np.float32)
    plain, slowed = config.rope_frequencies(), config.rope_frequencies(factors)
    np.testing.assert_allclose(np.array(slowed) * factors, plain)
    assert plain[0] == 1.0


# ---- looking inside ----


def test_checkpoints_refuse_what_they_have_not(tiny) -> None:
    with load(tiny) as llm:
        with pytest.raises(InvalidRequestError, match=r"no label 'blk\.9\.out'; it has: .*blk\.0\.out"):
            llm.checkpoints([1, 2], ["blk.9.out"])
        with pytest.raises(InvalidRequestError, match="0 tokens given, 1 to 64 fit"):
            llm.checkpoints([], ["output"])


def test_checkpoints_have_every_label_of_the_graph(tiny) -> None:
    with load(tiny) as llm:
        names = (
            "attn_norm attn_q attn_k attn_v q_rope k_rope attention attn_output attn_residual ffn_norm ffn_gate ffn_up"
        )
        labels = [f"blk.0.{name}" for name in [*names.split(), "ffn_swiglu", "ffn_down", "out"]]
        labels += ["token_embd", "output_rows", "output_norm", "output"]
        found = llm.checkpoints([1, 5, 9], labels)
        assert set(found) == set(labels)
        assert {label: array.shape[0] for label, array in found.items()} == dict.fromkeys(labels, 3)
        np.testing.assert_array_equal(found["output"], llm.logits([1, 5, 9]))


def test_logits_need_a_prompt_that_fits(tiny) -> None:
    with load(tiny, context=16) as llm:
        with pytest.raises(InvalidRequestError, match="no tokens"):
            llm.logits([])
        with pytest.raises(LlorchError, match="17 tokens are more than the context of 16"):
            llm.logits([1] * 17)
        assert llm.logits([1] * 16).shape == (16, TINY.vocab)


def test_a_device_without_a_type_to_convert_to_is_an_error(tiny, monkeypatch) -> None:
    monkeypatch.setattr(NumpyDevice, "weight_types", dict.fromkeys(("embed", "matmul", "vector"), frozenset({"Q8_0"})))
    with pytest.raises(BindError, match="neither F16 nor F32 to convert it to"):
        load(tiny)
