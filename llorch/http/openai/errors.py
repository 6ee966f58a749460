"""Errors as OpenAI's clients expect them, below /v1: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.types import ExceptionHandler, ExceptionHandlersMap

from llorch.errors import ChatTemplateError, ContextOverflowError, LlorchError, RequestError
from llorch.http.errors import HTTP_CODES, RETRY_AFTER_SECONDS, STATUS, http_message, json_response
from llorch.http.errors import error_body as native_body
from llorch.http.fields import BodyError

log = structlog.stdlib.get_logger(__name__)

PREFIX = "/v1"
MAX_TOLD = 5  # violations in one message
# the worker contract's rules, which hold a field's bounds, by names that clients can tell apart; others: invalid_value
CODES = {
    "json": "invalid_json",
    "type": "invalid_type",
    "required": "missing_required_parameter",
    "unsupported": "unsupported_parameter",
    **dict.fromkeys(("range", "token", "length", "max_length", "max_count"), "out_of_range"),
}


class ModelNotFoundError(RequestError):
    """A request names a model that this worker does not serve."""

    code = "MODEL_NOT_FOUND"


def is_openai(path: str) -> bool:
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def shaped(path: str, status: int, code: str, message: str, retriable: bool = False) -> dict[str, Any]:
    """An error's body in the shape that clients of a path expect; `code` is the worker contract's."""
    if is_openai(path):
        return error_body(status, message, None, code.lower())
    return native_body(code, message, retriable)


def describe(error: LlorchError, path: str) -> tuple[int, dict[str, Any]]:
    """The status and the body for an error that llorch raises on purpose."""
    prompt = "messages" if path.startswith(f"{PREFIX}/chat") else "prompt"
    if isinstance(error, BodyError):
        return 400, _violations(error)
    if isinstance(error, ContextOverflowError):
        return 400, error_body(400, str(error), prompt, "context_length_exceeded")
    if isinstance(error, ChatTemplateError):
        return 400, error_body(400, str(error), prompt, "chat_template")
    if isinstance(error, ModelNotFoundError):
        return 404, error_body(404, str(error), "model", "model_not_found")
    status = STATUS.get(error.code, 500)
    return status, error_body(status, str(error), None, error.code.lower() if error.code in STATUS else "internal")


def _violations(error: BodyError) -> dict[str, Any]:
    """OpenAI's shape has room for one parameter: the first; the message tells of the others too."""
    first, *_ = told = [violation.to_wire() for violation in error.violations[:MAX_TOLD]]
    more = len(error.violations) - len(told)
    message = "; ".join(violation["message"] for violation in told) + (f"; and {more} more" if more else "")
    code = CODES.get(first["constraint"].partition("(")[0], "invalid_value")
    return error_body(400, message, None if first["field"] == "body" else first["field"], code)


def retry_after(error: LlorchError) -> dict[str, str]:
    return {"Retry-After": str(RETRY_AFTER_SECONDS[error.code])} if error.code in RETRY_AFTER_SECONDS else {}


def _answer(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    if isinstance(error, LlorchError):
        status, body = describe(error, request.scope["path"])
        # messages may quote the prompt, where a template refuses it, and stay out of the log
        log.info("request refused", status=status, param=body["error"]["param"], code=body["error"]["code"])
        return json_response(status, body, retry_after(error))
    if isinstance(error, HTTPException):
        status = error.status_code
        code = HTTP_CODES.get(status, "INVALID_REQUEST" if status < 500 else "INTERNAL").lower()
        return json_response(status, error_body(status, http_message(request, error), None, code), error.headers)
    log.error("request failed", exc_info=error)
    return json_response(500, error_body(500, "an internal error: the worker's log has the details", None, "internal"))


def beside(native: ExceptionHandlersMap) -> ExceptionHandlersMap:
    """The handlers of an application: OpenAI's shape below /v1, `native` ones elsewhere."""

    def choose(handler: ExceptionHandler[Any]) -> ExceptionHandler[Any]:
        def handle(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
            return _answer(request, error) if is_openai(request.scope["path"]) else handler(request, error)

        return handle

    return {kind: choose(handler) for kind, handler in native.items()}
