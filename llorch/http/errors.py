"""How errors look on the wire: statuses, bodies and headers of the worker contract."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import structlog
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException
from litestar.types import ExceptionHandlersMap, Send

from llorch.errors import LlorchError
from llorch.http.fields import BodyError

log = structlog.stdlib.get_logger(__name__)

STATUS = {
    "INVALID_REQUEST": 400,
    "JOB_EXISTS": 409,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "QUEUE_FULL": 503,
    "QUEUE_TIMEOUT": 503,
    "VRAM_OOM": 503,
    "WORKER_UNHEALTHY": 503,
    "INFERENCE_TIMEOUT": 504,
}
HTTP_CODES = {
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    413: "BODY_TOO_LARGE",
    415: "UNSUPPORTED_ENCODING",
}
RETRY_AFTER_SECONDS = {"QUEUE_FULL": 1, "QUEUE_TIMEOUT": 1, "VRAM_OOM": 5, "WORKER_UNHEALTHY": 5}


def dump_json(content: Any) -> bytes:
    """Plain json: Litestar's encoder refuses integers beyond 64 bits, which clients may send and get back."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode()


def json_response(status: int, content: Any, headers: Mapping[str, str] | None = None) -> Response[bytes]:
    return Response(dump_json(content), status_code=status, media_type=MediaType.JSON, headers=dict(headers or {}))


async def send_json(send: Send, status: int, content: Any, headers: Mapping[str, str]) -> None:
    """A whole JSON response from a place outside Litestar."""
    body = dump_json(content)
    raw = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in raw.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def error_body(code: str, message: str, retriable: bool) -> dict[str, Any]:
    return {"code": code, "message": message, "retriable": retriable}


# ---- what Litestar calls ----


def _violations(_: Request[Any, Any, Any], error: BodyError) -> Response[bytes]:
    # names of unknown fields are the client's own words, and stay out of the log
    broken = [
        v.constraint if v.constraint == "unknown_field" else f"{v.field} {v.constraint}" for v in error.violations
    ]
    log.info("request refused", status=400, violations=len(broken), broken=broken[:10])
    return json_response(400, {"errors": [violation.to_wire() for violation in error.violations]})


def _typed(_: Request[Any, Any, Any], error: LlorchError) -> Response[bytes]:
    status = STATUS.get(error.code, 500)
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS[error.code])} if error.code in RETRY_AFTER_SECONDS else {}
    log.info("request refused", status=status, code=error.code, reason=str(error))
    code = error.code if error.code in STATUS else "INTERNAL"
    return json_response(status, error_body(code, str(error), error.retriable), headers)


def _http(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    status = error.status_code
    code = HTTP_CODES.get(status, "INVALID_REQUEST" if status < 500 else "INTERNAL")
    return json_response(status, error_body(code, http_message(request, error), False), error.headers)


def http_message(request: Request[Any, Any, Any], error: HTTPException) -> str:
    path = request.scope["path"][:200]
    if error.status_code == 404:
        return f"there is no {path} here: /docs lists what there is"
    if error.status_code == 405:
        return f"{path} does not take {request.method}"
    if error.status_code == 413:
        return f"the body is too large: at most {request.route_handler.resolve_request_max_body_size()} bytes are taken"
    return error.detail


def _unexpected(_: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    log.error("request failed", exc_info=error)
    return json_response(500, error_body("INTERNAL", "an internal error: the worker's log has the details", True))


EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    BodyError: _violations,
    LlorchError: _typed,
    HTTPException: _http,
    Exception: _unexpected,
}
