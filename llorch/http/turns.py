"""Requests that come at once begin in turn, so that the event loop comes round between them."""

from __future__ import annotations

import asyncio
from collections import deque

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from llorch.http.logs import POLLED_PATHS

BEGIN_TOGETHER = 2  # some ms of the event loop, where the engine is busy too


class Turns:
    """ASGI middleware. A thousand requests in one round of the loop would hold up all streams, and /health, for a
    second: here a few begin in each round, first come, first served. /health and /metrics do not wait.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP and scope["path"] not in POLLED_PATHS:
            await self._turn()
        await self._app(scope, receive, send)

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._begin)
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _begin(self) -> None:
        begun = 0
        while self._waiting and begun < BEGIN_TOGETHER:
            turn = self._waiting.popleft()
            if not turn.done():  # its task may have been cancelled
                turn.set_result(None)
                begun += 1
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._begin)
