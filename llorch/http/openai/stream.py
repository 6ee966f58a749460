"""The response to a request for one or more answers: ASGI applications that send it whole, or as it comes."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from litestar.types import Receive, Scope, Send

from llorch.core.requests import Ended, Event, Failed, Started, Token
from llorch.errors import CancelledError, InferenceTimeoutError, LlorchError
from llorch.http import sse
from llorch.http.errors import send_json
from llorch.http.inbox import Inbox
from llorch.http.job import Job
from llorch.http.openai.errors import describe, retry_after
from llorch.http.openai.responses import Answer, Format
from llorch.http.stream import Timing

DONE = b"data: [DONE]\n\n"
Events = Inbox[tuple[int, Event]]


class Reply(ABC):
    """The jobs of one request and their client. `events` is where job i delivers its events, as (i, event).

    However the response ends, the engine's jobs have ended or are cancelled.
    """

    def __init__(self, jobs: Sequence[Job], events: Events, form: Format, timing: Timing) -> None:
        self._jobs, self._events, self._format, self._timing = jobs, events, form, timing
        self._answers = [Answer() for _ in jobs]
        self._failure: LlorchError | None = None
        self._started = 0.0
        self._scope: Scope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        watch = asyncio.create_task(self._watch(receive))
        try:
            await self._respond(send)
        finally:
            watch.cancel()
            self._events.close()
            self._close()

    @abstractmethod
    async def _respond(self, send: Send) -> None:
        """Sends the response, from its start to its end."""

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._fail(CancelledError("the client left"))

    def _fail(self, error: LlorchError) -> None:
        self._failure = self._failure or error
        for job, answer in zip(self._jobs, self._answers, strict=True):
            if answer.ended is None:
                job.fail(error)

    def _close(self) -> None:
        lost = self._failure or CancelledError("the connection was closed")
        for job, answer in zip(self._jobs, self._answers, strict=True):
            job.close(answer.ended or Failed(job.failure or lost))

    @property
    def _open(self) -> bool:
        return any(answer.ended is None for answer in self._answers)

    async def _next(self, pause: float) -> list[tuple[int, Event]]:
        """All events that wait; none when `pause` seconds have passed. Raises what made one of the jobs fail."""
        found = await self._events.take(self._due(pause))
        for index, event in found:
            if isinstance(event, Failed):
                self._fail(event.error)
            elif isinstance(event, Ended):
                self._answers[index].end(event)
            elif isinstance(event, Started):
                self._started = self._started or time.monotonic()
                self._answers[index].cached_tokens = event.cached_tokens
            else:
                self._answers[index].add(event)
        self._check_time()
        if self._failure is not None:
            raise self._failure
        return found

    def _due(self, pause: float) -> float:
        """The end of the pause, or of the time limit."""
        limit, end = self._timing.limit, time.monotonic() + pause
        return end if limit is None or not self._started else min(end, self._started + limit)

    def _check_time(self) -> None:
        limit, ran = self._timing.limit, time.monotonic() - self._started
        if limit is not None and self._started and ran >= limit and self._open:
            self._fail(InferenceTimeoutError(f"the request ran for {ran:.1f} s, the limit is {limit:g} s"))


class WholeReply(Reply):
    """Everything at once, when all answers have ended."""

    async def _respond(self, send: Send) -> None:
        try:
            while self._open:
                await self._next(self._timing.keep_alive)
        except LlorchError as error:
            status, body = describe(error, self._scope["path"])
            await send_json(send, status, body, retry_after(error))
            return
        await send_json(send, 200, self._format.whole(self._answers), {})


class StreamedReply(Reply):
    """Server-sent events: chunks as they come, then `[DONE]`; an error is an event without one."""

    def __init__(
        self, jobs: Sequence[Job], events: Events, form: Format, timing: Timing, *, include_usage: bool
    ) -> None:
        super().__init__(jobs, events, form, timing)
        self._include_usage = include_usage

    async def _respond(self, send: Send) -> None:
        await sse.begin(self._scope, send)
        await _send(send, sse.KEEP_ALIVE)
        try:
            while self._open:
                chunks = [
                    chunk for found in await self._next(self._timing.keep_alive) for chunk in self._chunks(*found)
                ]
                data = b"".join(self._event(chunk) for chunk in chunks)
                await _send(send, data or sse.KEEP_ALIVE)
        except LlorchError as error:
            _, body = describe(error, self._scope["path"])
            await _send(send, sse.data(body))
        else:
            usage = sse.data(self._format.usage(self._answers)) if self._include_usage else b""
            await _send(send, usage + DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _chunks(self, index: int, event: Event) -> list[dict[str, Any]]:
        match event:
            case Started():
                return self._format.opening(index)
            case Token():
                return [self._format.text(index, event)]
            case Ended():
                return [self._format.closing(index, event)]
        return []

    def _event(self, chunk: dict[str, Any]) -> bytes:
        return sse.data(chunk | {"usage": None} if self._include_usage else chunk)


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
