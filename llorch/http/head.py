"""Heads of requests as h11 reads them, with what it leaves open: one limit, and targets that name a host."""

from __future__ import annotations

from urllib.parse import urlsplit

import h11

MAX_HEAD_BYTES = 64 << 10


class Connection(h11.Connection):
    """h11's connection of a server. Raises RemoteProtocolError as that does."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        before = len(self.trailing_data[0]) if self.their_state is h11.IDLE else 0
        event = super().next_event()
        if not isinstance(event, h11.Request):
            return event
        # h11 limits what it holds of a head that goes on: one that comes at once, however large, would pass
        if before - len(self.trailing_data[0]) > MAX_HEAD_BYTES:
            raise h11.RemoteProtocolError("head too long", error_status_hint=431)
        return _in_origin_form(event)


def _in_origin_form(request: h11.Request) -> h11.Request:
    """A request for `http://host/path` as one for `/path`; its host counts before the header Host (RFC 9112, 3.2.2)."""
    target = request.target.decode("ascii")
    if not target.lower().startswith(("http://", "https://")):
        return request
    try:
        host = urlsplit(target).netloc
    except ValueError:
        host = ""
    if not host:
        raise h11.RemoteProtocolError("the target names no host")
    path = target[target.index("://") + len("://") + len(host) :]
    headers = [(b"host", host.encode()), *((name, value) for name, value in request.headers if name != b"host")]
    target = path if path.startswith("/") else f"/{path}"
    return h11.Request(method=request.method, target=target, headers=headers, http_version=request.http_version)
