"""The application: routes, errors, /docs, and what wraps them all."""

from __future__ import annotations

from typing import cast

from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from llorch.http import page
from llorch.http.auth import APIKeys
from llorch.http.bodies import CANCEL_FIELDS, execute_fields
from llorch.http.debug import DEBUG_ROUTES
from llorch.http.docs import Body, assets_router, docs_config
from llorch.http.errors import EXCEPTION_HANDLERS
from llorch.http.guard import LocalGuard
from llorch.http.logs import RequestLog
from llorch.http.openai.bodies import Bounds, chat_fields, completion_fields
from llorch.http.openai.completions import Completions
from llorch.http.openai.errors import beside
from llorch.http.openai.routes import CHAT_ANSWER, COMPLETION_ANSWER, OPENAI_ROUTES
from llorch.http.service import Worker
from llorch.http.settings import ServeSettings
from llorch.http.tokens import TOKEN_ROUTES, TOKENIZE_FIELDS, detokenize_fields
from llorch.http.turns import Turns
from llorch.http.worker import ROUTES


def create_app(worker: Worker, settings: ServeSettings, *, loopback: bool) -> ASGIApp:
    """The ASGI application of one worker. `loopback`: whether it listens to its own machine alone."""
    keys = settings.api_keys
    example = {"job_id": "job-1", "prompt": "Once upon a time", "max_tokens": 64, "temperature": 0}
    messages = [{"role": "user", "content": "Tell me a story."}]
    completions = Completions(worker, settings.openai_tokens_limit, settings.alias)
    bodies = {
        "/execute": Body(execute_fields(settings.max_tokens_limit, None), example),
        "/cancel": Body(CANCEL_FIELDS, {"job_id": "job-1"}),
        "/tokenize": Body(TOKENIZE_FIELDS, {"text": "Once upon a time"}),
        "/detokenize": Body(detokenize_fields(None), {"tokens": [1, 403, 407]}),
        "/v1/chat/completions": Body(
            chat_fields(Bounds()), {"messages": messages, "stream": True}, lenient=True, answer=CHAT_ANSWER
        ),
        "/v1/completions": Body(
            completion_fields(Bounds()),
            {"prompt": "Once upon a time", "max_tokens": 64},
            lenient=True,
            answer=COMPLETION_ANSWER,
        ),
    }
    cors = _cors(settings)
    app = Litestar(
        route_handlers=[*ROUTES, *TOKEN_ROUTES, *DEBUG_ROUTES, *OPENAI_ROUTES, *page.ROUTES, assets_router()],
        dependencies={
            "worker": Provide(lambda: worker, sync_to_thread=False),
            "completions": Provide(lambda: completions, sync_to_thread=False),
        },
        exception_handlers=beside(EXCEPTION_HANDLERS),
        cors_config=cors,
        openapi_config=docs_config(bodies, with_keys=bool(keys)),
        request_max_body_size=settings.max_body_bytes,
        logging_config=None,  # logs.py configures all of them
    )
    # around Litestar, not within: routes that do not exist need a correlation id and a key too
    guarded: ASGIApp = Turns(APIKeys(_with_head(app), keys, cors))
    if loopback and not keys:
        guarded = LocalGuard(guarded, settings.known_hosts, cors)
    whole = RequestLog(guarded, worker.metrics.answered)
    return whole if worker.tracer is None else worker.tracer.following(whole)


def _cors(settings: ServeSettings) -> CORSConfig | None:
    """Which sites' pages may ask, where any may. They are to see the headers that help them."""
    if not settings.allowed_origin:
        return None
    shown = ["Retry-After", "X-Correlation-Id", "X-Request-Id"]
    return CORSConfig(allow_origins=settings.allowed_origin, expose_headers=shown)


def _with_head(app: ASGIApp) -> ASGIApp:
    """HEAD wherever there is GET: HTTP asks for it, and some health checks use it. The server leaves out the body."""

    async def as_get(scope: Scope, receive: Receive, send: Send) -> None:
        async def allowing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [(name, _and_head(name, value)) for name, value in message.get("headers", ())]
            await send(message)

        if scope["type"] == ScopeType.HTTP and scope["method"] == "HEAD":
            scope = cast(Scope, {**scope, "method": "GET"})
        await app(scope, receive, allowing)

    return as_get


def _and_head(name: bytes, value: bytes) -> bytes:
    """The value of a header, which may be the list of a path's methods."""
    return value.replace(b"GET", b"GET, HEAD") if name.lower() == b"allow" else value
