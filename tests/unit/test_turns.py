"""Requests that come at once begin a few in each round of the event loop; those that are polled do not wait."""

from __future__ import annotations

import asyncio
from typing import Any

from llorch.http.turns import BEGIN_TOGETHER, Turns


def begin(paths: list[str]) -> list[tuple[int, str]]:
    """The round of the loop in which each request begins, in order."""
    begun: list[tuple[int, str]] = []
    rounds = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.append((rounds, scope["path"]))

    async def count() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    async def main() -> None:
        turns = Turns(app)
        counting = asyncio.create_task(count())
        scopes = [{"type": "http", "path": path} for path in paths]
        await asyncio.gather(*(turns(scope, None, None) for scope in scopes))  # type: ignore[arg-type]
        counting.cancel()

    asyncio.run(main())
    return begun


def test_a_few_begin_in_each_round_in_the_order_in_which_they_came() -> None:
    paths = [f"/{i}" for i in range(50)]
    begun = begin(paths)
    assert [path for _, path in begun] == paths
    rounds = [number for number, _ in begun]
    assert max(rounds.count(number) for number in set(rounds)) == BEGIN_TOGETHER


def test_health_does_not_wait_behind_them() -> None:
    begun = begin([*(f"/{i}" for i in range(50)), "/health"])
    assert begun[0][1] == "/health"


def test_one_that_is_given_up_while_it_waits_takes_no_turn() -> None:
    begun: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.append(scope["path"])

    async def main() -> None:
        turns = Turns(app)
        tasks = [
            asyncio.ensure_future(turns({"type": "http", "path": f"/{i}"}, None, None))  # type: ignore[arg-type, typeddict-item]
            for i in range(4 * BEGIN_TOGETHER)
        ]
        await asyncio.sleep(0)
        tasks[-1].cancel()
        await asyncio.wait(tasks)

    asyncio.run(main())
    assert begun == [f"/{i}" for i in range(4 * BEGIN_TOGETHER - 1)]
