"""A request's chain of samplers: what it may choose, how often, and what it depends on."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.core.requests import SamplingParams
from llorch.core.sampling import Sampler
from llorch.errors import EngineError, InvalidRequestError
from tests.unit.samplers import LOGITS, distribution_by_definition, random_row, ranked, row

VOCAB_128K = 128_256  # Llama 3's


def reachable(logits: Sequence[float], **params: float) -> set[int]:
    sampler = Sampler(SamplingParams(seed=0, **params), len(logits))
    return {sampler.sample(row(logits)) for _ in range(500)}


# ---- the order of the steps ----


def test_top_p_looks_at_what_top_k_left() -> None:
    """0.4, 0.3, 0.3 become 0.57, 0.43 behind top-k 2, so 0.5 needs one token only."""
    logits = np.log([0.4, 0.3, 0.3])
    assert reachable(logits, top_k=2, top_p=0.5) == {0}
    assert reachable(logits, top_p=0.5) == {0, 1}


def test_min_p_applies_before_temperature() -> None:
    """Ratio 0.4: below min-p 0.5, though at temperature 3 it would be 0.74."""
    logits = np.log([1.0, 0.4, 0.6])
    assert reachable(logits, min_p=0.5, temperature=3.0) == {0, 2}


def test_min_p_applies_before_a_low_temperature() -> None:
    """Ratio 0.6: above min-p 0.5, though at temperature 0.5 it is 0.36."""
    logits = np.log([1.0, 0.6])
    assert reachable(logits, min_p=0.5, temperature=0.5) == {0, 1}


# ---- the penalties' window ----


def greedy(logits: Sequence[float], history: Sequence[int], **penalties: float) -> int:
    sampler = Sampler(SamplingParams(temperature=0.0, **penalties), len(logits))
    for token in history:
        sampler.accept(token)
    return sampler.sample(row(logits))


def test_only_the_last_64_tokens_count() -> None:
    assert greedy([2, 1.5, 0], [0] + [2] * 63, presence_penalty=1.0) == 1
    assert greedy([2, 1.5, 0], [0] + [2] * 64, presence_penalty=1.0) == 0


def test_counts_shrink_as_tokens_leave_the_window() -> None:
    """Four of token 0, then one more token 2 each time: 2 - 0.2 * count passes 1.5 once two are left."""
    for behind, expected in ((60, 1), (61, 1), (62, 0), (63, 0), (64, 0)):
        assert greedy([2, 1.5, -9], [0] * 4 + [2] * behind, frequency_penalty=0.2) == expected


def test_a_window_of_nothing_penalises_nothing() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=9.0, penalty_window=0)
    sampler = Sampler(params, 2)
    sampler.accept(0)
    assert sampler.sample(row([2, 1])) == 0


# ---- the chain: distribution ----

LOGITS_50 = random_row(11, 50, 1.5)
CHAINS = {
    "nothing": {},
    "temperature": {"temperature": 1.7},
    "low temperature": {"temperature": 0.4},
    "top-k": {"top_k": 12},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1, "temperature": 1.5},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    "all": {
        "top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 0.8, "repetition_penalty": 1.2,
        "frequency_penalty": 0.1, "presence_penalty": 0.1,
    },
}  # fmt: skip
HISTORY = [ranked(LOGITS_50.tolist())[i] for i in (0, 0, 1, 3, 49, 0)]
DRAWS = 20_000


@cache
def draws_of(params: SamplingParams) -> Counter[int]:
    sampler = Sampler(params, len(LOGITS_50))
    for token in HISTORY:
        sampler.accept(token)
    return Counter(sampler.sample(LOGITS_50) for _ in range(DRAWS))


def assert_distribution(found: Counter[int], expected: dict[int, float]) -> None:
    """Pearson's chi-square; tokens expected fewer than 5 times are counted together."""
    assert set(found) <= set(expected), f"impossible tokens {set(found) - set(expected)}"
    total = found.total()
    rare = [t for t, p in expected.items() if p * total < 5]
    common = [t for t in expected if t not in rare]
    observed = [found[t] for t in common]
    wanted = [expected[t] * total for t in common]
    if sum(expected[t] for t in rare) * total >= 5:
        observed.append(sum(found[t] for t in rare))
        wanted.append(sum(expected[t] for t in rare) * total)
    scale = sum(observed) / sum(wanted)  # of what is left out: too rare to count
    p_value = scipy.stats.chisquare(observed, [w * scale for w in wanted]).pvalue
    assert p_value > 1e-4, f"p = {p_value:.1e}: another distribution"


@pytest.mark.parametrize("params", CHAINS.values(), ids=CHAINS.keys())
def test_distribution_over_20000_draws(params) -> None:
    chain = SamplingParams(seed=2024, **params)
    assert_distribution(draws_of(chain), distribution_by_definition(LOGITS_50.tolist(), chain, HISTORY))


@pytest.mark.parametrize(
    ("params", "others"),
    [
        ({}, {"temperature": 1.1}),
        ({"temperature": 1.7}, {"temperature": 1.6}),
        ({"top_k": 12}, {"top_k": 11}),
        ({"top_k": 12}, {"top_k": 13}),
        ({"top_p": 0.8}, {"top_p": 0.83}),
        ({"min_p": 0.1, "temperature": 1.5}, {"min_p": 0.12, "temperature": 1.5}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.6}),
        ({"frequency_penalty": 0.2}, {"presence_penalty": 0.2}),
        (CHAINS["all"], {**CHAINS["all"], "frequency_penalty": 0.2}),
    ],
)
def test_another_distribution_fails(params, others) -> None:
    expected = distribution_by_definition(LOGITS_50.tolist(), SamplingParams(**others), HISTORY)
    with pytest.raises(AssertionError, match=r"another distribution|impossible tokens"):
        assert_distribution(draws_of(SamplingParams(seed=2024, **params)), expected)


@settings(deadline=None)
@given(LOGITS, st.data())
def test_any_chain_chooses_a_token_that_its_definition_allows(logits, data) -> None:
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.0, 0.3, 1.0, 4.0])),
        top_k=data.draw(st.sampled_from([0, 1, 5, 100])),
        top_p=data.draw(st.sampled_from([0.0, 0.31, 0.9, 1.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.013, 0.7])),
        presence_penalty=data.draw(st.sampled_from([0.0, 0.5])),
        seed=data.draw(st.integers(0, 2**64 - 1)),
    )
    history = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=70))
    sampler = Sampler(params, len(logits))
    for token in history:
        sampler.accept(token)
    # a little laxer at the borders, where float32 may round to the other side
    lax = SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=min(1.0, params.top_p + 1e-6),
        min_p=params.min_p * (1 - 1e-5),
        presence_penalty=params.presence_penalty,
    )
    assert sampler.sample(row(logits)) in distribution_by_definition(row(logits).tolist(), lax, history)


# ---- greedy ----


@pytest.mark.parametrize("temperature", [0.0, 9e-7, -1.0])
def test_no_temperature_takes_the_lowest_id_among_the_most_likely(temperature) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, top_p=0.5, min_p=0.2, top_k=2), 5)
    assert [sampler.sample(row([1, 3, 2, 3, 3])) for _ in range(3)] == [1, 1, 1]


def test_greedy_is_penalised() -> None:
    assert greedy([1, 3, 2], [1], repetition_penalty=2.0) == 2


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    assert reachable([1, 3, 2, 3], top_k=1, temperature=2.0) == {1}


# ---- seeds ----


def tokens_of(sampler: Sampler, rows: list[np.ndarray]) -> list[int]:
    tokens = []
    for logits in rows:
        tokens.append(sampler.sample(logits))
        sampler.accept(tokens[-1])
    return tokens


ROWS = [random_row(seed, 300) for seed in range(60)]
PARAMS = {"top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}


def test_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    first = tokens_of(Sampler(SamplingParams(seed=5, **PARAMS), 300), ROWS)
    assert first == tokens_of(Sampler(SamplingParams(seed=5, **PARAMS), 300), ROWS)
    assert first != tokens_of(Sampler(SamplingParams(seed=6, **PARAMS), 300), ROWS)


def test_requests_that_run_beside_it_change_nothing() -> None:
    alone = tokens_of(Sampler(SamplingParams(seed=5, **PARAMS), 300), ROWS)
    sampler = Sampler(SamplingParams(seed=5, **PARAMS), 300)
    others = [Sampler(SamplingParams(seed=5), 300), Sampler(SamplingParams(), 300)]
    interleaved = []
    for logits in ROWS:
        for other in others:
            other.sample(logits)
        interleaved += tokens_of(sampler, [logits])
    assert interleaved == alone


def test_threads_that_run_beside_it_change_nothing() -> None:
    alone = tokens_of(Sampler(SamplingParams(seed=5, **PARAMS), 300), ROWS)
    found: list[list[int]] = []

    def run() -> None:
        found.append(tokens_of(Sampler(SamplingParams(seed=5, **PARAMS), 300), ROWS))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 4


def test_a_seed_that_is_not_given_is_drawn_and_can_be_used_again() -> None:
    first, second = Sampler(SamplingParams(**PARAMS), 300), Sampler(SamplingParams(**PARAMS), 300)
    assert first.seed != second.seed
    assert 0 <= first.seed < 2**64
    again = Sampler(SamplingParams(seed=first.seed, **PARAMS), 300)
    assert tokens_of(first, ROWS) == tokens_of(again, ROWS)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="seed is -1"):
        Sampler(SamplingParams(seed=-1), 300)


def test_each_token_takes_one_draw() -> None:
    """Whatever the chain is: the next token depends on how many came before, not on how they were chosen."""
    expected = np.random.Generator(np.random.PCG64(5)).random(3)
    flat = row(np.zeros(1000))
    for params in ({}, {"top_k": 999}, {"top_p": 0.9999}, {"min_p": 0.5}):
        kept = 999 if "top_k" in params else 1000
        sampler = Sampler(SamplingParams(seed=5, **params), 1000)
        assert [sampler.sample(flat) for _ in range(3)] == [int(u * kept) for u in expected]


# ---- candidates from the device ----


@pytest.mark.parametrize(
    ("params", "needed"),
    [
        ({"temperature": 0.0}, 1),
        ({"temperature": 0.0, "top_k": 40}, 1),
        ({"top_k": 40}, 40),
        ({"top_k": 40, "top_p": 0.9, "min_p": 0.1}, 40),
        ({"top_p": 0.9}, None),
        ({}, None),
        ({"top_k": 300}, None),
        ({"top_k": 40, "presence_penalty": 0.1}, None),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, None),
    ],
)
def test_candidates_that_are_enough(params, needed) -> None:
    assert Sampler(SamplingParams(**params), 300).candidates == needed


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("offered", [40, 64])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"top_k": 40},
        {"top_k": 40, "temperature": 3.0},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    ],
)
def test_candidates_give_the_token_of_the_whole_row(params, offered, ties) -> None:
    whole = Sampler(SamplingParams(seed=9, **params), 5000)
    device = Sampler(SamplingParams(seed=9, **params), 5000)
    for seed in range(50):
        logits = random_row(seed, 5000)
        if ties:
            logits = row(np.round(logits))
        ids = np.array(ranked(logits.tolist())[:offered], np.int32)
        assert device.sample_candidates(ids, logits[ids]) == whole.sample(logits)


def test_too_few_candidates_are_refused() -> None:
    ids, values = np.arange(8, dtype=np.int32), row(np.arange(8)[::-1])
    with pytest.raises(EngineError, match="8 candidates, but this request needs 40"):
        Sampler(SamplingParams(top_k=40), 300).sample_candidates(ids, values)
    with pytest.raises(EngineError, match="needs whole rows"):
        Sampler(SamplingParams(), 300).sample_candidates(ids, values)


# ---- logits that no token can be drawn from ----


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 2, "top_p": 0.5, "presence_penalty": 1.0}])
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([1, math.nan, 2], "1 of 3 logits are NaN"),
        ([math.nan] * 3, "3 of 3 logits are NaN"),
        ([-math.inf] * 3, "all 3 logits are -inf"),
        ([1, math.inf, 2], "1 of 3 logits are infinite"),
    ],
)
def test_logits_without_a_token_are_an_error(params, logits, message) -> None:
    sampler = Sampler(SamplingParams(**params), 3)
    sampler.accept(0)
    with pytest.raises(EngineError, match=f"{message}.*`llorch compare MODEL --provider NAME` shows where"):
        sampler.sample(row(logits))


@pytest.mark.parametrize(("value", "message"), [(math.nan, "NaN"), (-math.inf, "-inf")])
def test_candidates_without_a_token_are_an_error(value, message) -> None:
    with pytest.raises(EngineError, match=message):
        Sampler(SamplingParams(temperature=0.0), 3).sample_candidates(np.array([0], np.int32), row([value]))


def test_masked_tokens_are_never_drawn() -> None:
    assert reachable([-math.inf, 1, -math.inf, 1], temperature=5.0) == {1, 3}
    assert reachable([-3.4e38, 1, -3.4e38, 1], temperature=0.5) == {1, 3}


def test_a_row_of_another_vocabulary_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"\(3,\) for a vocabulary of 4"):
        Sampler(SamplingParams(), 4).sample(row([1, 2, 3]))


# ---- speed ----


def median_ms(params: SamplingParams, logits: np.ndarray, repetitions: int = 100) -> float:
    sampler = Sampler(params, len(logits))
    for token in range(64):
        sampler.accept(token * 1000)
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        sampler.sample(logits)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def test_a_128k_vocabulary_takes_under_a_millisecond() -> None:
    params = SamplingParams(
        temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, repetition_penalty=1.1, frequency_penalty=0.1,
        presence_penalty=0.1, seed=1,
    )  # fmt: skip
    assert median_ms(params, random_row(1, VOCAB_128K)) < 1.0


def test_top_p_alone_sorts_no_128k_vocabulary() -> None:
    logits = random_row(1, VOCAB_128K, 8.0)  # a few hundred tokens hold the mass, as in a trained model
    start = time.perf_counter()
    np.argsort(-logits, kind="stable")
    assert median_ms(SamplingParams(top_p=0.95, seed=1), logits) < (time.perf_counter() - start) * 1e3 / 4
