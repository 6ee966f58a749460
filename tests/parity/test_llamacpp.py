"""llorch against llama.cpp itself, on random weights of every type: the same logits, the same greedy tokens.

Two comparisons for each weight type. Against llama.cpp on the float32 twin (the same weights dequantised) nothing is
rounded on either side, so the logits agree to float32's noise. Against llama.cpp on the quantised file, which rounds
activations to int8 (float16 for F16), they agree as well as that rounding lets them. Each assertion is run again on a
product that computes something else, and must fail there.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import llorch
from llorch.core.config import ModelConfig
from llorch.core.models import llama
from llorch.core.plan import Rotation
from tests.gguf_copy import rewrite
from tests.parity import llamacpp
from tests.parity.llamacpp import LlamaCpp
from tests.support import shared, synthetic

QUANTS = ("F32", "F16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K")
TWIN_NMSE = 1e-6  # both sides compute in float32
QUANTISED_NMSE = 5e-3  # llama.cpp rounds activations
CLEAR_MARGIN = 0.2  # logits; rounding may swap two tokens that are closer
GREEDY_PROMPT, GREEDY_TOKENS = 64, 32
PROMPT = [1, *np.random.default_rng(0).integers(259, 2048, 255).tolist()]  # BOS, then anything but bytes


# ---- the assertions, shared by tests and twins ----


def centred(logits: np.ndarray) -> np.ndarray:
    """The mean over the vocabulary taken off: softmax does not see it."""
    exact = logits.astype(np.float64)
    return exact - exact.mean(axis=-1, keepdims=True)


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    """Sum of squared error over sum of squares."""
    error = centred(found) - centred(expected)
    return float((error**2).sum() / (centred(expected) ** 2).sum())


def assert_logits(found: np.ndarray, expected: np.ndarray, limit: float) -> None:
    assert found.shape == expected.shape, f"logits {found.shape}, llama.cpp has {expected.shape}"
    error = nmse(found, expected)
    assert error <= limit, f"NMSE {error:.1e}, at most {limit:.0e}"


def assert_most_likely(found: np.ndarray, expected: np.ndarray) -> None:
    """The same most likely token wherever llama.cpp's margin over the second is clear."""
    second, first = np.sort(expected, axis=-1)[:, -2:].T
    clear = first - second > CLEAR_MARGIN
    assert clear.sum() >= len(expected) // 4, f"only {clear.sum()} of {len(expected)} positions have a clear margin"
    differing = np.flatnonzero(clear & (found.argmax(axis=-1) != expected.argmax(axis=-1)))
    assert len(differing) == 0, f"another most likely token at {len(differing)} positions, first {differing[0]}"


def assert_greedy(llm: llorch.LLM, expected: list[int]) -> None:
    found = list(llm.generate_ids(PROMPT[:GREEDY_PROMPT], max_tokens=len(expected), temperature=0.0))
    assert found == expected, f"other greedy tokens: {found}, llama.cpp has {expected}"


def assert_diverse(logits: np.ndarray) -> None:
    """A model that always gives the same few tokens proves nothing."""
    assert len(logits) == 256
    distinct = len(np.unique(logits.argmax(axis=-1)))
    assert distinct >= 50, f"{distinct} distinct most likely tokens over 256 positions, at least 50 are needed"


# ---- the models ----


@dataclass
class Case:
    """One weight type: the product, and what llama.cpp gives for the twin and for the file itself."""

    path: Path
    llm: llorch.LLM
    logits: np.ndarray
    twin_logits: np.ndarray
    twin_greedy: list[int]
    file_logits: np.ndarray


def load(path: Path) -> llorch.LLM:
    return llorch.load(path, provider="numpy-cpu", cache_type="f32")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    folder = tmp_path_factory.mktemp("parity")
    made: dict[str, Case] = {}

    def case(quant: str) -> Case:
        if quant not in made:
            made[quant] = make_case(folder, quant)
        return made[quant]

    yield case
    for case_ in made.values():
        case_.llm.close()


def make_case(folder: Path, quant: str) -> Case:
    path = synthetic(folder, "tiny", quant)
    twin = rewrite(path, folder / f"{quant}-twin.gguf", dequantise=True)
    with LlamaCpp(twin) as reference:
        twin_logits = reference.logits(PROMPT)
        twin_greedy = reference.greedy(PROMPT[:GREEDY_PROMPT], GREEDY_TOKENS)
    with LlamaCpp(path) as reference:
        file_logits = reference.logits(PROMPT)
    llm = load(path)
    return Case(path, llm, llm.logits(PROMPT), twin_logits, twin_greedy, file_logits)


# ---- the reference itself ----


def test_llamacpp_here_gives_what_was_recorded() -> None:
    with np.load(shared("reference", "stories260K-checkpoints.npz")) as recorded:
        tokens, logits, greedy = (recorded[name] for name in ("tokens", "logits", "greedy"))
    with LlamaCpp(shared("models", "stories260K.gguf")) as reference:
        assert np.abs(reference.logits(tokens.tolist()) - logits).max() <= 1e-4
        assert reference.greedy(tokens.tolist(), len(greedy)) == greedy.tolist()


def test_a_library_of_another_layout_is_refused() -> None:
    params = llamacpp.library().llama_context_default_params()
    shifted = llamacpp.ContextParams.from_buffer_copy(b"\0" * 4 + bytes(params)[:-4])
    llamacpp.check_layout(params, llamacpp.CONTEXT_DEFAULTS, "1.2")
    with pytest.raises(RuntimeError, match=r"ContextParams of xllamacpp 1\.2: n_ctx is 0, not 512"):
        llamacpp.check_layout(shifted, llamacpp.CONTEXT_DEFAULTS, "1.2")


def test_a_file_that_llamacpp_cannot_load_is_an_error(tmp_path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(RuntimeError, match=r"cannot load .*broken\.gguf"):
        LlamaCpp(path)


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_without_the_wheel_tests_skip_and_in_ci_they_fail(monkeypatch, ci, outcome) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # what makes an import fail
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match=r"llama\.cpp is not here: pip install"):
        llamacpp.library.__wrapped__()


def test_the_twin_of_a_float32_file_is_the_file_again(cases) -> None:
    case = cases("F32")
    np.testing.assert_array_equal(case.twin_logits, case.file_logits)


# ---- parity ----


@pytest.mark.parametrize("quant", QUANTS)
def test_logits_agree_with_llamacpp_on_the_float32_twin(cases, quant) -> None:
    case = cases(quant)
    assert_logits(case.logits, case.twin_logits, TWIN_NMSE)


@pytest.mark.parametrize("quant", QUANTS)
def test_greedy_tokens_equal_llamacpps_on_the_float32_twin(cases, quant) -> None:
    case = cases(quant)
    assert len(case.twin_greedy) == 32
    assert_greedy(case.llm, case.twin_greedy)


@pytest.mark.parametrize("quant", QUANTS)
def test_logits_agree_with_llamacpp_on_the_file(cases, quant) -> None:
    case = cases(quant)
    assert_logits(case.logits, case.file_logits, QUANTISED_NMSE)
    assert_most_likely(case.logits, case.file_logits)


@pytest.mark.parametrize("quant", QUANTS)
def test_models_give_50_distinct_tokens(cases, quant) -> None:
    assert_diverse(cases(quant).logits)


# ---- the twins that must fail ----


@contextmanager
def wrong_eps(path: Path) -> Iterator[llorch.LLM]:
    """By the metadata, as in a file whose epsilon was read wrongly."""
    other = rewrite(path, path.with_suffix(".eps.gguf"), fields={"llama.attention.layer_norm_rms_epsilon": 1e-3})
    with load(other) as llm:
        yield llm


@contextmanager
def other_pairing(path: Path) -> Iterator[llorch.LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "Rotation", lambda _pairing, *rest: Rotation("half", *rest))
        with load(path) as llm:
            yield llm


@contextmanager
def missing_scale(path: Path) -> Iterator[llorch.LLM]:
    real = ModelConfig.from_gguf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelConfig, "from_gguf", lambda file: dataclasses.replace(real(file), attention_scale=1.0))
        with load(path) as llm:
            yield llm


@pytest.mark.parametrize("perturbed", [wrong_eps, other_pairing, missing_scale])
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K"])
def test_a_perturbed_product_fails_every_comparison(cases, quant, perturbed) -> None:
    case = cases(quant)
    with perturbed(case.path) as wrong:
        logits = wrong.logits(PROMPT[:GREEDY_PROMPT])
        with pytest.raises(AssertionError, match="NMSE"):
            assert_logits(logits, case.twin_logits[:GREEDY_PROMPT], TWIN_NMSE)
        with pytest.raises(AssertionError, match="NMSE"):
            assert_logits(logits, case.file_logits[:GREEDY_PROMPT], QUANTISED_NMSE)
        with pytest.raises(AssertionError, match="another most likely token"):
            assert_most_likely(logits, case.file_logits[:GREEDY_PROMPT])
        with pytest.raises(AssertionError, match="other greedy tokens"):
            assert_greedy(wrong, case.twin_greedy)


def test_the_weights_of_another_file_fail(cases) -> None:
    with pytest.raises(AssertionError, match="NMSE"):
        assert_logits(cases("Q4_K").logits, cases("Q5_K").twin_logits, QUANTISED_NMSE)


def test_a_prompt_that_repeats_one_token_is_not_diverse(cases) -> None:
    with pytest.raises(AssertionError, match="distinct most likely tokens"):
        assert_diverse(cases("Q4_0").llm.logits([300] * 256))
