"""Server-sent events as the worker contract wants them: an `event:` line, and the type in the JSON too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast

from litestar.types import Scope, Send

from llorch.core.requests import Ended, Started, Token
from llorch.errors import LlorchError

HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-store, no-transform"),
    (b"x-accel-buffering", b"no"),  # nginx holds a stream back without it
)
KEEP_ALIVE = b": keep-alive\n\n"
IN_SCOPE = "llorch.events"  # the answer is a stream of events: comments may be sent between any two
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for each event
_LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


async def begin(scope: Scope, send: Send) -> None:
    """The head of a stream."""
    cast(dict[str, Any], scope)[IN_SCOPE] = True
    await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})


def encode(kind: str, fields: Mapping[str, object]) -> bytes:
    """One event of the worker contract."""
    return b"event: %s\n%s" % (kind.encode(), data({"type": kind, **fields}))


def data(content: Mapping[str, object]) -> bytes:
    """The `data:` of an event, always a single line: JSON escapes the line breaks that SSE knows, and here the others
    of Unicode are escaped too, at which clients in Python (httpx's and requests' iter_lines) would cut it."""
    line = _JSON.encode(content)
    if not line.isascii():
        line = line.translate(_LINE_BREAKS)
    return f"data: {line}\n\n".encode()


def started(job_id: str, model: str, event: Started) -> bytes:
    at = datetime.fromtimestamp(event.started_at, UTC).isoformat(timespec="milliseconds")
    return encode("started", {"job_id": job_id, "model": model, "started_at": at, "seed": event.seed})


def token(event: Token) -> bytes:
    return encode("token", {"t": event.text, "i": event.index})


def metrics(tokens_per_second: float, vram_bytes: int) -> bytes:
    return encode("metrics", {"tokens_per_sec": round(tokens_per_second, 2), "vram_bytes": vram_bytes})


def end(event: Ended) -> bytes:
    fields: dict[str, object] = {
        "tokens_out": event.tokens_out,
        "decode_time_ms": round(event.decode_seconds * 1000),
        "stop_reason": event.reason.value,
    }
    if event.stop_sequence is not None:
        fields["stop_sequence_matched"] = event.stop_sequence
    return encode("end", fields)


def error(failure: LlorchError) -> bytes:
    return encode("error", {"code": failure.code, "message": str(failure), "retriable": failure.retriable})
