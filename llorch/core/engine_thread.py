"""The thread that all of a device's calls come from: it loads the model, then steps its engine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from llorch.core.engine import Engine
from llorch.core.requests import Request
from llorch.core.scheduler import Emit
from llorch.core.stats import EngineStats
from llorch.errors import EngineError, EngineUnavailableError, LlorchError

if TYPE_CHECKING:
    from llorch.core.llm import LLM

log = logging.getLogger(__name__)


class EngineThread:
    """Loads a model, then steps its engine, on one thread: all of a device's calls come from it.

    `on_ready` and `on_failed` are called from that thread.
    """

    def __init__(
        self,
        load: Callable[[Callable[[float, str], None]], LLM],
        *,
        max_queue: int = 64,
        queue_timeout: float | None = None,
        stall_seconds: float = 60.0,
        on_ready: Callable[[], None] = lambda: None,
        on_failed: Callable[[], None] = lambda: None,
    ) -> None:
        self._load, self._max_queue, self._queue_timeout = load, max_queue, queue_timeout
        self._stall_seconds = stall_seconds
        self.on_ready, self.on_failed = on_ready, on_failed
        self.progress, self.progress_text = 0.0, "starting"
        self.load_error: BaseException | None = None
        self.llm: LLM | None = None
        self._engine: Engine | None = None
        self._failure: str | None = None
        self._stopping = threading.Event()
        self._last_step = time.monotonic()
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

    def submit(self, request: Request, emit: Emit) -> None:
        """As Engine.submit; raises EngineUnavailableError while loading, stopping or dead."""
        if self._stopping.is_set():
            raise EngineUnavailableError("the worker is shutting down: send the request to another")
        if self._engine is None:
            raise EngineUnavailableError(f"the model is loading ({self.progress:.0%}): try again soon")
        if (reason := self.health()) is not None:
            raise EngineUnavailableError(reason)
        self._engine.submit(request, emit)

    def cancel(self, job_id: str, error: LlorchError | None = None) -> bool:
        return self._engine is not None and self._engine.cancel(job_id, error)

    def stats(self) -> EngineStats:
        return self._engine.stats() if self._engine is not None else EngineStats()

    def health(self) -> str | None:
        """None while all is well (loading included), else the reason."""
        if self._failure is not None:
            return self._failure
        engine = self._engine
        if engine is not None and not self._thread.is_alive() and not self._stopping.is_set():
            return "the engine thread is dead: restart the worker"
        idle = time.monotonic() - self._last_step
        if engine is not None and engine.busy and idle > self._stall_seconds:
            return f"the engine made no progress for {idle:.0f} s while requests run"
        return None

    def stop(self, timeout: float) -> bool:
        """Fails what still runs, ends the thread and closes the model; False where it did not end in time."""
        self._stopping.set()
        engine = self._engine
        if engine is not None:
            with engine.wake:
                engine.wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # ---- on the thread ----

    def _main(self) -> None:
        try:
            self.llm = self._load(self._on_progress)
        except BaseException as error:  # noqa: BLE001 -- kept and reported by whoever started the thread
            self.load_error = error
            self._failure = f"loading failed: {error}"
            self.on_failed()
            return
        self.progress, self.progress_text = 1.0, "ready"
        engine = self.llm.engine(max_queue=self._max_queue, queue_timeout=self._queue_timeout)
        self._last_step = time.monotonic()
        self._engine = engine
        self.on_ready()
        try:
            self._serve(engine)
        except Exception as error:
            log.exception("the engine failed")
            self._failure = f"the engine failed: {type(error).__name__}: {error}"
            engine.fail_all(EngineError(self._failure))
        else:
            engine.fail_all(EngineUnavailableError("the worker shut down before the job was done"))
        finally:
            self.llm.close()

    def _serve(self, engine: Engine) -> None:
        while not self._stopping.is_set():
            with engine.wake:
                while not engine.busy and not self._stopping.is_set():
                    engine.wake.wait()
                self._last_step = time.monotonic()
            if not engine.step():
                self._rest(engine)

    def _rest(self, engine: Engine) -> None:
        """Jobs wait but none can run (a queue time limit may pass meanwhile): do not spin."""
        with engine.wake:
            if engine.busy and not self._stopping.is_set():
                engine.wake.wait(0.05)

    def _on_progress(self, fraction: float, text: str) -> None:
        self.progress, self.progress_text = fraction, text
