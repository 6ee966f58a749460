"""One job of the engine, as the event loop sees it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import structlog

from llorch.core.engine_thread import EngineThread
from llorch.core.requests import Ended, Event, Failed, Started, Token
from llorch.errors import CancelledError, LlorchError
from llorch.http.metrics import Metrics

log = structlog.stdlib.get_logger(__name__)

Deliver = Callable[[Event], None]


class Mailbox:
    """Hands events from the engine's thread to the event loop, with one wake-up for all that gather until it runs.

    A wake-up is system calls of both threads, and a step of many jobs has many tokens: they wait for `flush`, when all
    are sampled. Whatever else there is to tell is told at once.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[Deliver, Event]] = deque()
        self._woken = False

    def put(self, deliver: Deliver, event: Event) -> None:
        """From the engine's thread."""
        self._events.append((deliver, event))
        if not isinstance(event, Token):
            self._wake()

    def flush(self) -> None:
        """From the engine's thread, when a step is over."""
        if self._events:
            self._wake()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # first: what is put from now on wakes the loop again, and nothing is left lying
        while self._events:
            deliver, event = self._events.popleft()
            deliver(event)


@dataclass
class Moments:
    """When what happened to a job, in seconds since the epoch; 0 where it did not."""

    accepted: float = field(default_factory=time.time)
    started: float = 0.0
    first_token: float = 0.0
    over: float = 0.0
    cached_tokens: int = 0

    def spans(self) -> Iterator[tuple[str, float, float]]:
        """Its stages as far as it came: name, beginning and end."""
        yield "queue", self.accepted, self.started or self.over
        if self.started:
            yield "prefill", self.started, self.first_token or self.over
        if self.first_token:
            yield "decode", self.first_token, self.over


class Job:
    """A job between the engine's thread, which calls `emit`, and the event loop, where `deliver` gets its events.

    All but `emit` belongs to the event loop.
    """

    def __init__(
        self,
        job_id: str,
        deliver: Deliver,
        engine: EngineThread,
        mailbox: Mailbox,
        metrics: Metrics,
        on_close: Callable[[Job], None],
        key: str | None,
    ) -> None:
        self.job_id, self.key = job_id, key  # ids are one key's own
        self.failure: LlorchError | None = None  # why it ends, whatever the engine still has for it
        self._deliver, self._engine, self._mailbox, self._metrics = deliver, engine, mailbox, metrics
        self._on_close = on_close
        self.moments = Moments()
        self.last: Ended | Failed | None = None
        self._accepted = time.monotonic()
        self._last_token = 0.0  # the engine thread's

    def emit(self, event: Event) -> None:
        """From the engine's thread."""
        if isinstance(event, Token):
            now = time.monotonic()
            if self._last_token:
                self._metrics.inter_token.observe(now - self._last_token)
            else:
                self._metrics.first_token.observe(now - self._accepted)
                self.moments.first_token = time.time()
            self._last_token = now
        elif isinstance(event, Started):
            self._metrics.queued.observe(time.monotonic() - self._accepted)
            self.moments.started, self.moments.cached_tokens = event.started_at, event.cached_tokens
        self._mailbox.put(self._deliver, event)

    def fail(self, error: LlorchError) -> None:
        """Ends the job with `error`, which is delivered; events that wait to be sent are of no more use."""
        if self.failure is None:
            self.failure = error
            self._engine.cancel(self.job_id, error, self.key)
            self._deliver(Failed(error))

    def close(self, last: Ended | Failed) -> None:
        """Counts and logs how it ended. However it was, the engine's job has ended or is cancelled."""
        details: dict[str, object]
        if isinstance(last, Ended):
            outcome = "ended"
            details = {"stop_reason": last.reason.value, "tokens_out": last.tokens_out}
        else:
            outcome = "cancelled" if isinstance(last.error, CancelledError) else "failed"
            details = {"code": last.error.code, "reason": str(last.error)}
            # not after fail(): the engine has been told, and another job may have the id by now
            if self.failure is None:
                self._engine.cancel(self.job_id, last.error, self.key)
        self._metrics.count(outcome)
        self.last, self.moments.over = last, time.time()
        seconds = time.monotonic() - self._accepted
        if outcome == "ended":
            self._metrics.ended.observe(seconds)
        duration_ms, write = round(seconds * 1000, 1), log.warning if outcome == "failed" else log.info
        write("job over", job_id=self.job_id[:128], outcome=outcome, duration_ms=duration_ms, **details)
        self._on_close(self)
