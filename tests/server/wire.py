"""HTTP/1.1 as bytes on a socket: for a thousand clients in one process, and for what no good client would send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

ANSWER_SECONDS = 60.0


@dataclass
class Answer:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The `data:` lines of a stream."""
        lines = (line.removeprefix(b"data: ") for line in self.body.splitlines() if line.startswith(b"data: "))
        return [json.loads(line) if line != b"[DONE]" else "[DONE]" for line in lines]


class HungError(AssertionError):
    """No whole answer came in time."""


class Wire:
    """One connection. Reads raise EOFError where the server has closed it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Sends a request and reads its answer; `body` is bytes, or what is sent as JSON."""
        await self.send(request(method, path, body, headers))
        return await self.answer()

    async def answer(self, seconds: float = ANSWER_SECONDS) -> Answer:
        """The next whole answer, but for 100 Continue."""
        try:
            async with asyncio.timeout(seconds):
                status, headers = await self.head()
                return Answer(status, headers, b"".join([part async for part in self.parts(status, headers)]))
        except TimeoutError as error:
            raise HungError(f"no whole answer within {seconds:g} s") from error

    async def head(self) -> tuple[int, dict[str, str]]:
        status = 100
        while status == 100:
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(lines[0].split(" ")[1])
        pairs = (line.split(": ", 1) for line in lines[1:] if line)
        return status, {name.lower(): value for name, value in pairs}

    async def parts(self, status: int, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The body, as it comes."""
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        elif "content-length" in headers:
            yield await self.reader.readexactly(int(headers["content-length"]))
        elif status not in (204, 304):
            yield await self.reader.read()

    async def closed(self, seconds: float = ANSWER_SECONDS) -> bytes:
        """What comes until the server closes the connection."""
        try:
            async with asyncio.timeout(seconds):
                return await self.reader.read()
        except ConnectionResetError:
            return b""
        except TimeoutError as error:
            raise HungError(f"the connection was not closed within {seconds:g} s") from error

    def hang_up(self) -> None:
        """Gone at once: whatever the server still sends is answered by a reset."""
        self.writer.transport.abort()


def request(method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a request."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    fields = {"Host": "localhost", **(headers or {})}
    if body is not None and "Transfer-Encoding" not in fields:
        fields = {"Content-Length": str(len(content)), **fields}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + content


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[Wire]:
    parsed = httpx.URL(url)
    reader, writer = await asyncio.open_connection(parsed.host, parsed.port, limit=1 << 20)
    wire = Wire(reader, writer)
    try:
        yield wire
    finally:
        wire.hang_up()
