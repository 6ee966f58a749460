"""The thread that all of a device's calls come from: it loads the model, then steps its engine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llorch.core.engine import Engine
from llorch.core.requests import Request
from llorch.core.scheduler import Emit
from llorch.core.stats import EngineStats
from llorch.errors import EngineUnavailableError, LlorchError

if TYPE_CHECKING:
    from llorch.core.llm import LLM

log = logging.getLogger(__name__)

MOST_FAILURES, FAILURE_SECONDS = 3, 60.0  # an engine that fails so often within this time is given up
RESTART_SECONDS = 1.0  # the device gets a moment, and whoever watches /health sees that something was wrong
WATCH_SECONDS = 0.25  # between two looks at the step that runs


class EngineThread:
    """Loads a model, then steps its engine, on one thread at a time: all of a device's calls come from it.

    A thread that fails ends all jobs in flight with an error that says they may be tried again, and is replaced by
    another with the same weights and an empty cache. The third failure within a minute is final, and so is a step that
    takes longer than `step_timeout` seconds: nothing can stop a kernel. `on_ready`, `on_failed` (the load failed),
    `on_fatal` and `on_step` (a step is over, all its events are given) are called from these threads.
    """

    def __init__(
        self,
        load: Callable[[Callable[[float, str], None]], LLM],
        *,
        max_queue: int = 64,
        step_timeout: float = 60.0,
        restart_seconds: float = RESTART_SECONDS,
        on_ready: Callable[[], None] = lambda: None,
        on_failed: Callable[[], None] = lambda: None,
        on_fatal: Callable[[], None] = lambda: None,
        on_step: Callable[[], None] = lambda: None,
        **engine_options: Any,
    ) -> None:
        """`engine_options`: further ones of LLM.engine."""
        self._load, self._max_queue, self._engine_options = load, max_queue, engine_options
        self._step_timeout, self._restart_seconds = step_timeout, restart_seconds
        self.on_ready, self.on_failed, self.on_fatal, self.on_step = on_ready, on_failed, on_fatal, on_step
        self.progress, self.progress_text = 0.0, "starting"
        self.load_error: BaseException | None = None
        self.fatal: EngineUnavailableError | None = None  # why the process should end
        self.llm: LLM | None = None
        self._engine: Engine | None = None
        self._failure: str | None = None  # why no job is taken now
        self._failures: list[float] = []  # when the engine failed
        self._stopping = threading.Event()
        self._step = 0  # the number of the step that runs; 0: none does
        self._thread = threading.Thread(target=self._main, name="llorch-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def ready(self) -> bool:
        return self._engine is not None and self.health() is None

    @property
    def capacity(self) -> int:
        """How many requests can run and wait at once."""
        return self._max_queue + (0 if self.llm is None else self.llm.limits.max_sequences)

    @property
    def engine(self) -> Engine | None:
        """To look at; None while the model loads."""
        return self._engine

    def submit(self, request: Request, emit: Emit) -> None:
        """As Engine.submit; raises EngineUnavailableError while loading, stopping, failed or being replaced."""
        if self._stopping.is_set():
            raise EngineUnavailableError("the worker is shutting down: send the request to another")
        if self._engine is None:
            raise EngineUnavailableError(f"the model is loading ({self.progress:.0%}): try again soon")
        if (reason := self.health()) is not None:
            raise EngineUnavailableError(reason)
        self._engine.submit(request, emit)

    def cancel(self, job_id: str, error: LlorchError | None = None, key: str | None = None) -> bool:
        """As Engine.cancel."""
        return self._engine is not None and self._engine.cancel(job_id, error, key)

    def stats(self) -> EngineStats:
        found = self._engine.stats() if self._engine is not None else EngineStats()
        return replace(found, failures=len(self._failures))

    def health(self) -> str | None:
        """None while all is well (loading included), else the reason."""
        return self._failure

    def stop(self, timeout: float) -> bool:
        """Fails what still runs, ends the thread and closes the model; False where it did not end in time."""
        self._stopping.set()
        engine = self._engine
        if engine is not None:
            with engine.wake:
                engine.wake.notify_all()
        deadline = time.monotonic() + timeout
        while (thread := self._thread).is_alive() and time.monotonic() < deadline:  # it may have a successor by then
            thread.join(deadline - time.monotonic())
        return not self._thread.is_alive()

    # ---- on the thread ----

    def _main(self) -> None:
        try:
            self.llm = self._load(self._on_progress)
            engine = self.llm.engine(max_queue=self._max_queue, **self._engine_options)
        except BaseException as error:  # noqa: BLE001 -- kept and reported by whoever started the thread
            self.load_error = error
            self._failure = f"loading failed: {error}"
            self.on_failed()
            return
        self.progress, self.progress_text = 1.0, "ready"
        self._engine = engine
        threading.Thread(target=self._watch, args=(engine,), name="llorch-watchdog", daemon=True).start()
        self.on_ready()
        self._run(self.llm, engine)

    def _run(self, llm: LLM, engine: Engine) -> None:
        """Serves until the worker stops, or the engine fails."""
        self._failure = None
        try:
            self._serve(engine)
        except BaseException as error:  # whatever ends the thread, another takes its place
            log.error("the engine failed", exc_info=error)
            if self.fatal is None and self._replace(llm, engine, error):
                return
        engine.fail_all(EngineUnavailableError("the worker shut down before the job was done"))
        llm.close()

    def _replace(self, llm: LLM, engine: Engine, error: BaseException) -> bool:
        """Ends all jobs and starts another thread. False where it is one failure too many, or the worker stops."""
        now = time.monotonic()
        self._step = 0
        self._failures.append(now)
        recent = sum(now - failed < FAILURE_SECONDS for failed in self._failures)
        reason = f"the engine failed: {type(error).__name__}: {error}"
        if recent >= MOST_FAILURES:
            self._give_up(engine, f"{reason}; {recent} failures within {FAILURE_SECONDS:.0f} s")
            return False
        self._failure = reason
        engine.fail_all(EngineUnavailableError(reason))
        engine.forget()
        self._stopping.wait(self._restart_seconds)
        if self._stopping.is_set():
            return False
        log.warning("the engine starts again, with the weights kept (failure %d of %d)", recent, MOST_FAILURES)
        successor = threading.Thread(target=self._run, args=(llm, engine), name="llorch-engine", daemon=True)
        successor.start()
        self._thread = successor
        return True

    def _give_up(self, engine: Engine, reason: str) -> None:
        self.fatal = EngineUnavailableError(reason)
        self._failure = reason
        log.error("the engine is given up: %s", reason)
        try:
            engine.fail_all(self.fatal)
        finally:
            self.on_fatal()

    def _serve(self, engine: Engine) -> None:
        number = 0
        while not self._stopping.is_set() and self.fatal is None:
            with engine.wake:
                while not engine.busy and not self._stopping.is_set():
                    engine.wake.wait()
            number += 1
            self._step = number
            try:
                ran = engine.step()
            finally:
                self.on_step()
            self._step = 0
            if not ran:
                self._rest(engine)

    def _rest(self, engine: Engine) -> None:
        """Jobs wait but none can run (a queue time limit may pass meanwhile): do not spin."""
        with engine.wake:
            if engine.busy and not self._stopping.is_set():
                engine.wake.wait(0.05)

    def _on_progress(self, fraction: float, text: str) -> None:
        self.progress, self.progress_text = fraction, text

    # ---- on the watchdog's thread ----

    def _watch(self, engine: Engine) -> None:
        """Gives the engine up when a step does not end. Counts its own ticks: a process that was stopped for a while
        (a laptop's lid, a debugger) has not stalled."""
        tick = min(WATCH_SECONDS, self._step_timeout / 4)
        step, waited = 0, 0.0
        while not self._stopping.wait(tick):
            waited = waited + tick if self._step and self._step == step else 0.0
            step = self._step
            if waited >= self._step_timeout:
                self._give_up(
                    engine, f"a step of the engine has made no progress for {waited:.1f} s, the limit is --step-timeout"
                )
                return
