"""Where a stream's events wait for it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """A queue with one reader, who waits until a moment at most. Belongs to the event loop.

    An asyncio.Queue under asyncio.timeout sets a timer for each item, and takes a quarter of what a token costs the
    loop. Here the timer stays as it is while items come, and is set anew when it finds that it rang too early.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[Item] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._ring()

    async def take(self, due: float) -> list[Item]:
        """All items that wait, as soon as there is one; none when the loop's time (time.monotonic) is `due`."""
        if not self._items and due > self._loop.time():
            self._due = due
            if self._timer is None or self._timer.when() > due:
                self._set_timer()
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        found = list(self._items)
        self._items.clear()
        return found

    def close(self) -> None:
        """Nobody reads any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _set_timer(self) -> None:
        self.close()
        self._timer = self._loop.call_at(self._due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._reader is None:
            return
        if self._due > self._loop.time():
            self._set_timer()
        else:
            self._ring()
