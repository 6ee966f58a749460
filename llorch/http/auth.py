"""API keys: every route but /health and the page at / wants one where any are set."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Any, cast

import structlog
from litestar.config.cors import CORSConfig
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Receive, Scope, Send

from llorch.http import page
from llorch.http.errors import send_json
from llorch.http.openai.errors import error_body, is_openai

KEY_IN_SCOPE = "llorch.key"  # whose request it is: a digest of the key
LOGGED_DIGITS = 8  # of the digest, for the log: enough to tell keys apart, too few to find one again
OPEN_PATHS = page.OPEN_PATHS | {"/health"}


def key_of(scope: Scope) -> str | None:
    """Whose request this is; None where no keys are set."""
    return cast(dict[str, Any], scope).get(KEY_IN_SCOPE)


class APIKeys:
    """ASGI middleware. Wraps the whole application, so that routes that do not exist tell nothing either."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], cors: CORSConfig | None) -> None:
        """`cors`: whose pages may ask, and are to see what is wrong with their key."""
        self._app, self._cors = app, cors
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP or not self._digests or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        token = _bearer(scope["headers"])
        if token is None:
            await self._refuse(scope, send, "MISSING_API_KEY", "send the header Authorization: Bearer KEY")
        elif not self._known(token):
            await self._refuse(scope, send, "INVALID_API_KEY", "this API key is not one of the worker's")
        else:
            key = cast(dict[str, Any], scope)[KEY_IN_SCOPE] = _digest(token).hex()
            structlog.contextvars.bind_contextvars(key=key[:LOGGED_DIGITS])
            await self._app(scope, receive, send)

    def _is_open(self, scope: HTTPScope) -> bool:
        # a browser's question whether a page may ask, which never has a key; nothing else is answered to it
        names = {name for name, _ in scope["headers"]}
        preflight = scope["method"] == "OPTIONS" and {b"origin", b"access-control-request-method"} <= names
        return scope["path"] in OPEN_PATHS or (self._cors is not None and preflight)

    async def _refuse(self, scope: HTTPScope, send: Send, code: str, message: str) -> None:
        body: dict[str, object] = {"error": {"code": code, "message": message}}
        if is_openai(scope["path"]):
            body = error_body(401, message, None, code.lower())
        headers = {"www-authenticate": "Bearer"}
        origin = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"), None)
        if origin is not None and self._cors is not None and self._cors.is_origin_allowed(origin):
            headers |= {"access-control-allow-origin": origin, "vary": "Origin"}
        await send_json(send, 401, body, headers)

    def _known(self, token: bytes) -> bool:
        # digests are of one length and all are compared, so that the time taken tells nothing about any key
        given = _digest(token)
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The token of the first Authorization header, or None where there is no bearer token."""
    value = next((value for name, value in headers if name == b"authorization"), b"")
    scheme, _, token = value.partition(b" ")
    token = token.strip()
    return token if scheme.lower() == b"bearer" and token else None
