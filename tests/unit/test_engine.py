"""The engine, stepped by hand on a real model: what runs together, what ends, what is given back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import llorch
from llorch.core.engine import Engine
from llorch.core.engine_thread import EngineThread
from llorch.core.requests import Ended, Event, Failed, Request, SamplingParams, Started, StopReason, Token
from llorch.errors import (
    CancelledError,
    ContextOverflowError,
    EngineUnavailableError,
    GGUFError,
    InvalidRequestError,
    JobExistsError,
    QueueFullError,
    QueueTimeoutError,
)
from llorch.providers.conformance.models import OracleModel, TinyModel, write_model
from tests.support import shared

PROMPT = "Once upon a time, Lily saw a big red ball"


@pytest.fixture(scope="module")
def llm() -> Iterator[llorch.LLM]:
    with llorch.load(shared("models", "stories260K.gguf"), provider="numpy-cpu", chunk=32, parallel=4) as loaded:
        yield loaded


@pytest.fixture
def engine(llm) -> Iterator[Engine]:
    llm.allocator.clear()  # what other tests left in the cache
    yield llm.engine(max_queue=3)
    assert llm.allocator.used == 0, "cache blocks leaked"


class Listener(list[Event]):
    @property
    def text(self) -> str:
        return "".join(event.text for event in self if isinstance(event, Token))

    @property
    def last(self) -> Event:
        return self[-1]


def request(llm: llorch.LLM, job_id: str, prompt: str | list[int] = PROMPT, **fields: Any) -> Request:
    ids = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    sampling = fields.pop("sampling", SamplingParams(temperature=0.0))
    return Request(
        job_id=job_id, prompt=tuple(ids), max_tokens=fields.pop("max_tokens", 8), sampling=sampling, **fields
    )


def run(engine: Engine, *requests: Request) -> list[Listener]:
    """Submits all at once and steps until nothing runs."""
    listeners = [Listener() for _ in requests]
    for one, listener in zip(requests, listeners, strict=True):
        engine.submit(one, listener.append)
    while engine.step():
        pass
    return listeners


def test_events_come_in_order_and_are_numbered_without_a_gap(llm, engine) -> None:
    (events,) = run(engine, request(llm, "a"))
    assert isinstance(events[0], Started)
    tokens = [event for event in events if isinstance(event, Token)]
    assert [token.index for token in tokens] == list(range(len(tokens)))
    assert isinstance(events.last, Ended)
    assert events.last.reason is StopReason.MAX_TOKENS
    assert events.last.tokens_out == len(events.last.tokens) == 8
    assert sum(isinstance(event, Ended | Failed) for event in events) == 1


def test_jobs_that_run_together_share_steps_and_give_the_text_they_give_alone(llm, engine) -> None:
    prompts = [PROMPT, "The dog", "One day, a girl named Sue went to the"]
    alone = [run(engine, request(llm, "alone", prompt, max_tokens=24))[0].text for prompt in prompts]
    before = engine.stats()
    requests = [request(llm, f"job {i}", prompt, max_tokens=24) for i, prompt in enumerate(prompts)]
    together = [events.text for events in run(engine, *requests)]
    after = engine.stats()
    assert together == alone
    assert after.shared_steps - before.shared_steps >= 23
    assert after.steps - before.steps <= 26  # not by taking turns: that would be 72


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(llm, engine) -> None:
    def seeded(job_id: str, seed: int) -> Request:
        return request(llm, job_id, max_tokens=16, sampling=SamplingParams(temperature=0.8, top_k=40, seed=seed))

    (alone,) = run(engine, seeded("alone", 5))
    beside = run(engine, seeded("x", 1), seeded("again", 5), seeded("y", 2), request(llm, "greedy", "A cat"))
    assert beside[1].text == alone.text
    assert beside[0].text != alone.text
    assert isinstance(alone[0], Started)
    assert alone[0].seed == 5


def test_a_long_prompt_is_processed_in_chunks_beside_decodes(llm, engine) -> None:
    short, long = Listener(), Listener()
    engine.submit(request(llm, "short", max_tokens=12), short.append)
    engine.step()  # its whole prompt
    prompt = [1] + [403, 407, 261] * 33  # 100 tokens: four chunks of 32 less the decode's token
    engine.submit(request(llm, "long", prompt, max_tokens=2), long.append)
    decoded = []
    for _ in range(4):
        engine.step()
        decoded.append(sum(isinstance(event, Token) for event in short))
        started = sum(isinstance(event, Token) for event in long)
        assert started == (1 if len(decoded) == 4 else 0)
    assert decoded == [2, 3, 4, 5]  # the decode never waited
    while engine.step():
        pass


def test_a_stop_string_ends_a_job_in_front_of_it(llm, engine) -> None:
    (whole,) = run(engine, request(llm, "whole", max_tokens=40))
    stop = whole.text[10:14]
    (stopped,) = run(engine, request(llm, "stopped", max_tokens=40, stop=(stop,)))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert isinstance(stopped.last, Ended)
    assert (stopped.last.reason, stopped.last.stop_sequence) == (StopReason.STOP_SEQUENCE, stop)


def test_the_end_of_generation_ends_a_job_and_is_not_in_its_text(tmp_path) -> None:
    model = TinyModel(seed=4)
    prompt = [1, 50, 100, 200, 7]
    greedy, _ = OracleModel(model).greedy(prompt, 6)
    path = write_model(replace(model, eos_id=greedy[4]), tmp_path / "model.gguf")
    with llorch.load(path, provider="numpy-cpu") as llm:
        engine = llm.engine()
        (ended,) = run(engine, request(llm, "a", prompt, max_tokens=20))
        (ignored,) = run(engine, request(llm, "b", prompt, max_tokens=6, ignore_eos=True))
    assert isinstance(ended.last, Ended)
    assert isinstance(ignored.last, Ended)
    assert (ended.last.reason, ended.last.tokens) == (StopReason.EOS, tuple(greedy[:4]))
    assert (ignored.last.reason, ignored.last.tokens) == (StopReason.MAX_TOKENS, tuple(greedy))


def test_max_tokens_is_cut_to_the_room_in_the_context(llm, engine) -> None:
    prompt = [1] + [403] * (llm.context - 6)
    (events,) = run(engine, request(llm, "a", prompt, max_tokens=100, ignore_eos=True))
    assert isinstance(events.last, Ended)
    assert (events.last.tokens_out, events.last.reason) == (5, StopReason.MAX_TOKENS)


def test_bad_requests_are_refused_with_both_numbers(llm, engine) -> None:
    full = [1] * llm.context
    with pytest.raises(ContextOverflowError, match=rf"prompt is {len(full)} tokens, the context is {llm.context}"):
        engine.submit(request(llm, "a", full), print)
    with pytest.raises(InvalidRequestError, match="token 512 is outside the vocabulary of 512"):
        engine.submit(request(llm, "a", [1, 512]), print)
    with pytest.raises(InvalidRequestError, match="no tokens"):
        engine.submit(request(llm, "a", []), print)
    with pytest.raises(InvalidRequestError, match="max_tokens is 0"):
        engine.submit(request(llm, "a", max_tokens=0), print)
    assert not engine.busy


def test_a_job_id_is_taken_while_it_waits_or_runs(llm, engine) -> None:
    first = Listener()
    engine.submit(request(llm, "a"), first.append)
    with pytest.raises(JobExistsError, match="'a' is waiting or running"):
        engine.submit(request(llm, "a"), print)
    while engine.step():
        pass
    assert isinstance(run(engine, request(llm, "a"))[0].last, Ended)


def test_a_full_queue_refuses_and_serves_those_it_took(llm, engine) -> None:
    listeners = [Listener() for _ in range(7)]  # four run, three wait
    for i, listener in enumerate(listeners):
        engine.submit(request(llm, str(i)), listener.append)
    with pytest.raises(QueueFullError, match="the limit is 3"):
        engine.submit(request(llm, "one too many"), print)
    engine.step()
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (4, 3)
    while engine.step():
        pass
    assert len({listener.text for listener in listeners}) == 1
    assert all(isinstance(listener.last, Ended) for listener in listeners)


def test_cancelling_a_job_that_waits_runs_or_is_in_its_prompt(llm, engine) -> None:
    listeners = {name: Listener() for name in ("decode", "prefill", "b", "c", "queued")}
    engine.submit(request(llm, "decode", max_tokens=50), listeners["decode"].append)
    engine.step()
    engine.submit(request(llm, "prefill", [1] + [403] * 200), listeners["prefill"].append)
    for name in ("b", "c", "queued"):
        engine.submit(request(llm, name, max_tokens=30), listeners[name].append)
    engine.step()
    assert isinstance(listeners["prefill"].last, Started)
    assert listeners["queued"] == []
    for name in ("decode", "prefill", "queued"):
        assert engine.cancel(name)
        assert engine.cancel(name)  # idempotent
    tokens = {name: len(listeners[name]) for name in listeners}
    engine.step()
    for name in ("decode", "prefill", "queued"):
        assert isinstance(listeners[name].last, Failed)
        assert isinstance(listeners[name].last.error, CancelledError)
        assert len(listeners[name]) == tokens[name] + 1  # no token follows
        assert not engine.cancel(name)
    running, _ = engine.jobs()
    assert {job.job_id for job in running} <= {"b", "c"}
    assert llm.allocator.used == sum(job.kv_blocks for job in running)
    while engine.step():
        pass
    assert listeners["b"].text == listeners["c"].text
    assert isinstance(listeners["b"].last, Ended)


def test_waiting_longer_than_the_queue_time_limit_is_an_error(llm) -> None:
    engine = llm.engine(queue_timeout=0.05)
    listeners = [Listener() for _ in range(5)]
    for i, listener in enumerate(listeners):
        engine.submit(request(llm, str(i), [1, 300 + i, 7], max_tokens=200), listener.append)
    engine.step()
    time.sleep(0.06)
    while engine.step():
        pass
    assert [type(listener.last) for listener in listeners] == [Ended] * 4 + [Failed]
    assert isinstance(listeners[4].last, Failed)
    assert isinstance(listeners[4].last.error, QueueTimeoutError)


def test_a_listener_that_raises_costs_no_other_job(llm, engine, caplog) -> None:
    def raises(event: Event) -> None:
        raise RuntimeError("the client's loop is closed")

    good = Listener()
    engine.submit(request(llm, "bad"), raises)
    engine.submit(request(llm, "good"), good.append)
    while engine.step():
        pass
    assert isinstance(good.last, Ended)
    assert "the listener of job bad raised" in caplog.text


# ---- generate: the engine behind the public API ----


def test_generate_streams_the_text_and_gives_blocks_back_when_left(llm) -> None:
    pieces = list(llm.generate(PROMPT, max_tokens=12, temperature=0.0))
    assert "".join(pieces) == llm.tokenizer.decode(llm.generate_ids(llm.tokenizer.encode(PROMPT), max_tokens=12))
    assert len(pieces) > 6
    stream = llm.generate(PROMPT, max_tokens=100, temperature=0.0)
    next(stream)
    stream.close()
    assert llm.allocator.used == 0


def test_generate_from_two_threads_shares_steps(llm) -> None:
    texts: dict[int, str] = {}
    expected = "".join(llm.generate(PROMPT, max_tokens=30, temperature=0.0))
    before = llm._engine.stats()
    barrier = threading.Barrier(2)

    def one(name: int) -> None:
        barrier.wait()
        texts[name] = "".join(llm.generate(PROMPT, max_tokens=30, temperature=0.0))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert texts == {0: expected, 1: expected}
    assert llm._engine.stats().shared_steps > before.shared_steps


# ---- the thread ----


def load_stories(progress: Callable[[float, str], None]) -> llorch.LLM:
    return llorch.load(shared("models", "stories260K.gguf"), provider="numpy-cpu", parallel=2, progress=progress)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def test_the_thread_loads_serves_and_ends() -> None:
    ready = threading.Event()
    thread = EngineThread(load_stories, on_ready=ready.set)
    with pytest.raises(EngineUnavailableError, match="loading"):
        thread.submit(Request(job_id="early", prompt=(1,), max_tokens=1), print)
    thread.start()
    assert ready.wait(20)
    assert thread.ready
    assert thread.progress == 1.0
    assert thread.llm is not None
    events = Listener()
    thread.submit(request(thread.llm, "a"), events.append)
    wait_for(lambda: bool(events) and isinstance(events.last, Ended))
    unfinished = Listener()
    thread.submit(request(thread.llm, "b", max_tokens=400, ignore_eos=True), unfinished.append)
    wait_for(lambda: bool(unfinished))
    assert thread.stop(10)
    assert isinstance(unfinished.last, Failed)
    assert unfinished.last.error.retriable
    with pytest.raises(EngineUnavailableError, match="shutting down"):
        thread.submit(Request(job_id="late", prompt=(1,), max_tokens=1), print)


def test_a_model_that_cannot_load_is_reported_to_the_starter(tmp_path) -> None:
    failed = threading.Event()
    path = tmp_path / "no.gguf"
    path.write_bytes(b"no model")
    thread = EngineThread(lambda progress: llorch.load(path, provider="numpy-cpu"), on_failed=failed.set)
    thread.start()
    assert failed.wait(20)
    assert isinstance(thread.load_error, GGUFError)
    assert "loading failed" in str(thread.health())
