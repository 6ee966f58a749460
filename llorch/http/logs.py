"""Structured logs, and what ties their lines to a request: the correlation id."""

from __future__ import annotations

import logging
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any, Literal, TextIO, cast

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from rich.console import Console

LogFormat = Literal["auto", "json", "console"]

HEADERS = (b"x-correlation-id", b"x-request-id")  # the contract's name, and many proxies'; both are taken, and sent
ID_IN_SCOPE = "llorch.correlation_id"
MAX_ID_LENGTH = 128
POLLED_PATHS = frozenset({"/health", "/metrics"})  # asked for every few seconds: logged at debug level only

log = structlog.stdlib.get_logger(__name__)


def configure_logging(log_format: LogFormat, level: str) -> bool:
    """Sends every line, of llorch and of its libraries, to stdout in one format; whether that is JSON.

    "auto" is "console" on a terminal and "json" elsewhere. `level` is one of logging's names.
    """
    terminal, out = sys.stdout.isatty(), Console(file=sys.stdout)
    colours = out.color_system is not None and not out.no_color  # by NO_COLOR, FORCE_COLOR and TERM, as the commands
    as_json = log_format == "json" or (log_format == "auto" and not terminal)
    stamp = structlog.processors.TimeStamper
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        stamp("%H:%M:%S", utc=False) if terminal and not as_json else stamp("iso", utc=True),
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(as_json, colours)],
    )
    handler = _TerminalHandler() if terminal else logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for noisy in ("uvicorn", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return as_json


class _TerminalHandler(logging.StreamHandler[TextIO]):
    """Writes to what sys.stdout is now: while a bar is shown it is what moves the bar out of the way."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # as in logging's own handler of last resort
        return sys.stdout


def _renderers(as_json: bool, colors: bool) -> list[structlog.types.Processor]:
    if as_json:
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    # the default formatter of exceptions prints local variables, and a prompt may be among them
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain, pad_event_to=0, sort_keys=False)]


class RequestLog:
    """ASGI middleware around everything: a correlation id for each request, and one line when it is over."""

    def __init__(self, app: ASGIApp, answered: Callable[[str, int], None]) -> None:
        """`answered` is told the route's template and the status of each answer."""
        self._app, self._answered = app, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        correlation_id = correlation_id_of(scope)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(correlation_id=correlation_id, client=(scope.get("client") or ("",))[0])
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *correlation_headers(correlation_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._answered(cast(dict[str, Any], scope).get("path_template", "other"), status)
            _log_request(scope, status, time.monotonic() - began)


def _log_request(scope: Any, status: int, seconds: float) -> None:
    # neither query nor headers: a prompt or a key may be in them
    line = {"method": scope["method"], "path": scope["path"][:200], "status": status}
    write = log.debug if scope["path"] in POLLED_PATHS else log.info
    write("request", **line, duration_ms=round(seconds * 1000, 1))


def correlation_headers(correlation_id: str) -> list[tuple[bytes, bytes]]:
    """What a response carries of its request's id."""
    return [(name, correlation_id.encode()) for name in HEADERS]


def correlation_id_of(scope: Any) -> str:
    """A request's id: the client's where it is 1 to 128 printable ASCII characters, else a new one that stays."""
    if ID_IN_SCOPE not in scope:
        sent = {name: value for name, value in reversed(scope["headers"]) if _is_id(value)}
        scope[ID_IN_SCOPE] = next((sent[name].decode("ascii") for name in HEADERS if name in sent), uuid.uuid4().hex)
    return str(scope[ID_IN_SCOPE])


def _is_id(value: bytes) -> bool:
    return 0 < len(value) <= MAX_ID_LENGTH and all(0x21 <= byte <= 0x7E for byte in value)
