"""GET /debug/engine: what the engine is doing, for whoever looks into a worker that is slow."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from litestar import Request, Response, get
from litestar.exceptions import PermissionDeniedException

from llorch.core.stats import EngineStats, JobRecord
from llorch.http.auth import key_of
from llorch.http.guard import is_forwarded
from llorch.http.service import Worker
from llorch.http.worker import ErrorBody, spec

MOST_LISTED = 100
LOOPBACK = ("127.", "::1", "::ffff:127.")


@dataclass
class StepBody:
    """`began`: seconds since the epoch."""

    began: float
    milliseconds: float
    decodes: int
    prompt_tokens: int


@dataclass
class EngineBody:
    """The jobs in order of rank, at most 100 of each; the last steps, the latest at the end.

    Jobs of other API keys than the one that asks are in the counts of `stats` alone.
    """

    stats: EngineStats
    running: list[JobRecord]
    waiting: list[JobRecord]
    steps: list[StepBody]


@get(
    "/debug/engine",
    operation_id="debug_engine",
    tags=["worker"],
    summary="Running requests, cache blocks, the last steps",
    description="Wants a key where keys are set; without keys only this machine may ask. Prompts are not in it.",
    responses={200: spec(EngineBody, "What the engine does now."), 403: spec(ErrorBody, "Not from this machine.")},
)
async def debug_engine(request: Request[Any, Any, Any], worker: Worker) -> Response[dict[str, Any]]:
    host = request.client.host if request.client is not None else ""
    if key_of(request.scope) is None and (not host.startswith(LOOPBACK) or is_forwarded(request.scope)):
        raise PermissionDeniedException("only this machine may ask while no API key is set")
    engine = worker.engine.engine
    running, waiting = engine.jobs(key_of(request.scope)) if engine is not None else ([], [])
    steps = engine.steps() if engine is not None else []
    body = EngineBody(
        worker.engine.stats(),
        running[:MOST_LISTED],
        waiting[:MOST_LISTED],
        [
            StepBody(round(step.began, 3), round(1000 * step.seconds, 3), step.decodes, step.prompt_tokens)
            for step in steps
        ],
    )
    return Response(asdict(body))


DEBUG_ROUTES = (debug_engine,)
