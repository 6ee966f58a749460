"""HTTP/1.1 as uvicorn speaks it, with what it leaves open: limits for clients that neither send nor read."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import sys
from dataclasses import dataclass
from typing import Any, cast

import h11
import structlog
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from llorch.http import sse
from llorch.http.errors import RETRY_AFTER_SECONDS, dump_json
from llorch.http.head import MAX_HEAD_BYTES, Connection
from llorch.http.logs import correlation_headers, correlation_id_of
from llorch.http.openai.errors import shaped

log = structlog.stdlib.get_logger(__name__)

CODES = {
    400: "INVALID_REQUEST",
    408: "REQUEST_TIMEOUT",
    431: "HEADERS_TOO_LARGE",
    501: "NOT_IMPLEMENTED",
    503: "TOO_MANY_CONNECTIONS",
}
_QUOTED = re.compile(r":? ?(bytearray\()?b['\"].*", re.DOTALL)  # the client's bytes, as h11's messages show them
# uvicorn's own, but for a warning without peer or reason at each request that is refused here
_uvicorn_log = logging.getLogger("uvicorn.error.connections")
_uvicorn_log.setLevel(logging.ERROR)


LOOK_SECONDS = 0.02  # between two looks for what a connection's other end says


@dataclass(frozen=True)
class Limits:
    """What a connection may take."""

    read_seconds: float = 30.0  # from a request's first byte (or the connection's start) to its last
    write_seconds: float = 60.0  # in which a client that is sent something reads some of it
    connections: int = sys.maxsize


class LimitedProtocol(H11Protocol):
    """uvicorn times connections between two requests; this class those within one."""

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = Connection()
        self.logger = _uvicorn_log
        self._limits = limits
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unsent = 0  # bytes, when the timer was set
        self._no_more = False  # requests: the client has closed its side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # pause_writing as soon as the client's system takes no more
        if len(self.connections) > self._limits.connections:
            self._refuse(503, f"{self._limits.connections} connections are open, which is the limit: try later")
        else:
            self._time_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    # ---- clients that do not send ----

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._no_more and self.cycle.response_complete:  # and no pipelined request has begun
            self.transport.close()
        self._time_reading()  # the head of a pipelined request may be here in part

    def _time_reading(self) -> None:
        if not self._reading or self.transport.is_closing():
            self._stop_read_timer()
        elif self._read_timer is None:
            self._read_timer = self.loop.call_later(self._limits.read_seconds, self._late)

    @property
    def _reading(self) -> bool:
        """A request is here in part, or the first is to come."""
        if self.conn.their_state is h11.IDLE:
            return self.cycle is None or bool(self.conn.trailing_data[0])
        return self.conn.their_state is h11.SEND_BODY

    def _late(self) -> None:
        self._read_timer = None
        seconds = self._limits.read_seconds
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            log.info("connection closed", reason="the client has asked for nothing", peer=self._peer, limit_s=seconds)
            self.transport.close()
            return
        self._refuse(408, f"the request did not come within {seconds:g} s: send it faster")

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    # ---- clients that send no more, and those that have left ----

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's type; uvicorn's own always closes
        """A client may close its side behind a whole request, and wait for the answer. Whether one does.

        It looks the same when it has left, and its job is to end then. What it is sent now tells: whoever waits passes
        over it, and the system of a client that has left answers with a reset.
        """
        self._no_more = self.cycle is not None and not self.cycle.response_complete and not self._reading
        if not self._no_more or self.scope["http_version"] == "1.0":  # which knows no interim responses
            return False
        if self.conn.our_state is h11.SEND_RESPONSE:
            self._write(h11.InformationalResponse(status_code=100, headers=[], reason="Continue"))
        elif sse.IN_SCOPE in self.scope:
            self._write(h11.Data(data=sse.KEEP_ALIVE))
        self._look_for_reset()
        return True

    def _look_for_reset(self) -> None:
        if self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self.loop.call_later(LOOK_SECONDS, self._look_for_reset)

    # ---- clients that do not read ----

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def _time_writing(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self._limits.write_seconds, self._stalled)

    def _stalled(self) -> None:
        if self.transport.get_write_buffer_size() < self._unsent:
            self._time_writing()
            return
        log.info("connection closed", reason="the client did not read", limit_s=self._limits.write_seconds)
        self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # ---- what never reaches the application ----

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this where it catches h11's error, which knows a better status and the reason."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        reason = f"more than {MAX_HEAD_BYTES} bytes of headers" if status == 431 else _QUOTED.sub("", str(error))
        self._refuse(status, f"this is no HTTP request that can be served: {reason}")

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: HTTP lets a server pass over an upgrade, and some clients ask for HTTP/2 each time."""

    def _refuse(self, status: int, reason: str) -> None:
        """Answers, where that is still possible, and closes the connection."""
        begun = self.cycle is not None and not self.cycle.response_complete
        if begun:
            self.cycle.disconnected = True  # the application need not wait for the rest of the body, nor answer
            self.cycle.message_event.set()
        scope: Any = self.scope if begun else {"path": "", "method": "", "headers": []}  # not the last request's
        correlation_id, code = correlation_id_of(scope), CODES.get(status, "INVALID_REQUEST")
        line = {"status": status, "code": code, "reason": reason, "peer": self._peer}
        log.info("request refused", **line, correlation_id=correlation_id)
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = dump_json(shaped(scope["path"], status, code, reason, retriable=status in (408, 503)))
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *correlation_headers(correlation_id),
            (b"connection", b"close"),
        ]
        if status == 503:
            headers.append((b"retry-after", str(RETRY_AFTER_SECONDS["QUEUE_FULL"]).encode()))
        self._write(h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]))
        self._write(h11.Data(data=b"" if scope["method"] == "HEAD" else body))
        self._write(h11.EndOfMessage())
        self.transport.close()

    def _write(self, event: h11.Event) -> None:
        self.transport.write(self.conn.send(event) or b"")

    @property
    def _peer(self) -> str | None:
        return f"{self.client[0]}:{self.client[1]}" if self.client else None
