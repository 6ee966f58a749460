"""The response to POST /execute: a job's events, sent as they come."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from litestar.types import Receive, Scope, Send

from llorch.core.engine_thread import EngineThread
from llorch.core.requests import Ended, Event, Failed, Started, Token
from llorch.errors import CancelledError, InferenceTimeoutError, LlorchError
from llorch.http import sse
from llorch.http.metrics import Metrics

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    keep_alive: float = 10.0  # silence after which a comment is sent
    metrics: float = 1.0  # between two metrics events
    limit: float | None = None  # a job's longest run


class Mailbox:
    """Hands events from the engine's thread to the event loop, with one wake-up for all that gather until it runs.

    A wake-up is a system call, and a step of many jobs has many events.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self._woken = False

    def put(self, queue: asyncio.Queue[Event], event: Event) -> None:
        """From the engine's thread."""
        self._events.append((queue, event))
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # first: what is put from now on wakes the loop again, and nothing is left lying
        while self._events:
            queue, event = self._events.popleft()
            queue.put_nowait(event)


class JobStream:
    """One job between the engine's thread, which calls `emit`, and its client: an ASGI application.

    All but `emit` belongs to the event loop. However the stream ends, the engine's job has ended or is cancelled.
    """

    def __init__(
        self,
        job_id: str,
        model: str,
        engine: EngineThread,
        mailbox: Mailbox,
        metrics: Metrics,
        timing: Timing,
        on_close: Callable[[JobStream], None],
    ) -> None:
        self.job_id = job_id
        self.failure: LlorchError | None = None  # why it ends, whatever the engine still has for it
        self._model, self._engine, self._mailbox, self._metrics = model, engine, mailbox, metrics
        self._timing, self._on_close = timing, on_close
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._accepted = time.monotonic()
        self._last_token = 0.0  # the engine thread's
        self._started = self._first_sent = self._last_sent = self._last_metrics = 0.0
        self._tokens_sent = 0

    # ---- from the engine's thread ----

    def emit(self, event: Event) -> None:
        if isinstance(event, Token):
            now = time.monotonic()
            if self._last_token:
                self._metrics.inter_token.observe(now - self._last_token)
            else:
                self._metrics.first_token.observe(now - self._accepted)
            self._last_token = now
        self._mailbox.put(self._events, event)

    # ---- from the event loop ----

    def fail(self, error: LlorchError) -> None:
        """Ends the job and its stream with `error`; events that wait to be sent are dropped."""
        if self.failure is None:
            self.failure = error
            self._engine.cancel(self.job_id, error)
            self._events.put_nowait(Failed(error))  # wakes the sender

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch(receive))
        last: Ended | Failed = Failed(CancelledError("the connection was closed"))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
            await self._send(send, sse.KEEP_ALIVE)
            last = await self._send_events(send)
            await self._send(send, sse.end(last) if isinstance(last, Ended) else sse.error(last.error))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self._close(last)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.fail(CancelledError("the client left"))

    async def _send_events(self, send: Send) -> Ended | Failed:
        """Sends all but the last event, which it returns."""
        while True:
            data, last = b"", None
            for event in await self._next():
                if isinstance(event, Ended | Failed):
                    last = event
                else:
                    data += self._encode(event)
            if data:
                await self._send(send, data)
            if last is not None:
                return last
            await self._send_what_is_due(send)

    async def _next(self) -> list[Event]:
        """All events that wait, so that a stream that fell behind catches up in one write; none when a timer is due."""
        try:
            async with asyncio.timeout_at(self._loop.time() + self._due_in()):
                events = [await self._events.get()]
        except TimeoutError:
            events = []
        while not self._events.empty():
            events.append(self._events.get_nowait())
        return events if self.failure is None else [Failed(self.failure)]

    def _encode(self, event: Started | Token) -> bytes:
        now = time.monotonic()
        if isinstance(event, Started):
            self._started = now
            return sse.started(self.job_id, self._model, event)
        # the first event's tokens came before the time that the rate is taken over
        self._tokens_sent += event.tokens if self._first_sent else 0
        self._first_sent = self._first_sent or now
        return sse.token(event)

    def _due_in(self) -> float:
        """Seconds until a comment, a metrics event or the end of the time limit is due."""
        due = [self._last_sent + self._timing.keep_alive]
        if self._first_sent:
            due.append(max(self._first_sent, self._last_metrics) + self._timing.metrics)
        if self._started and self._timing.limit is not None:
            due.append(self._started + self._timing.limit)
        return min(due) - time.monotonic()

    async def _send_what_is_due(self, send: Send) -> None:
        now = time.monotonic()
        limit = self._timing.limit
        if limit is not None and self._started and now >= self._started + limit:
            self.fail(InferenceTimeoutError(f"the job ran for {now - self._started:.1f} s, the limit is {limit:g} s"))
        elif self._first_sent and now >= max(self._first_sent, self._last_metrics) + self._timing.metrics:
            rate = self._tokens_sent / (now - self._first_sent)
            self._last_metrics = now
            await self._send(send, sse.metrics(rate, self._engine.stats().device_bytes))
        elif now >= self._last_sent + self._timing.keep_alive:
            await self._send(send, sse.KEEP_ALIVE)

    async def _send(self, send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._last_sent = time.monotonic()

    def _close(self, last: Ended | Failed) -> None:
        details: dict[str, object]
        if isinstance(last, Ended):
            outcome = "ended"
            details = {"stop_reason": last.reason.value, "tokens_out": last.tokens_out}
        else:
            outcome = "cancelled" if isinstance(last.error, CancelledError) else "failed"
            details = {"code": last.error.code, "reason": str(last.error)}
            # not after fail(): the engine has been told, and another job may have the id by now
            if self.failure is None:
                self._engine.cancel(self.job_id, last.error)
        self._metrics.count(outcome)
        duration_ms = round((time.monotonic() - self._accepted) * 1000, 1)
        log.info("job over", job_id=self.job_id[:128], outcome=outcome, duration_ms=duration_ms, **details)
        self._on_close(self)
