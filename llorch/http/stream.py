"""The response to POST /execute: a job's events, sent as they come."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from litestar.types import Receive, Scope, Send

from llorch.core.engine_thread import EngineThread
from llorch.core.requests import Ended, Event, Failed, Started, Token
from llorch.errors import CancelledError, InferenceTimeoutError
from llorch.http import sse
from llorch.http.inbox import Inbox
from llorch.http.job import Job


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    keep_alive: float = 10.0  # silence after which a comment is sent
    metrics: float = 1.0  # between two metrics events
    limit: float | None = None  # a job's longest run


class JobStream:
    """A job and its client: an ASGI application. `events` is where the job delivers to.

    However the stream ends, the engine's job has ended or is cancelled.
    """

    def __init__(self, job: Job, events: Inbox[Event], model: str, engine: EngineThread, timing: Timing) -> None:
        self._job, self._events = job, events
        self._model, self._engine, self._timing = model, engine, timing
        self._started = self._first_sent = self._last_sent = self._last_metrics = 0.0
        self._tokens_sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch(receive))
        last: Ended | Failed = Failed(CancelledError("the connection was closed"))
        try:
            await sse.begin(scope, send)
            await self._send(send, sse.KEEP_ALIVE)
            last = await self._send_events(send)
            await self._send(send, sse.end(last) if isinstance(last, Ended) else sse.error(last.error))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self._events.close()
            self._job.close(last)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._job.fail(CancelledError("the client left"))

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
        events = await self._events.take(self._due())
        return events if self._job.failure is None else [Failed(self._job.failure)]

    def _encode(self, event: Started | Token) -> bytes:
        now = time.monotonic()
        if isinstance(event, Started):
            self._started = now
            return sse.started(self._job.job_id, self._model, event)
        # the first event's tokens came before the time that the rate is taken over
        self._tokens_sent += event.tokens if self._first_sent else 0
        self._first_sent = self._first_sent or now
        return sse.token(event)

    def _due(self) -> float:
        """When a comment, a metrics event or the end of the time limit is due."""
        due = [self._last_sent + self._timing.keep_alive]
        if self._first_sent:
            due.append(max(self._first_sent, self._last_metrics) + self._timing.metrics)
        if self._started and self._timing.limit is not None:
            due.append(self._started + self._timing.limit)
        return min(due)

    async def _send_what_is_due(self, send: Send) -> None:
        now = time.monotonic()
        limit = self._timing.limit
        if limit is not None and self._started and now >= self._started + limit:
            self._job.fail(
                InferenceTimeoutError(f"the job ran for {now - self._started:.1f} s, the limit is {limit:g} s")
            )
        elif self._first_sent and now >= max(self._first_sent, self._last_metrics) + self._timing.metrics:
            rate = self._tokens_sent / (now - self._first_sent)
            self._last_metrics = now
            await self._send(send, sse.metrics(rate, self._engine.stats().device_bytes))
        elif now >= self._last_sent + self._timing.keep_alive:
            await self._send(send, sse.KEEP_ALIVE)

    async def _send(self, send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._last_sent = time.monotonic()
