"""llorch's samplers against llama.cpp's own: the same tokens stay, with the same logits, alone and as a chain."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from llorch.core import sampling
from llorch.core.requests import SamplingParams
from llorch.core.sampling import Sampler
from tests.parity.llamacpp import filtered

VOCAB = 3000  # past the size from which llama.cpp sorts only a part


def random_row(seed: int, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * spread).astype(np.float32)


def assert_same(found: dict[int, float], expected: dict[int, float]) -> None:
    missing, surplus = expected.keys() - found.keys(), found.keys() - expected.keys()
    assert not missing, f"tokens {sorted(missing)[:5]} stay in llama.cpp"
    assert not surplus, f"tokens {sorted(surplus)[:5]} go in llama.cpp"
    differing = [t for t in expected if abs(found[t] - expected[t]) > 1e-5 * (1 + abs(expected[t]))]
    assert not differing, f"token {differing[0]} is {found[differing[0]]}, llama.cpp has {expected[differing[0]]}"


def kept(indices: np.ndarray, logits: np.ndarray) -> dict[int, float]:
    return dict(zip(indices.tolist(), logits[indices].tolist(), strict=True))


def penalised(logits: np.ndarray, history: list[int], **penalties: float) -> dict[int, float]:
    counts = Counter(history[-64:])
    found = sampling.penalise(logits, np.array(list(counts.keys())), np.array(list(counts.values())), **penalties)
    return dict(enumerate(found.tolist()))


HISTORY = np.random.default_rng(5).integers(0, 60, 200).tolist()  # most tokens more than once in the last 64
PENALTIES = [(1.3, 0.0, 0.0), (1.0, 0.4, 0.0), (1.0, 0.0, 0.7), (0.8, -0.1, 0.2), (1.1, 0.2, 0.3)]


@pytest.mark.parametrize(("repetition", "frequency", "presence"), PENALTIES)
def test_penalties_are_llamacpps(repetition, frequency, presence) -> None:
    logits = random_row(1)
    found = penalised(logits, HISTORY, repetition=repetition, frequency=frequency, presence=presence)
    assert_same(found, filtered(logits, [("penalties", 64, repetition, frequency, presence)], HISTORY))


def test_penalties_over_another_window_fail() -> None:
    logits = random_row(1)
    found = penalised(logits, HISTORY, frequency=0.4)
    with pytest.raises(AssertionError, match=r"llama\.cpp has"):
        assert_same(found, filtered(logits, [("penalties", 63, 1.0, 0.4, 0.0)], HISTORY))


@pytest.mark.parametrize("k", [1, 40, 1500, 2999])
def test_top_k_is_llamacpps(k) -> None:
    logits = random_row(2)
    assert_same(kept(sampling.top_k(logits, k), logits), filtered(logits, [("top_k", k)]))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
def test_top_p_is_llamacpps(p, spread) -> None:
    logits = random_row(3, spread)
    assert_same(kept(sampling.top_p(logits, p), logits), filtered(logits, [("top_p", p)]))


@pytest.mark.parametrize(("p", "count"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_top_p_at_an_exact_border_is_llamacpps(p, count) -> None:
    logits = np.array([2, -np.inf, 2, 2, 2], np.float32)
    expected = filtered(logits, [("top_p", p)])
    assert len(expected) == len(sampling.top_p(logits, p)) == count  # which of the equals, llama.cpp leaves open


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 1.0])
def test_min_p_is_llamacpps(p) -> None:
    logits = random_row(4)
    assert_same(kept(sampling.min_p(logits, p), logits), filtered(logits, [("min_p", p)]))


def test_min_p_at_an_exact_border_is_llamacpps() -> None:
    logits = np.array([0, np.log(np.float32(0.5)), -0.694], np.float32)
    assert_same(kept(sampling.min_p(logits, 0.5), logits), filtered(logits, [("min_p", 0.5)]))


@pytest.mark.parametrize("sampler", [sampling.top_p, sampling.min_p])
def test_another_threshold_fails(sampler) -> None:
    logits = random_row(4)
    with pytest.raises(AssertionError, match=r"in llama\.cpp"):
        assert_same(kept(sampler(logits, 0.9), logits), filtered(logits, [(sampler.__name__, 0.6)]))


# ---- the chain ----

CHAINS: list[dict[str, Any]] = [
    {"top_k": 40, "top_p": 0.9, "min_p": 0.1, "temperature": 0.7},
    {"top_k": 200, "min_p": 0.02, "temperature": 2.5},
    {"top_p": 0.6, "temperature": 1.4, "repetition_penalty": 1.2, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.3, "temperature": 0.5, "presence_penalty": 1.0},
]


def steps_of(params: SamplingParams) -> list[tuple[Any, ...]]:
    """llama.cpp's default order."""
    return [
        ("penalties", 64, params.repetition_penalty, params.frequency_penalty, params.presence_penalty),
        ("top_k", params.top_k),
        ("top_p", params.top_p),
        ("min_p", params.min_p),
        ("temp", params.temperature),
    ]


def drawn_from(monkeypatch: pytest.MonkeyPatch, params: SamplingParams, logits: np.ndarray) -> dict[float, int]:
    """The logits that the chain hands to its draw, and the probabilities behind them."""
    handed: list[np.ndarray] = []

    def record(left: np.ndarray, temperature: float, _uniform: float) -> int:
        handed.append(left / np.float32(temperature))
        return 0

    monkeypatch.setattr(sampling, "draw", record)
    sampler = Sampler(params, VOCAB)
    for token in HISTORY:
        sampler.accept(token)
    sampler.sample(logits)
    return dict(enumerate(np.sort(handed[0]).tolist()))


def sorted_logits(row: dict[int, float]) -> dict[int, float]:
    return dict(enumerate(sorted(row.values())))


@pytest.mark.parametrize("chain", CHAINS)
def test_chain_is_llamacpps(monkeypatch, chain) -> None:
    params, logits = SamplingParams(seed=1, **chain), random_row(6)
    expected = filtered(logits, steps_of(params), HISTORY)
    assert_same(drawn_from(monkeypatch, params, logits), sorted_logits(expected))


def test_chain_in_another_order_fails(monkeypatch) -> None:
    """Temperature before min-p, as other programs do it."""
    params, logits = SamplingParams(seed=1, min_p=0.1, temperature=2.0), random_row(6)
    others = [("temp", 2.0), ("min_p", 0.1)]
    with pytest.raises(AssertionError, match=r"in llama\.cpp"):
        assert_same(drawn_from(monkeypatch, params, logits), sorted_logits(filtered(logits, others)))


@pytest.mark.parametrize("chain", CHAINS)
def test_chain_draws_only_what_llamacpp_leaves(chain) -> None:
    params, logits = SamplingParams(seed=1, **chain), random_row(6)
    allowed = filtered(logits, steps_of(params), HISTORY).keys()
    sampler = Sampler(params, VOCAB)
    for token in HISTORY:
        sampler.accept(token)
    assert {sampler.sample(logits) for _ in range(300)} <= allowed
