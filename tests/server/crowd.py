"""Many clients at once, each with requests one after the other."""

from __future__ import annotations

import asyncio

from tests.server.wire import Answer, connect

JOB = {"prompt": "Once upon a time", "max_tokens": 2, "temperature": 0}


async def ask(url: str, clients: int, requests: int, name: str) -> list[Answer]:
    """The answers to requests that each client sends one after the other, on its own connection."""

    async def client(number: int) -> list[Answer]:
        async with connect(url) as wire:
            jobs = ({"job_id": f"{name} {number} {i}", **JOB} for i in range(requests))
            return [await wire.ask("POST", "/execute", job) for job in jobs]

    answers = await asyncio.gather(*(client(i) for i in range(clients)))
    return [answer for found in answers for answer in found]
