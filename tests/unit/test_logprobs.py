"""Log-probabilities and biases: what the engine reports, against the logits of the whole sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.special import log_softmax

import llorch
from llorch.core.requests import Ended, Event, Request, SamplingParams, StopReason, Token, TokenLogprobs
from llorch.core.sampling import Sampler, token_logprobs
from llorch.errors import InvalidRequestError
from tests.support import shared

PROMPT = "Once upon a time, Lily saw"
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def llm() -> Iterator[llorch.LLM]:
    with llorch.load(shared("models", "stories260K.gguf"), provider="numpy-cpu") as loaded:
        yield loaded


def generate(
    llm: llorch.LLM, sampling: SamplingParams = GREEDY, logprobs: int | None = 3, max_tokens: int = 12, stop: str = ""
) -> list[Event]:
    engine = llm.engine()
    events: list[Event] = []
    prompt = tuple(llm.tokenizer.encode(PROMPT))
    stops = (stop,) if stop else ()
    request = Request(
        job_id="a", prompt=prompt, max_tokens=max_tokens, sampling=sampling, logprobs=logprobs, stop=stops
    )
    engine.submit(request, events.append)
    while engine.step():
        pass
    assert isinstance(events[-1], Ended)
    return events


def reported(events: list[Event]) -> list[TokenLogprobs]:
    return [found for event in events if isinstance(event, Token | Ended) for found in event.logprobs]


@pytest.mark.parametrize(
    "sampling", [GREEDY, SamplingParams(temperature=0.7, top_k=20, repetition_penalty=1.3, seed=3)]
)
def test_they_are_the_log_softmax_of_the_models_own_logits(llm, sampling) -> None:
    """Of the logits as they come: temperature, filters and penalties change what is drawn and not what is told."""
    events = generate(llm, sampling)
    assert isinstance(events[-1], Ended)
    output = events[-1].tokens
    prompt = llm.tokenizer.encode(PROMPT)
    expected = log_softmax(llm.logits([*prompt, *output]).astype(np.float64), axis=-1)[len(prompt) - 1 : -1]
    found = reported(events)
    assert [one.token for one in found] == list(output)
    for one, row in zip(found, expected, strict=True):
        best = np.argsort(-row)[:3]
        assert [token for token, _ in one.top] == best.tolist()
        assert one.logprob == pytest.approx(row[one.token], abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx(row[best].tolist(), abs=1e-4)
    if sampling.greedy:
        assert all(one.top[0] == (one.token, one.logprob) for one in found)
    else:
        assert any(one.top[0][0] != one.token for one in found)


def test_asking_for_them_changes_no_token(llm) -> None:
    sampling = SamplingParams(temperature=0.8, top_k=40, seed=5)
    with_, without = generate(llm, sampling)[-1], generate(llm, sampling, logprobs=None)[-1]
    assert isinstance(with_, Ended)
    assert isinstance(without, Ended)
    assert with_.tokens == without.tokens
    assert not reported([without])


def test_none_of_the_others_are_told_where_0_are_asked_for(llm) -> None:
    assert all(found.top == () for found in reported(generate(llm, logprobs=0)))


def test_a_stop_string_that_is_cut_off_has_none(llm) -> None:
    text = "".join(event.text for event in generate(llm) if isinstance(event, Token))
    events = generate(llm, stop=text[-4:])
    assert isinstance(events[-1], Ended)
    assert events[-1].reason is StopReason.STOP_SEQUENCE
    found = reported(events)
    assert 0 < len(found) < events[-1].tokens_out
    shown = "".join(event.text for event in events if isinstance(event, Token))
    told = [one.token for one in found]  # the last of them may be shown in part
    assert llm.tokenizer.decode(told).strip().startswith(shown.strip())
    assert not llm.tokenizer.decode(told[:-1]).strip().startswith(shown.strip())


def test_the_sum_is_exact_for_logits_far_from_0() -> None:
    logits = np.array([-1000.0, -1001.0, -np.inf], np.float32)
    found = token_logprobs(logits, 1, 3)
    assert found.logprob == pytest.approx(-1 - math.log1p(math.exp(-1)), abs=1e-6)
    assert [token for token, _ in found.top] == [0, 1, 2]
    assert found.top[2][1] == -math.inf


# ---- logit_bias ----


def test_a_bias_forbids_a_token_and_forces_another(llm) -> None:
    first = reported(generate(llm, max_tokens=1))[0]
    best, second = first.top[0][0], first.top[1][0]
    banned = SamplingParams(temperature=0.0, logit_bias=((best, -100.0),))
    assert reported(generate(llm, banned, max_tokens=1))[0].token == second
    forced = SamplingParams(temperature=1.0, seed=1, logit_bias=((300, 100.0),))
    found = reported(generate(llm, forced, max_tokens=3))
    assert [one.token for one in found] == [300] * 3
    assert found[0].top == first.top  # the model's own


def test_a_bias_leaves_the_logits_as_they_were() -> None:
    logits = np.zeros(4, np.float32)
    assert Sampler(SamplingParams(temperature=0.0, logit_bias=((2, 1.0),)), 4).sample(logits) == 2
    assert not logits.any()


def test_a_biased_request_needs_the_whole_row() -> None:
    assert Sampler(SamplingParams(temperature=0.0), 4).candidates == 1
    assert Sampler(SamplingParams(temperature=0.0, logit_bias=((2, 1.0),)), 4).candidates is None


@pytest.mark.parametrize("token", [-1, 4])
def test_a_bias_of_a_token_outside_the_vocabulary_is_an_error(token: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"token {token}, the vocabulary has 4"):
        Sampler(SamplingParams(logit_bias=((token, 1.0),)), 4)
