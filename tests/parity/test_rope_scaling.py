"""Every kind of RoPE scaling against llama.cpp, and sliding windows against the oracle, on every provider.

Prompts reach past the original context, and both sides of it are compared on their own. Each comparison is run again on
a model whose metadata or factors say something else, and must fail there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llorch
from llorch.providers.conformance.models import OracleModel, TinyModel, write_model
from llorch.providers.conformance.rig import Rig
from tests.gguf_copy import rewrite
from tests.parity.llamacpp import LlamaCpp
from tests.parity.test_llamacpp import QUANTISED_NMSE, TWIN_NMSE, assert_logits

ORIGINAL, CONTEXT = 64, 256  # the context of before, and the one it was stretched to
MODEL = TinyModel(context=CONTEXT, seed=11)
PAIRS = MODEL.head_dim // 2
PROMPT = [1, *np.random.default_rng(3).integers(3, MODEL.vocab, 191).tolist()]
BEFORE, BEHIND = slice(0, ORIGINAL), slice(ORIGINAL, len(PROMPT))


@dataclass(frozen=True)
class Scaled:
    """Metadata behind `llama.`, and factor tensors."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)

    def but(self, **changes: Any) -> Scaled:
        """With other metadata; `__` stands for a dot."""
        return replace(self, fields={**self.fields, **{k.replace("__", "."): v for k, v in changes.items()}})


def rope(kind: str, **fields: Any) -> Scaled:
    named = {f"rope.scaling.{name}": value for name, value in fields.items()}
    return Scaled({"rope.scaling.type": kind, **named})


SHORT, LONG = np.linspace(1, 1.5, PAIRS, dtype=np.float32), np.linspace(1, 8, PAIRS, dtype=np.float32)
LONGROPE = replace(
    rope("longrope", original_context_length=ORIGINAL, attn_factor=1.19),
    tensors={"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
)
YARN = rope("yarn", factor=4.0, original_context_length=ORIGINAL)
CASES = {
    "none, though a factor is there": rope("none", factor=4.0),
    "linear": rope("linear", factor=4.0),
    "linear by its older name": Scaled({"rope.scale_linear": 2.5}),
    "llama 3": replace(Scaled({}), tensors={"rope_freqs.weight": LONG}),
    "llama 3, scaled": replace(rope("linear", factor=2.0), tensors={"rope_freqs.weight": LONG}),
    "yarn": YARN,
    "yarn, the factor below 1": YARN.but(rope__scaling__factor=0.5),
    "yarn with other betas": YARN.but(rope__scaling__yarn_beta_fast=8.0, rope__scaling__yarn_beta_slow=2.0),
    "yarn, half of the ramp": YARN.but(rope__scaling__yarn_ext_factor=0.5),
    "yarn with a magnitude": YARN.but(rope__scaling__attn_factor=1.3),
    "yarn and factors": replace(YARN, tensors={"rope_freqs.weight": LONG}),
    "longrope": LONGROPE,
    "longrope and a factor": LONGROPE.but(rope__scaling__factor=2.0),
    "longrope in its original context": LONGROPE.but(rope__scaling__original_context_length=CONTEXT),
}


def write(scaled: Scaled, path: Path) -> Path:
    """MODEL with this scaling."""
    plain = write_model(MODEL, path.with_suffix(".plain.gguf"))
    return rewrite(plain, path, fields={f"llama.{k}": v for k, v in scaled.fields.items()}, tensors=scaled.tensors)


@pytest.fixture
def logits(provider_name: str, rig: Rig, tmp_path: Path) -> Any:
    """What llorch gives for PROMPT."""
    exact = "f32" if "f32" in rig.device.cache_dtypes else None

    def run(scaled: Scaled) -> np.ndarray:
        path = write(scaled, tmp_path / "llorch.gguf")
        with llorch.load(path, provider=provider_name, cache_type=exact, parallel=1) as llm:
            return llm.logits(PROMPT)

    return run


@pytest.fixture
def limit(rig: Rig) -> float:
    return TWIN_NMSE if rig.product_limit < TWIN_NMSE else QUANTISED_NMSE


@pytest.fixture(scope="module")
def llamacpps(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], np.ndarray]:
    """llama.cpp's logits for a case, computed once."""
    return cache(lambda name: llamacpp(CASES[name], tmp_path_factory.mktemp("llamacpp")))


def llamacpp(scaled: Scaled, folder: Path) -> np.ndarray:
    """YaRN's own numbers are given as parameters: llama.cpp reads these fields for other architectures alone."""
    prefix = "rope.scaling."
    names = ("yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor")
    settings = {name: scaled.fields[prefix + name] for name in names if prefix + name in scaled.fields}
    with LlamaCpp(write(scaled, folder / "llamacpp.gguf"), CONTEXT, **settings) as reference:
        return reference.logits(PROMPT)


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_llamacpp_on_both_sides_of_the_original_context(logits, limit, llamacpps, name) -> None:
    found, expected = logits(CASES[name]), llamacpps(name)
    assert_logits(found[BEFORE], expected[BEFORE], limit)
    assert_logits(found[BEHIND], expected[BEHIND], limit)


WRONG = {
    "none, though a factor is there": rope("linear", factor=4.0),
    "linear": rope("linear", factor=3.9),
    "linear by its older name": Scaled({}),
    "llama 3": Scaled({}),
    "llama 3, scaled": rope("linear", factor=2.0),
    "yarn": rope("linear", factor=4.0),
    "yarn, the factor below 1": YARN,
    "yarn with other betas": YARN,
    "yarn, half of the ramp": YARN,
    "yarn with a magnitude": YARN,
    "yarn and factors": YARN,
    "longrope": replace(LONGROPE, tensors={**LONGROPE.tensors, "rope_factors_long.weight": SHORT}),
    "longrope and a factor": LONGROPE,
    "longrope in its original context": LONGROPE,
}


@pytest.mark.parametrize("name", CASES)
def test_another_scaling_fails_on_both_sides(logits, llamacpps, name) -> None:
    found, expected = logits(WRONG[name]), llamacpps(name)
    for side in (BEFORE, BEHIND):
        with pytest.raises(AssertionError, match="NMSE"):
            assert_logits(found[side], expected[side], QUANTISED_NMSE / 10)


# ---- sliding windows: llama.cpp has none for this architecture ----

WINDOWED = Scaled({"attention.sliding_window": 48})


def test_a_sliding_window_agrees_with_the_oracle(logits, limit) -> None:
    expected = OracleModel(replace(MODEL, window=48)).logits(PROMPT)
    assert_logits(logits(WINDOWED), expected, limit)


@pytest.mark.parametrize("wrong", [Scaled({}), Scaled({"attention.sliding_window": 47})])
def test_another_window_fails(logits, wrong) -> None:
    expected = OracleModel(replace(MODEL, window=48)).logits(PROMPT)
    with pytest.raises(AssertionError, match="NMSE"):
        assert_logits(logits(wrong), expected, TWIN_NMSE)


def test_before_the_window_fills_up_it_changes_nothing(logits, limit) -> None:
    assert_logits(logits(WINDOWED)[:48], logits(Scaled({}))[:48], limit)


@pytest.mark.parametrize("window", [0, CONTEXT, 10**6])
def test_a_window_that_no_sequence_outgrows_is_none(logits, limit, window) -> None:
    assert_logits(logits(Scaled({"attention.sliding_window": window})), logits(Scaled({})), limit)
