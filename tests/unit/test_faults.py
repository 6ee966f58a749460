"""What fails and what goes on when the device fails, with the provider made for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import llorch
from llorch.core.engine_thread import EngineThread
from llorch.core.requests import Ended, Failed, Request, SamplingParams
from llorch.errors import DeviceMemoryError, EngineError, EngineUnavailableError, UnknownProviderError
from llorch.providers import registry
from llorch.testing.faulty import Fault, InjectedError, parse
from tests.support import shared
from tests.unit.test_engine import Listener, request, run, wait_for


@pytest.fixture
def load(monkeypatch) -> Callable[[str], llorch.LLM]:
    """The model, with these faults."""

    def load(faults: str) -> llorch.LLM:
        monkeypatch.setenv("LLORCH_FAULTS", faults)
        return llorch.load(shared("models", "stories260K.gguf"), provider="faulty", parallel=4)

    return load


def test_the_provider_is_there_when_named_and_nowhere_listed() -> None:
    assert registry.load("faulty").name == "faulty"
    assert "faulty" not in registry.installed()
    with pytest.raises(UnknownProviderError) as caught:
        registry.load("faltuy")
    assert "faulty" not in str(caught.value)


def test_faults_are_read_or_refused() -> None:
    assert parse("raise@4, stall=1.5@7,nan#300") == [
        Fault("raise", step=4),
        Fault("stall", 1.5, step=7),
        Fault("nan", token=300),
    ]
    for wrong in ("explode@3", "raise@", "raise@3#4", "stall=soon@3"):
        with pytest.raises(ValueError, match="is no fault"):
            parse(wrong)


# ---- one request is guilty ----


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_cost_only_the_guilty_job(load, temperature) -> None:
    sampling = SamplingParams(temperature=temperature, seed=1)
    with load("nan#300") as llm:
        guilty, good = run(
            llm.engine(),
            request(llm, "guilty", [1, 300, 5], sampling=sampling),
            request(llm, "good", sampling=sampling),
        )
        assert isinstance(guilty.last, Failed)
        assert isinstance(guilty.last.error, EngineError)
        assert isinstance(good.last, Ended)
        assert llm.allocator.used == 0


def test_what_a_job_with_nan_left_in_the_cache_is_nobodys_beginning(load) -> None:
    """NaN in step 2 alone: the same prompt is well again in step 3, if it does not begin with what step 2 left."""
    tokens = [1] + [403] * 70
    with load("nan@2") as llm:
        engine = llm.engine()
        (well,) = run(engine, request(llm, "well", [1] + [350] * 70, max_tokens=1))
        (ill,) = run(engine, request(llm, "ill", tokens, max_tokens=1))
        (again,) = run(engine, request(llm, "again", tokens, max_tokens=1))
        assert [type(events.last) for events in (well, ill, again)] == [Ended, Failed, Ended]
        assert again[0].cached_tokens == 0


def test_a_request_that_the_device_has_no_memory_for_fails_alone_and_others_have_their_step_again(load) -> None:
    with load("") as llm:
        (expected,) = run(llm.engine(), request(llm, "alone", max_tokens=20))
    with load("memory#300") as llm:
        engine = llm.engine()
        good, guilty = Listener(), Listener()
        engine.submit(request(llm, "good", max_tokens=20), good.append)
        engine.step()
        engine.submit(request(llm, "guilty", [1, 300, 5]), guilty.append)
        while engine.step():
            pass
        assert isinstance(guilty.last, Failed)
        assert isinstance(guilty.last.error, DeviceMemoryError)
        assert (guilty.last.error.code, guilty.last.error.retriable) == ("VRAM_OOM", True)
        assert good.text == expected.text
        assert llm.allocator.used == 0


def test_a_device_without_memory_for_those_that_run_fails_as_a_whole(load) -> None:
    with load("memory@3") as llm:
        engine = llm.engine()
        for name in ("a", "b"):
            engine.submit(request(llm, name), lambda event: None)
        engine.step()
        engine.step()
        with pytest.raises(DeviceMemoryError):
            engine.step()


# ---- nobody is ----


@contextmanager
def served(load: Callable[[str], llorch.LLM], faults: str, **options: float) -> Iterator[EngineThread]:
    thread = EngineThread(lambda progress: load(faults), **options)
    thread.start()
    wait_for(lambda: thread.ready)
    yield thread
    thread.stop(10)


def submit(thread: EngineThread, job_id: str, **fields: object) -> Listener:
    assert thread.llm is not None
    events = Listener()
    thread.submit(request(thread.llm, job_id, **fields), events.append)
    return events


def ended(events: Listener) -> bool:
    return bool(events) and isinstance(events.last, Ended | Failed)


@pytest.mark.parametrize(("fault", "kind"), [("raise@12", InjectedError), ("die@12", SystemExit)])
def test_after_a_failure_another_thread_goes_on_with_the_weights_and_an_empty_cache(load, fault, kind) -> None:
    with served(load, fault, restart_seconds=2.0) as thread:
        llm, first = thread.llm, thread._thread
        expected = submit(thread, "before", max_tokens=4)
        wait_for(lambda: ended(expected))
        hit = [submit(thread, name, max_tokens=50, ignore_eos=True) for name in ("x", "y")]
        wait_for(lambda: all(map(ended, hit)))
        for events in hit:
            assert isinstance(events.last, Failed)
            assert events.last.error.retriable
        assert kind.__name__ in str(thread.health())
        with pytest.raises(EngineUnavailableError, match=kind.__name__):
            submit(thread, "too early")
        wait_for(lambda: thread.health() is None)
        assert thread.llm is llm
        wait_for(lambda: thread._thread is not first)
        again = submit(thread, "after", max_tokens=4)
        wait_for(lambda: ended(again))
        assert again[0].cached_tokens == 0
        assert again.text == expected.text
        assert thread.stats().failures == 1
        assert llm.allocator.used == 0


def test_the_third_failure_within_a_minute_is_final(load) -> None:
    fatal = threading.Event()
    with served(load, "raise#300", restart_seconds=0.0, on_fatal=fatal.set) as thread:
        for i in range(3):
            assert not fatal.is_set()
            wait_for(lambda: thread.health() is None)
            events = submit(thread, str(i), prompt=[1, 300])
            wait_for(lambda events=events: ended(events))
        assert fatal.wait(10)
        assert "3 failures within 60 s" in str(thread.health())
        with pytest.raises(EngineUnavailableError):
            thread.submit(Request(job_id="next", prompt=(1,), max_tokens=1), print)
        wait_for(lambda: not thread._thread.is_alive())


def test_a_step_that_does_not_end_is_found_and_its_jobs_get_no_token_after_the_error(load) -> None:
    fatal = threading.Event()
    with served(load, "stall=1.5@3", step_timeout=0.3, on_fatal=fatal.set) as thread:
        began = time.monotonic()
        events, waits = submit(thread, "stuck", max_tokens=9, ignore_eos=True), Listener()
        thread.submit(request(thread.llm, "waits"), waits.append)
        assert fatal.wait(10)
        assert time.monotonic() - began < 1.5
        assert "no progress" in str(thread.health())
        for listener in (events, waits):
            assert isinstance(listener.last, Failed)
            assert listener.last.error.retriable
        given = len(events)
        wait_for(lambda: not thread._thread.is_alive())
        assert len(events) == given
