"""What keeps the pages of other sites away from a worker that has no key and listens to its own machine alone.

A browser on that machine reaches it, for whatever page it shows: a page whose name is made to mean 127.0.0.1 (DNS
rebinding) could read the answers, and any page can post.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

import structlog
from litestar.config.cors import CORSConfig
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Receive, Scope, Send

from llorch.http.errors import send_json
from llorch.http.openai.errors import shaped

log = structlog.stdlib.get_logger(__name__)

READING = frozenset({"GET", "HEAD", "OPTIONS"})  # methods that change nothing
FORWARDED = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip"})  # what a proxy says of the client behind it
MAX_SHOWN = 100


class LocalGuard:
    """ASGI middleware: requests must name this machine, and none may come from another site's page but to read."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str], origins: CORSConfig | None) -> None:
        """`hosts`: names to take beside localhost; `origins`: sites whose pages may ask."""
        self._app, self._origins = app, origins
        self._hosts = {_name(host) for host in hosts} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = self._reason(scope) if scope["type"] == ScopeType.HTTP else None
        if reason is None:
            await self._app(scope, receive, send)
            return
        log.info("request refused", status=403, code="FORBIDDEN", reason=reason)
        await send_json(send, 403, shaped(scope["path"], 403, "FORBIDDEN", reason), {})

    def _reason(self, scope: HTTPScope) -> str | None:
        """Why a request is refused; None where it is not."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host"), headers.get(b"origin")
        if host is not None and not self._is_local(host):  # HTTP/1.0 has none, and no browser speaks it
            return (
                f"without an API key this worker answers to localhost alone, not to {host[:MAX_SHOWN]!r}: "
                "allow the name with --allowed-host, or set LLORCH_API_KEY"
            )
        if origin is not None and scope["method"] not in READING and not self._is_own(origin, host):
            return (
                f"without an API key this worker takes nothing from pages of {origin[:MAX_SHOWN]!r}: "
                "allow them with --allowed-origin, or set LLORCH_API_KEY"
            )
        return None

    def _is_local(self, host: str) -> bool:
        name = _name(host)
        if name == "localhost" or name.endswith(".localhost") or name in self._hosts:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _is_own(self, origin: str, host: str | None) -> bool:
        """Whether a page of this worker asks, or one that may."""
        if self._origins is not None and self._origins.is_origin_allowed(origin):
            return True
        return host is not None and origin.partition("://")[2].lower() == host.lower()


def is_forwarded(scope: Scope) -> bool:
    """Whether a proxy has passed a request on: then the peer's address is not the client's."""
    return any(name in FORWARDED for name, _ in scope["headers"])


def _name(host: str) -> str:
    """The name or address in a Host header; "" where there is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""
