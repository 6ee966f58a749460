"""GET /: a chat page. Plain files beside this one; they speak to /health and /v1/chat/completions alone."""

from __future__ import annotations

from functools import cache
from importlib import resources

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

# file -> media type; the page itself is index.html
ASSETS = {
    "app.js": "text/javascript",
    "api.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
OPEN_PATHS = frozenset({"/", *(f"/page/{name}" for name in ASSETS)})  # they tell nothing, and ask for the key

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@cache
def _read(name: str) -> bytes:
    return (resources.files(__package__) / name).read_bytes()


@get("/", include_in_schema=False)
async def page() -> Response[bytes]:
    return Response(_read("index.html"), media_type="text/html", headers=HEADERS)  # Litestar adds the charset to texts


def _asset(name: str) -> HTTPRouteHandler:
    @get(f"/page/{name}", include_in_schema=False)
    async def asset() -> Response[bytes]:
        return Response(_read(name), media_type=ASSETS[name], headers=HEADERS)

    return asset


ROUTES = (page, *(_asset(name) for name in ASSETS))
