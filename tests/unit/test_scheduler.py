"""Who runs, who waits and who gives way, on a real model stepped by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import llorch
from llorch.core.engine import Engine
from llorch.core.requests import Ended, Failed, Request, SamplingParams, Started, Token
from llorch.errors import EngineError, SettingsError
from tests.support import shared
from tests.unit.test_engine import Listener, request, run


def load(**settings: Any) -> llorch.LLM:
    return llorch.load(shared("models", "stories260K.gguf"), provider="numpy-cpu", **settings)


@pytest.fixture(scope="module")
def llm() -> Iterator[llorch.LLM]:
    with load(parallel=4, prefix_cache=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def scarce() -> Iterator[llorch.LLM]:
    """Places for four sequences, and blocks for one whole context: eight of 32 tokens."""
    with load(parallel=4, context=256, cache_tokens=256) as loaded:
        yield loaded


def prompt(number: int, length: int) -> list[int]:
    """Prompts that have no beginning in common."""
    return [1, 260 + number] + [300 + (7 * number + 3 * i) % 200 for i in range(length - 2)]


def submit(engine: Engine, *requests: Request) -> list[Listener]:
    listeners = [Listener() for _ in requests]
    for one, listener in zip(requests, listeners, strict=True):
        engine.submit(one, listener.append)
    return listeners


def finish(engine: Engine) -> None:
    while engine.step():
        pass


# ---- preemption ----


def alone(llm: llorch.LLM, one: Request) -> Listener:
    llm.allocator.clear()
    return run(llm.engine(), one)[0]


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, seed=7, repetition_penalty=1.3, top_k=50)],
    ids=["greedy", "drawn, with a penalty"],
)
def test_when_blocks_run_out_the_youngest_is_computed_again_and_nobody_can_tell(scarce, sampling) -> None:
    requests = [
        request(scarce, f"job {i}", prompt(i, 40), max_tokens=90, ignore_eos=True, sampling=sampling, logprobs=2)
        for i in range(4)
    ]
    expected = [alone(scarce, one) for one in requests]
    scarce.allocator.clear()
    engine = scarce.engine()
    together = submit(engine, *requests)
    finish(engine)
    assert engine.stats().preemptions > 0
    for events, single in zip(together, expected, strict=True):
        assert events.text == single.text
        assert isinstance(events.last, Ended)
        assert events.last.tokens == single.last.tokens
        assert sum(isinstance(event, Started) for event in events) == 1
        tokens = [event for event in events if isinstance(event, Token)]
        assert [token.index for token in tokens] == list(range(len(tokens)))
        assert sum(len(token.logprobs) for token in tokens) + len(events.last.logprobs) == 90
    assert scarce.allocator.used == 0


def test_the_youngest_gives_way_and_comes_back_before_those_that_wait(scarce) -> None:
    scarce.allocator.clear()
    engine = scarce.engine()
    requests = [request(scarce, str(i), prompt(i, 60), max_tokens=120, ignore_eos=True) for i in range(5)]
    submit(engine, *requests)
    while not engine.stats().preemptions:
        assert engine.step()
    running, waiting = ([job.job_id for job in jobs] for jobs in engine.jobs())
    assert running == sorted(running)
    assert waiting == sorted(waiting)
    assert max(running) < min(waiting)
    finish(engine)
    assert scarce.allocator.used == 0


def test_a_preempted_job_is_not_late_for_the_queue_time_limit(scarce) -> None:
    scarce.allocator.clear()
    engine = scarce.engine(queue_timeout=1e-3)
    requests = [request(scarce, str(i), prompt(i, 40), max_tokens=100, ignore_eos=True) for i in range(2)]
    requests += [request(scarce, "third", prompt(3, 40), max_tokens=100, ignore_eos=True)]
    events = submit(engine, *requests)
    finish(engine)
    assert engine.stats().preemptions > 0
    assert [type(listener.last) for listener in events] == [Ended] * 3


def test_a_cache_smaller_than_one_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(SettingsError, match="a cache of 100 tokens is smaller than one context of 256"):
        load(context=256, cache_tokens=100)


# ---- reuse ----


def test_a_prompt_that_begins_like_an_earlier_one_is_not_computed_again() -> None:
    with load(parallel=2) as llm, load(parallel=2, prefix_cache=False) as fresh:
        engine, shared_part = llm.engine(), prompt(0, 110)
        first = request(llm, "first", [*shared_part, 400, 401, 402], max_tokens=8)
        second = request(llm, "second", [*shared_part, 410, 411], max_tokens=8)
        run(engine, first)
        before = engine.stats()
        (events,) = run(engine, second)
        assert isinstance(events[0], Started)
        assert events[0].cached_tokens == 110  # three whole blocks, and a copy of the fourth's beginning
        assert engine.stats().prefix_hit_tokens - before.prefix_hit_tokens == 110
        assert sum(step.prompt_tokens for step in engine.steps()[before.steps :]) == 2
        (expected,) = run(fresh.engine(), second)
        assert expected[0].cached_tokens == 0
        assert events.text == expected.text


def test_a_conversation_that_goes_on_computes_only_what_is_new() -> None:
    with load(parallel=2) as llm:
        engine, first = llm.engine(), prompt(0, 60)
        (events,) = run(engine, request(llm, "first", first, max_tokens=21, ignore_eos=True))
        turn = [*first, *events.last.tokens, 400, 401, 402]
        (again,) = run(engine, request(llm, "second", turn, max_tokens=4))
        assert again[0].cached_tokens == 60 + 20  # the last token of an answer was never an input


def of_prompts(engine: Engine) -> int:
    """Prompt tokens that were computed. One of which only the last token was lacking counts as a decode."""
    return sum(step.prompt_tokens for step in engine.steps())


def test_eight_equal_prompts_at_once_are_computed_once_but_for_each_last_token() -> None:
    with load(parallel=8) as llm, load(parallel=8, prefix_cache=False) as fresh:
        requests = [request(llm, str(i), prompt(0, 500), max_tokens=8, ignore_eos=True) for i in range(8)]
        engine, without = llm.engine(), fresh.engine()
        together, apart = submit(engine, *requests), submit(without, *requests)
        finish(engine)
        finish(without)
        assert of_prompts(engine) == 500
        assert of_prompts(without) == 8 * 500  # the twin: nothing is shared, nobody waits
        assert engine.stats().prefix_hit_tokens == 7 * 499
        assert [events[0].cached_tokens for events in together] == [0] + [499] * 7
        (alone,) = run(fresh.engine(), request(fresh, "alone", prompt(0, 500), max_tokens=8, ignore_eos=True))
        assert {events.last.tokens for events in together + apart} == {alone.last.tokens}


def test_prompts_that_begin_alike_at_once_compute_their_beginning_once_in_order_and_together() -> None:
    with load(parallel=4, chunk=64) as llm:
        engine, beginning = llm.engine(mixed_chunk=64), prompt(0, 320)
        requests = [
            request(llm, str(i), beginning + prompt(9 + i, 12)[1:], max_tokens=8, ignore_eos=True) for i in range(3)
        ]
        events = submit(engine, *requests, request(llm, "other", prompt(5, 40), max_tokens=8, ignore_eos=True))
        for _ in range(5):
            engine.step()
            assert [[job.job_id for job in jobs] for jobs in engine.jobs()] == [["0"], ["1", "2", "other"]]
        engine.step()  # the beginning is there, and the first has 11 more
        assert [job.job_id for job in engine.jobs()[0]] == ["0", "1", "2", "other"]
        finish(engine)
        assert of_prompts(engine) == 320 + 3 * 11 + 40
        assert [listener[0].cached_tokens for listener in events] == [0, 320, 320, 0]


@pytest.mark.parametrize("way", ["cancelled", "discarded", "preempted"])
def test_one_whose_beginning_another_was_computing_goes_on_when_that_is_gone(way: str) -> None:
    with load(parallel=4, chunk=64) as llm:
        engine = llm.engine()
        first, second = submit(
            engine, *(request(llm, name, prompt(0, 400), max_tokens=4, ignore_eos=True) for name in ("1", "2"))
        )
        engine.step()
        assert [job.job_id for job in engine.jobs()[1]] == ["2"]
        scheduler = engine._scheduler
        (job,) = scheduler.running
        if way == "cancelled":
            engine.cancel("1")
        elif way == "discarded":
            engine._end(job, Failed(EngineError("logits are NaN")), discard=True)
        else:
            scheduler._preempt(job)
        finish(engine)
        assert isinstance(second.last, Ended)
        assert isinstance(first.last, Ended if way == "preempted" else Failed)
        assert of_prompts(engine) == (464 if way == "discarded" else 400)
        assert llm.allocator.used == 0


@pytest.mark.parametrize(("priority", "running"), [(-1, ["second", "first"]), (0, ["first"])])
def test_nobody_waits_for_one_that_is_behind_it_in_rank(priority: int, running: list[str]) -> None:
    with load(parallel=4, chunk=64) as llm:
        engine = llm.engine()
        submit(engine, request(llm, "first", prompt(0, 100)))
        engine.step()
        submit(engine, request(llm, "second", prompt(0, 100), priority=priority))
        engine.step()  # it has room for the 36 tokens that the first lacks, and for 28 more
        assert [job.job_id for job in engine.jobs()[0]] == running
        finish(engine)


# ---- order ----


def test_the_lowest_priority_number_runs_first_and_equals_in_order(llm) -> None:
    engine = llm.engine()
    busy = [request(llm, f"busy {i}", prompt(i, 4), max_tokens=10, ignore_eos=True) for i in range(4)]
    submit(engine, *busy)
    engine.step()
    given = {"a": 0, "b": 5, "c": -1, "d": 0, "e": -1}
    submit(engine, *(request(llm, name, [1, 300], max_tokens=2, priority=p) for name, p in given.items()))
    _, waiting = engine.jobs()
    assert [job.job_id for job in waiting] == ["c", "e", "a", "d", "b"]
    finish(engine)


def test_a_key_has_no_more_places_than_it_may_and_others_pass_it_by(llm) -> None:
    engine = llm.engine(max_running_per_key=2)
    keys = {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "a4": "a", "b2": "b"}
    submit(engine, *(request(llm, name, prompt(i, 4), max_tokens=6, key=key, ignore_eos=True)
                     for i, (name, key) in enumerate(keys.items())))  # fmt: skip
    engine.step()
    running, waiting = ([job.job_id for job in jobs] for jobs in engine.jobs())
    assert (running, waiting) == (["a1", "a2", "b1", "b2"], ["a3", "a4"])
    finish(engine)
    assert engine.stats().tokens_generated == 36


def test_decodes_have_their_token_in_every_step_of_a_long_prompt(llm) -> None:
    engine = llm.engine(mixed_chunk=32)
    short = submit(engine, *(request(llm, str(i), prompt(i, 4), max_tokens=40, ignore_eos=True) for i in range(3)))
    engine.step()
    (long,) = submit(engine, request(llm, "long", prompt(9, 200), max_tokens=2))
    before, seen = engine.stats().steps, 0
    while not any(isinstance(event, Token) for event in long):
        engine.step()
        seen += 1
        assert [sum(isinstance(event, Token) for event in events) for events in short] == [1 + seen] * 3
    steps = engine.steps()[before:]
    assert [(step.decodes, step.prompt_tokens) for step in steps] == [(3, 32)] * 6 + [(3, 8)]
    finish(engine)


def test_a_prompt_alone_has_the_whole_chunk(llm) -> None:
    engine = llm.engine(mixed_chunk=32)
    run(engine, request(llm, "long", prompt(9, 200), max_tokens=2))
    assert [(step.decodes, step.prompt_tokens) for step in engine.steps()] == [(0, 200), (1, 0)]
