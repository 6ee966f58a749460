"""Cache blocks that are shared, copied, given up and computed again: the text stays what it is without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llorch
from llorch.core.requests import Ended, Event, Request, SamplingParams, Started, Token
from llorch.providers.conformance.models import TinyModel, write_model
from llorch.providers.conformance.rig import Rig

MODEL = TinyModel(type="Q8_0", gain=3.0, seed=25)  # its tokens hang on what attention finds
COUNT = 40


@pytest.fixture
def load(provider_name: str, rig: Rig, tmp_path: Path) -> Callable[..., llorch.LLM]:
    path = write_model(MODEL, tmp_path / "model.gguf")
    exact = "f32" if "f32" in rig.device.cache_dtypes else None
    return lambda **settings: llorch.load(path, provider=provider_name, cache_type=exact, parallel=4, **settings)


def prompt(seed: int, length: int) -> list[int]:
    return [1, *np.random.default_rng(seed).integers(3, MODEL.vocab, length - 1).tolist()]


# The first tokens behind each of these are decided by a clear margin, 2.8 or more of the logits: rounding, which may be
# another for another number of tokens, may not decide them.
FIRST = prompt(3, 120)
OTHER, SHORT = [*FIRST[:90], *prompt(143, 30)], [*FIRST[:64], *prompt(101, 3)]
FOUR = [prompt(seed, 60) for seed in (55, 109, 143, 39)]


def run(llm: llorch.LLM, prompts: list[list[int]]) -> tuple[list[list[Event]], int]:
    """The events of each, all submitted at once, and how often one of them was preempted."""
    engine = llm.engine()
    found: list[list[Event]] = [[] for _ in prompts]
    for i, tokens in enumerate(prompts):
        request = Request(
            job_id=str(i), prompt=tuple(tokens), max_tokens=COUNT, ignore_eos=True, logprobs=0,
            sampling=SamplingParams(temperature=0.0),
        )  # fmt: skip
        engine.submit(request, found[i].append)
    while engine.step():
        pass
    assert llm.allocator.used == 0
    return found, engine.stats().preemptions


def tokens_of(events: list[Event]) -> list[int]:
    assert isinstance(events[-1], Ended)
    return list(events[-1].tokens)


def logprobs_of(events: list[Event]) -> list[float]:
    return [entry.logprob for event in events if isinstance(event, Token | Ended) for entry in event.logprobs]


def cached(events: list[Event]) -> int:
    assert isinstance(events[0], Started)
    return events[0].cached_tokens


def assert_same(found: list[Event], expected: list[Event], provider: Any) -> None:
    """To the bit where a row's result does not depend on the rows beside it."""
    got, wanted = logprobs_of(found), logprobs_of(expected)
    assert len(got) == len(wanted) == COUNT
    if provider.batch_invariant:
        assert tokens_of(found) == tokens_of(expected), "other tokens"
        assert got == wanted, "other logits"
    else:
        assert tokens_of(found)[:8] == tokens_of(expected)[:8], "other tokens"
        # the steps may round in other ways: a few tokens to int8, many to half
        atol = 0.2 if getattr(provider, "rounds_activations", False) else 0.05
        np.testing.assert_allclose(got[:8], wanted[:8], atol=atol, err_msg="other logits")


def test_a_prompt_whose_beginning_is_in_the_cache_gives_the_same_text(load: Any, provider: Any) -> None:
    later = [FIRST, OTHER, SHORT]
    with load(prefix_cache=False) as llm:
        expected = [run(llm, [tokens])[0][0] for tokens in later]
        assert [cached(events) for events in expected] == [0, 0, 0]
    with load() as llm:
        run(llm, [FIRST])
        found = [run(llm, [tokens])[0][0] for tokens in later]
        together, _ = run(llm, later)
    assert [cached(events) for events in found] == [119, 90, 64], "whole blocks, then the beginning of another"
    for one, both, wanted in zip(found, together, expected, strict=True):
        assert_same(one, wanted, provider)
        assert_same(both, wanted, provider)


def test_prompts_that_come_at_once_share_what_the_first_of_them_computes(load: Any, provider: Any) -> None:
    prompts = [FIRST, FIRST, OTHER]
    with load(prefix_cache=False) as llm:
        expected = [run(llm, [tokens])[0][0] for tokens in prompts]
    with load() as llm:
        found, _ = run(llm, prompts)
    assert [cached(events) for events in found] == [0, 119, 90], "a copy is made while the first goes on in the block"
    for one, wanted in zip(found, expected, strict=True):
        assert_same(one, wanted, provider)


def test_sequences_that_are_preempted_give_the_same_text(load: Any, provider: Any) -> None:
    with load() as llm:
        expected = [run(llm, [tokens])[0][0] for tokens in FOUR]
    with load(cache_tokens=MODEL.context) as llm:
        found, preemptions = run(llm, FOUR)
    assert preemptions > 0
    for one, wanted in zip(found, expected, strict=True):
        assert_same(one, wanted, provider)


def test_a_copy_of_another_block_is_found(load: Any, provider: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(prefix_cache=False) as llm:
        ((expected,), _) = run(llm, [OTHER])
    with load() as llm:
        run(llm, [FIRST])
        copy = llm._bound.sequences._copy
        monkeypatch.setattr(llm._bound.sequences, "_copy", lambda src, dst: copy(src - 1, dst))
        ((found,), _) = run(llm, [OTHER])
        assert cached(found) == 90
    with pytest.raises(AssertionError, match="other"):
        assert_same(found, expected, provider)
