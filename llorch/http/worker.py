"""The routes of the worker contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from litestar import Request, Response, get, post
from litestar.exceptions import HTTPException, InternalServerException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.types import ASGIApp

from llorch import __version__
from llorch.core.llm import LLM
from llorch.errors import CancelledError
from llorch.http.auth import key_of
from llorch.http.bodies import CANCEL_FIELDS
from llorch.http.errors import RETRY_AFTER_SECONDS
from llorch.http.fields import parse_body
from llorch.http.service import Worker

EVENTS = """event: started
data: {"type":"started","job_id":"job-1","model":"stories260K","started_at":"2025-01-01T12:00:00.000+00:00","seed":42}

event: token
data: {"type":"token","t":" there","i":0}

event: metrics
data: {"type":"metrics","tokens_per_sec":51.3,"vram_bytes":1310720}

event: end
data: {"type":"end","tokens_out":64,"decode_time_ms":1228,"stop_reason":"MAX_TOKENS"}

"""

# ---- what responses hold ----


@dataclass
class Healthy:
    """The model is loaded and the engine makes progress."""

    version: str  # llorch's
    model: str
    provider: str
    device: str
    quant_kind: str  # the weight type that holds most bytes
    vram_bytes_used: int  # weights and cache
    tokenizer_kind: str
    vocab_size: int
    context_length: int
    uptime_seconds: float
    capabilities: list[str]
    running: int  # requests
    waiting: int
    kv_blocks_free: int  # what they hold may still be of use to a later request
    status: Literal["healthy"] = "healthy"
    resident: bool = True
    protocol: Literal["sse"] = "sse"


@dataclass
class Loading:
    """The model is being loaded; `progress` is 0.0 to 1.0."""

    progress: float
    status: Literal["loading"] = "loading"


@dataclass
class Unhealthy:
    """No job is taken, for this reason."""

    reason: str
    status: Literal["unhealthy"] = "unhealthy"


@dataclass
class ErrorBody:
    """Why a request was not served, and whether the same request may succeed later."""

    code: str
    message: str
    retriable: bool


@dataclass
class ViolationBody:
    """`value` is left out for the prompt, stop strings and long values."""

    field: str
    constraint: str
    message: str
    value: Any = None


@dataclass
class Violations:
    """Every rule that the body breaks, at once."""

    errors: list[ViolationBody]


@dataclass
class CancelAccepted:
    """`found` is false where no such job waits or runs; that is no error."""

    job_id: str
    found: bool


def spec(body: Any, description: str, media_type: str = "application/json", example: str | None = None) -> ResponseSpec:
    examples = None if example is None else [Example(value=example)]
    return ResponseSpec(
        body, description=description, media_type=media_type, examples=examples, generate_examples=False
    )


INVALID = spec(Violations, "The body breaks the contract; every violation is listed.")
TOO_LARGE = spec(ErrorBody, "BODY_TOO_LARGE: the body has more bytes than the worker takes.")
TOO_SLOW = spec(ErrorBody, "REQUEST_TIMEOUT: the request did not come in time.")

# ---- the routes ----


@get(
    "/health",
    operation_id="health",
    tags=["worker"],
    summary="Whether the worker takes jobs",
    description="Never needs a key. 503 while the model loads, and when the engine is dead, stuck or shutting down.",
    responses={
        200: spec(Healthy, "The worker takes jobs."),
        503: spec(Loading | Unhealthy, "The worker takes no jobs now."),
    },
)
async def health(worker: Worker) -> Response[Any]:
    llm = worker.engine.llm
    if worker.unavailable is None and llm is not None:
        return Response(_healthy(llm, worker))
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS["WORKER_UNHEALTHY"])}
    if worker.loading and not worker.draining:
        return Response(Loading(worker.engine.progress), status_code=503, headers=headers)
    return Response(Unhealthy(worker.unavailable or "the model is not loaded"), status_code=503, headers=headers)


def _healthy(llm: LLM, worker: Worker) -> Healthy:
    stats = worker.engine.stats()
    return Healthy(
        version=__version__,
        model=llm.config.name,
        provider=llm.provider_name,
        device=llm.device_info.name,
        quant_kind=llm.quant_kind,
        vram_bytes_used=llm.device_bytes,
        tokenizer_kind=llm.tokenizer.kind,
        vocab_size=llm.config.vocab_size,
        context_length=llm.context,
        uptime_seconds=round(worker.metrics.uptime, 3),
        capabilities=["text-gen"],
        running=stats.running,
        waiting=stats.waiting,
        kv_blocks_free=stats.kv_blocks_free,
    )


@post(
    "/execute",
    status_code=200,
    operation_id="execute",
    tags=["worker"],
    summary="Generate text, streamed as server-sent events",
    description="The stream begins when the job is accepted into the queue. Its events are `started`, then `token`s "
    "with `metrics` between them, then exactly one of `end` and `error`. Hanging up cancels the job.",
    responses={
        200: spec(str, "The job's events.", "text/event-stream", EVENTS),
        400: INVALID,
        408: TOO_SLOW,
        409: spec(ErrorBody, "JOB_EXISTS: a job of that id waits or runs."),
        413: TOO_LARGE,
        499: spec(ErrorBody, "CANCELLED: the job was cancelled before it was queued."),
        503: spec(ErrorBody, "QUEUE_FULL or WORKER_UNHEALTHY, with the header Retry-After."),
    },
)
async def execute(request: Request[Any, Any, Any], worker: Worker) -> ASGIApp:
    return await worker.start(await read_body(request), key_of(request.scope))


@post(
    "/cancel",
    status_code=202,
    operation_id="cancel",
    tags=["worker"],
    summary="Cancel a job",
    description="Idempotent, also for a job that still waits. Its stream ends with an `error` event, code CANCELLED; "
    "no token follows. A job of another API key is none.",
    responses={
        202: spec(CancelAccepted, "The job ends, or there is none."),
        400: INVALID,
        408: TOO_SLOW,
        413: TOO_LARGE,
    },
)
async def cancel(request: Request[Any, Any, Any], worker: Worker) -> Response[CancelAccepted]:
    job_id: str = parse_body(await read_body(request), CANCEL_FIELDS)["job_id"]
    return Response(CancelAccepted(job_id, worker.cancel(job_id, key_of(request.scope))), status_code=202)


@get(
    "/metrics",
    operation_id="metrics",
    tags=["worker"],
    summary="Prometheus metrics",
    responses={200: spec(str, "Counters, gauges and histograms in Prometheus' text format.", "text/plain")},
)
async def metrics(request: Request[Any, Any, Any], worker: Worker) -> Response[bytes]:
    content, content_type = worker.metrics.render(request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": content_type})  # as a media type it would get a second charset


async def read_body(request: Request[Any, Any, Any]) -> bytes:
    """The raw body: its content type does not matter, and bodies.py says what is wrong with it."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        detail = f"a body in the encoding {encoding[:40]!r} is not taken: send it as it is"
        raise HTTPException(detail, status_code=415, headers={"Accept-Encoding": "identity"})
    try:
        return await request.body()
    except InternalServerException as error:
        raise CancelledError("the request did not come whole") from error


ROUTES = (health, execute, cancel, metrics)
