"""How events come from the engine's thread to a stream: at once and in order; and a wait ends when it is due."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from llorch.core.requests import Event, Started, Token
from llorch.http.inbox import Inbox
from llorch.http.job import Mailbox

SOON, LATE = 0.05, 30.0  # seconds; no test waits for the second


def on_a_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            async with asyncio.timeout(LATE / 2):
                await test()

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


@on_a_loop
async def test_all_that_waits_is_taken_at_once_and_in_order() -> None:
    inbox = Inbox[int]()
    for item in (1, 2, 3):
        inbox.put(item)
    assert await inbox.take(0.0) == [1, 2, 3]
    assert await inbox.take(0.0) == []


@on_a_loop
async def test_a_reader_wakes_with_the_first_item_and_has_those_that_came_with_it() -> None:
    inbox = Inbox[int]()
    reading = asyncio.create_task(inbox.take(time.monotonic() + LATE))
    await asyncio.sleep(0)
    inbox.put(1)
    inbox.put(2)
    assert await reading == [1, 2]
    inbox.close()


@on_a_loop
async def test_a_wait_is_over_when_it_is_due_also_behind_items_and_a_longer_wait() -> None:
    inbox = Inbox[int]()
    for seconds in (LATE, SOON):  # the second wait is due before the timer that the first has set
        reading = asyncio.create_task(inbox.take(time.monotonic() + seconds))
        await asyncio.sleep(0)
        inbox.put(1)
        assert await reading == [1]
    for _ in range(2):
        began = time.monotonic()
        assert await inbox.take(began + SOON) == []
        assert time.monotonic() >= began + SOON


@on_a_loop
async def test_items_do_not_set_the_timer_anew() -> None:
    inbox = Inbox[int]()
    timers = set()
    for item in range(5):
        reading = asyncio.create_task(inbox.take(time.monotonic() + LATE))
        await asyncio.sleep(0)
        timers.add(inbox._timer)
        inbox.put(item)
        await reading
    assert len(timers) == 1
    inbox.close()
    assert inbox._timer is None


@on_a_loop
async def test_a_reader_that_is_cancelled_loses_nothing() -> None:
    inbox = Inbox[int]()
    reading = asyncio.create_task(inbox.take(time.monotonic() + LATE))
    await asyncio.sleep(0)
    inbox.put(1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await inbox.take(0.0) == [1]
    inbox.close()


@on_a_loop
async def test_tokens_wake_the_loop_once_when_their_step_is_over_and_other_events_at_once() -> None:
    mailbox, loop = Mailbox(), asyncio.get_running_loop()
    found: list[Event] = []

    async def put(*events: Event, flush: bool = False) -> list[Event]:
        """What the loop has got when the engine's thread has put these."""

        def on_the_engines_thread() -> None:
            for event in events:
                mailbox.put(found.append, event)
            if flush:
                mailbox.flush()

        await loop.run_in_executor(None, on_the_engines_thread)
        await asyncio.sleep(0)  # what the thread has called is called
        return list(found)

    first, second, started = Token("a", 0), Token("b", 1), Started(0.0, 1)
    assert await put(first) == []
    assert await put(second, flush=True) == [first, second]
    assert await put(started) == [first, second, started]
    assert await put(flush=True) == [first, second, started]
