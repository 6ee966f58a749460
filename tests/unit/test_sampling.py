"""Each step of sampling against its definition, written again in plain float64 Python."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.core import sampling
from llorch.core.requests import SamplingParams
from tests.unit.samplers import LOGITS, penalised_by_definition, probabilities_of, random_row, ranked, row

# ---- penalties ----


@settings(deadline=None)
@given(LOGITS, st.data())
def test_penalties_follow_their_definition(logits, data) -> None:
    history = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=150))
    params = SamplingParams(
        repetition_penalty=data.draw(st.floats(0.1, 2)),
        frequency_penalty=data.draw(st.floats(-2, 2)),
        presence_penalty=data.draw(st.floats(-2, 2)),
    )
    recent = Counter(history[-params.penalty_window :])
    expected = penalised_by_definition(row(logits), history, params)
    with np.errstate(over="ignore"):  # the smallest float, doubled, is -inf
        found = sampling.penalise(
            row(logits),
            np.array(list(recent.keys()), np.intp),
            np.array(list(recent.values()), np.intp),
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
        )
        np.testing.assert_allclose(found, np.array(expected).astype(np.float32), rtol=1e-5, atol=1e-4)
    assert found.dtype == np.float32


def test_repetition_multiplies_negative_logits_and_divides_positive_ones() -> None:
    found = sampling.penalise(row([-1, 0, 4, -1, 4]), np.array([0, 1, 2]), np.array([5, 5, 5]), repetition=2.0)
    assert found.tolist() == [-2, 0, 2, -1, 4]


def test_a_tiny_repetition_penalty_leaves_logits_finite() -> None:
    found = sampling.penalise(row([2, 0, -2, np.inf]), np.arange(4), np.ones(4), repetition=5e-324)
    assert found.tolist() == [np.finfo(np.float32).max, 0, 0, np.inf]


def test_frequency_counts_and_presence_does_not() -> None:
    found = sampling.penalise(row([3, 3, 3]), np.array([0, 1]), np.array([4, 1]), frequency=0.5, presence=0.25)
    assert found.tolist() == [0.75, 2.25, 3]


def test_repetition_applies_before_the_subtractions() -> None:
    found = sampling.penalise(row([1, 0]), np.array([0]), np.array([1]), repetition=2.0, presence=1.0)
    assert found.tolist() == [-0.5, 0]  # the other way round: 0


# ---- top-k ----


@settings(deadline=None)
@given(LOGITS, st.integers(1, 250))
def test_top_k_follows_its_definition(logits, k) -> None:
    assert sampling.top_k(row(logits), k).tolist() == ranked(logits)[:k]


@pytest.mark.parametrize("k", [1, 2, 40, 63, 64, 1000, 4999, 5000, 6000])
@pytest.mark.parametrize("step", [None, 0.5, 10.0])
def test_top_k_of_long_rows_with_and_without_ties(k, step) -> None:
    """Rows that are long enough for the pre-cut by groups; rounding to `step` makes ties."""
    logits = random_row(k, 5000)
    if step:
        logits = row(np.round(logits / step) * step)
    assert sampling.top_k(logits, k).tolist() == ranked(logits.tolist())[:k]


# ---- top-p ----


def assert_nucleus(logits: np.ndarray, p: float, kept: list[int], slack: float = 5e-6) -> None:
    """`kept` is the smallest set of mass p, up to a slack for float32."""
    assert kept == sorted(ranked(logits.tolist())[: len(kept)]), "not the most likely tokens"
    by_rank = sorted(probabilities_of(logits.tolist()), reverse=True)
    assert math.fsum(by_rank[: len(kept)]) >= p - slack, "too few"
    assert len(kept) == 1 or math.fsum(by_rank[: len(kept) - 1]) < p + slack, "too many"


@settings(deadline=None)
@given(LOGITS, st.floats(0, 1, exclude_max=True))
def test_top_p_follows_its_definition(logits, p) -> None:
    assert_nucleus(row(logits), p, sampling.top_p(row(logits), p).tolist())


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 8.0])
def test_top_p_of_long_rows(p, spread) -> None:
    logits = random_row(7, 5000, spread)
    assert_nucleus(logits, p, sampling.top_p(logits, p).tolist())


def test_one_token_too_few_or_too_many_is_no_nucleus() -> None:
    logits = random_row(7, 5000)
    kept = sampling.top_p(logits, 0.9).tolist()
    by_rank = ranked(logits.tolist())
    with pytest.raises(AssertionError, match="too few"):
        assert_nucleus(logits, 0.9, sorted(by_rank[: len(kept) - 1]))
    with pytest.raises(AssertionError, match="too many"):
        assert_nucleus(logits, 0.9, sorted(by_rank[: len(kept) + 1]))


@pytest.mark.parametrize(("p", "count"), [(0.25, 1), (0.250001, 2), (0.5, 2), (0.75, 3), (0.76, 4), (0.0, 1)])
def test_top_p_includes_the_token_that_reaches_p_exactly(p, count) -> None:
    """Four equal tokens of 0.25 each; the lower ids stay."""
    assert sampling.top_p(row([1, -math.inf, 1, 1, 1]), p).tolist() == [0, 2, 3, 4][:count]


def test_top_p_of_zero_keeps_the_best() -> None:
    assert sampling.top_p(row([1, 3, 2, 3]), 0.0).tolist() == [1]


# ---- min-p ----


@settings(deadline=None)
@given(LOGITS, st.floats(1e-3, 1))
def test_min_p_follows_its_definition(logits, p) -> None:
    kept = sampling.min_p(row(logits), p).tolist()
    ratios = [math.exp(x - max(logits)) for x in logits]
    assert kept == sorted(kept)
    assert all(ratios[i] >= p * (1 - 1e-5) for i in kept)
    assert all(ratios[i] < p * (1 + 1e-5) for i in set(range(len(logits))) - set(kept))
    assert logits.index(max(logits)) in kept


def test_min_p_keeps_the_token_exactly_at_the_border() -> None:
    assert sampling.min_p(row([0.0, np.float32(math.log(0.5)), -0.694]), 0.5).tolist() == [0, 1]


# ---- softmax, temperature, draw ----


@settings(deadline=None)
@given(LOGITS, st.floats(0.05, 5))
def test_softmax_follows_its_definition(logits, temperature) -> None:
    found = sampling.softmax(row(logits), temperature)
    np.testing.assert_allclose(found, probabilities_of(logits, temperature), rtol=2e-4, atol=1e-7)
    assert abs(float(found.sum()) - 1) <= 1e-6


@settings(deadline=None)
@given(LOGITS, st.floats(0.05, 5), st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_cumulative_distribution(logits, temperature, uniform) -> None:
    index = sampling.draw(row(logits), temperature, uniform)
    probabilities = probabilities_of(logits, temperature)
    assert math.fsum(probabilities[:index]) <= uniform + 1e-5
    assert math.fsum(probabilities[: index + 1]) >= uniform - 1e-5
    assert probabilities[index] > 0


def test_draw_across_many_blocks() -> None:
    logits = random_row(3, 5000)
    cumulative = np.cumsum(probabilities_of(logits.tolist()))
    for uniform in np.linspace(0, 1, 199, endpoint=False):
        index = sampling.draw(logits, 1.0, float(uniform))
        assert cumulative[index] >= uniform - 1e-6
        assert index == 0 or cumulative[index - 1] <= uniform + 1e-6


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(1.0, 0.0), 1.0])  # 1: what rounding may make of the last
def test_draw_never_takes_a_token_without_probability(uniform) -> None:
    logits = np.full(5000, -np.inf, np.float32)
    logits[[1000, 3000]] = 2.0
    assert sampling.draw(row(logits), 1.0, uniform) == (1000 if uniform < 0.5 else 3000)
