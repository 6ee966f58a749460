"""Tells a pool every so often that this worker lives, and how busy it is."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import structlog

from llorch.http.callback import shown_url
from llorch.http.service import Worker

log = structlog.stdlib.get_logger(__name__)

TIMEOUT = 10.0  # seconds that a POST may take


async def beat(worker: Worker, url: str, worker_id: str, interval: float) -> None:
    """POSTs the worker's state every `interval` seconds, until it is cancelled. One that is not taken is logged."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    async with httpx.AsyncClient(timeout=min(TIMEOUT, interval)) as client:
        while True:
            try:
                (await client.post(url, json=_state(worker, worker_id))).raise_for_status()
            except httpx.HTTPStatusError as error:
                log.warning("heartbeat not taken", heartbeat=shown_url(url), status=error.response.status_code)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                log.warning("heartbeat not taken", heartbeat=shown_url(url), reason=f"{type(error).__name__}: {error}")
            due = max(due + interval, loop.time())
            await asyncio.sleep(due - loop.time())


def _state(worker: Worker, worker_id: str) -> dict[str, Any]:
    llm, stats = worker.engine.llm, worker.engine.stats()
    assert llm is not None  # the first is sent when the model is ready
    return {
        "worker_id": worker_id,
        "status": "healthy" if worker.unavailable is None else "unhealthy",
        "model": llm.config.name,
        "device": llm.device_info.name,
        "running": stats.running,
        "waiting": stats.waiting,
        "kv_blocks_free": stats.kv_blocks_free,
    }
