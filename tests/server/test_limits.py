"""Connections that take long, hold much, or speak something else: each has an end, and none is an error of ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack

import httpx
import pytest

from tests.server.conftest import Start
from tests.server.process import Server, eventually
from tests.server.wire import Answer, connect, request

JOB = {"job_id": "limits", "prompt": "Once", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def strict(start: Start) -> Iterator[Server]:
    server = start("--read-timeout", "0.5", "--write-timeout", "0.5", "--max-tokens-limit", "400").wait_healthy()
    yield server
    server.close()


def talk(url: str, *parts: bytes, pause: float = 0.0, answers: int = 1) -> tuple[list[Answer], bytes]:
    """Sends the parts with a pause between them; the answers, and what comes until the server closes."""

    async def conversation() -> tuple[list[Answer], bytes]:
        async with connect(url) as wire:

            async def send() -> None:
                for part in parts:
                    await wire.send(part)
                    await asyncio.sleep(pause)

            sending = asyncio.create_task(send())
            found = [await wire.answer(10) for _ in range(answers)]
            sending.cancel()
            closes = not found or found[-1].headers.get("connection") == "close"
            return found, await wire.closed(10) if closes else b""

    return asyncio.run(conversation())


def rest_of(url: str, sent: bytes) -> tuple[bytes, int]:
    """All that comes until the server closes, and the client's port."""

    async def conversation() -> tuple[bytes, int]:
        async with connect(url) as wire:
            await wire.send(sent)
            return await wire.closed(10), wire.writer.get_extra_info("sockname")[1]

    return asyncio.run(conversation())


# ---- clients that are slow ----

SLOW = {
    "head": [b"POST /execute HTTP/1.1\r\n", *[b"X-Slow: 1\r\n"] * 20],
    "body": [request("POST", "/execute", b"", {"Content-Length": "100"}), *[b" "] * 20],
    "chunked body": [
        request("POST", "/execute", b"", {"Transfer-Encoding": "chunked"}),
        *[b"1\r\n \r\n"] * 20,
    ],
    "body of a route that takes none": [
        request("GET", "/metrics", b"", {"Content-Length": "100", "Connection": "close"}),
        *[b" "] * 20,
    ],
}


@pytest.mark.parametrize("where", SLOW)
def test_a_request_that_trickles_in_ends_with_408(strict: Server, where: str) -> None:
    began = time.monotonic()
    answers, rest = talk(strict.url, *SLOW[where], pause=0.1)
    assert time.monotonic() - began < 5
    if where == "body of a route that takes none":
        assert answers[0].status == 200  # at once
    else:
        assert (answers[0].status, answers[0].json()["code"]) == (408, "REQUEST_TIMEOUT")
        assert answers[0].json()["retriable"] is True
        assert "0.5 s" in answers[0].json()["message"]
    assert rest == b""


def test_below_v1_a_408_has_the_shape_of_openai(strict: Server) -> None:
    parts = [request("POST", "/v1/completions", b"", {"Content-Length": "100"}), *[b" "] * 20]
    answers, _ = talk(strict.url, *parts, pause=0.1)
    assert answers[0].status == 408
    assert answers[0].json()["error"]["code"] == "request_timeout"


def test_a_connection_that_says_nothing_is_closed(strict: Server) -> None:
    assert talk(strict.url, answers=0) == ([], b"")
    # and again behind an answer: the next request begins and does not go on
    first = request("GET", "/health")
    answers, _ = talk(strict.url, first, b"GET /hea", pause=0.05, answers=2)
    assert [answer.status for answer in answers] == [200, 408]


def test_a_request_as_slow_as_is_allowed_is_served(strict: Server) -> None:
    sent = request("POST", "/execute", JOB)
    answers, _ = talk(strict.url, sent[:40], sent[40:90], sent[90:], pause=0.05)
    assert (answers[0].status, answers[0].events[-1]["type"]) == (200, "end")


def test_an_answer_takes_longer_than_a_request_may(start: Start) -> None:
    """The limits are the client's: neither an idle stream nor an idle connection between two requests is cut off."""
    limits = ("--read-timeout", "0.2", "--write-timeout", "0.2")
    server = start("--provider", "paced", *limits, env={"PACED_STEP_SECONDS": "0.3"}).wait_healthy()
    with server.client() as client:
        for number in range(2):
            response = client.post("/execute", json=JOB | {"job_id": f"idle {number}", "max_tokens": 3})
            assert '"stop_reason"' in response.text
            time.sleep(0.5)
    server.close()


def test_a_client_that_does_not_read_is_cut_off(strict: Server) -> None:
    """Thousands of requests whose answers it leaves where they are."""
    sent = request("GET", "/docs/openapi.json") * 500

    async def conversation() -> None:
        async with connect(strict.url) as wire:
            wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
            wire.writer.write(sent)
            await asyncio.to_thread(lambda: eventually(lambda: cut_off() > before, 20, "a connection that is closed"))

    def cut_off() -> int:
        return len(strict.logged("connection closed", reason="the client did not read"))

    before = cut_off()
    asyncio.run(conversation())


# ---- clients that send no more, and those that have left ----

BEHIND = {
    "a stream": request("POST", "/execute", JOB | {"max_tokens": 300}),
    "a stream of chunks": request("POST", "/v1/completions", {"prompt": "Once", "max_tokens": 300, "stream": True}),
    "a whole answer": request("POST", "/v1/completions", {"prompt": "Once", "max_tokens": 300}),
    "a short one": request("GET", "/v1/models"),
    "several": request("GET", "/v1/models") * 3,
}


@pytest.fixture(scope="module")
def single(start: Start) -> Iterator[Server]:
    """One job at a time, 10 ms for a step, and nothing is due to be sent to those that wait."""
    options = ("--provider", "paced", "--parallel", "1", "--keep-alive", "600", "--metrics-interval", "600")
    server = start(*options, env={"PACED_STEP_SECONDS": "0.01"}).wait_healthy()
    yield server
    server.close()


# at once, and in the midst of the answers that take their time
@pytest.mark.parametrize(
    ("name", "pause"), [*((name, 0.0) for name in BEHIND), *((name, 0.1) for name in [*BEHIND][:3])]
)
def test_a_client_that_closes_its_side_behind_a_request_gets_its_answer(
    server: Server, name: str, pause: float
) -> None:
    async def conversation() -> tuple[list[Answer], bytes]:
        async with connect(server.url) as wire:
            await wire.send(BEHIND[name])
            await asyncio.sleep(pause)
            wire.writer.write_eof()
            found = [await wire.answer(10) for _ in range(3 if name == "several" else 1)]
            return found, await wire.closed(10)

    before = len(server.logged("request refused"))
    answers, rest = asyncio.run(conversation())
    assert [answer.status for answer in answers] == [200] * len(answers)
    if "stream" in name:
        assert answers[0].events[-1] == "[DONE]" or answers[0].events[-1]["type"] == "end"
    assert rest == b""
    assert len(server.logged("request refused")) == before


def test_a_client_that_leaves_frees_its_place_though_nothing_is_due_to_be_sent(single: Server) -> None:
    def load() -> tuple[float, float]:
        metrics = single.metrics()
        return metrics["llorch_running_requests"], metrics["llorch_queue_depth"]

    for name in ("a stream", "a stream of chunks", "a whole answer"):
        for ahead in (False, True):  # whether it runs or waits

            async def conversation(name: str = name, ahead: bool = ahead) -> None:
                async with connect(single.url) as first, connect(single.url) as wire:
                    if ahead:
                        await first.send(request("POST", "/execute", JOB | {"job_id": "ahead", "max_tokens": 400}))
                        await asyncio.to_thread(lambda: eventually(lambda: load()[0] == 1))
                    await wire.send(BEHIND[name])
                    index = 1 if ahead else 0
                    await asyncio.to_thread(lambda: eventually(lambda: load()[index] == 1))
                    wire.writer.close()  # as any client does: it sends no reset by itself
                    began = time.monotonic()
                    await asyncio.to_thread(lambda: eventually(lambda: load()[index] == 0, 3, f"{name} to be left"))
                    assert time.monotonic() - began < 1

            asyncio.run(conversation())
            eventually(lambda: load() == (0, 0), 5)


# ---- clients that are many ----


def test_connections_beyond_what_the_system_allows_are_told_so(start: Start) -> None:
    descriptors = 128 + 32  # the first are the server's own
    server = start(wrapper=("sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh")).wait_healthy()

    async def crowd() -> list[Answer]:
        async with AsyncExitStack() as stack:
            wires = [await stack.enter_async_context(connect(server.url)) for _ in range(40)]
            for wire in wires[:30]:
                assert (await wire.ask("GET", "/health")).status == 200
            return [await wire.answer(10) for wire in wires[-5:]]  # unasked: they are not let in at all

    for answer in asyncio.run(crowd()):
        assert (answer.status, answer.json()["code"]) == (503, "TOO_MANY_CONNECTIONS")
        assert answer.headers["retry-after"]
        assert "32 connections" in answer.json()["message"]
    server.wait_healthy()  # once the crowd has gone
    server.close()


# ---- what is no request, or one of an unusual kind ----

BIG = b"x" * 70_000
CASES: dict[str, tuple[bytes, int]] = {
    "binary": (bytes(range(256)) * 4 + b"\r\n\r\n", 400),
    "tls": (bytes.fromhex("1603010200010001fc0303") + b"\r\n\r\n", 400),
    "http/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
    "no version": (b"GET /health\r\n\r\n", 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "a space before the colon": (b"GET /health HTTP/1.1\r\nHost : a\r\n\r\n", 400),
    "a NUL in the target": (b"GET /hea\x00lth HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a NUL in a header": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: \x00\r\n\r\n", 400),
    "a negative length": (b"POST /cancel HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
    "a length that is no number": (b"POST /cancel HTTP/1.1\r\nHost: localhost\r\nContent-Length: ten\r\n\r\n", 400),
    "two lengths": (
        b"POST /cancel HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        400,
    ),
    "a chunk without a size": (
        b"POST /cancel HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        400,
    ),
    "an unknown transfer encoding": (
        b"POST /cancel HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        501,
    ),
    "a header flood": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 60_000, 431),
    "a header without an end": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: " + BIG, 431),
    "a target without an end": (b"GET /" + BIG, 431),
    "http/1.0": (b"GET /health HTTP/1.0\r\n\r\n", 200),
    "a target with a host": (b"GET http://localhost:1/health HTTP/1.1\r\nHost: a\r\n\r\n", 200),
    "a target with a host alone": (b"GET HTTP://localhost?a=b HTTP/1.1\r\nHost: a\r\n\r\n", 200),
    "a target with another's host": (b"GET http://a/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 403),
    "a target with no host": (b"GET http:///health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a target with half a host": (b"GET http://[/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a star": (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "connect": (b"CONNECT a:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "trace": (b"TRACE /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    "an unknown method": (b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    "a wrong method": (b"PUT /execute HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    "options": (b"OPTIONS /execute HTTP/1.1\r\nHost: localhost\r\n\r\n", 204),
    "a query of 8 KiB": (b"GET /health?" + b"a=b&" * 2000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    "a query that is none": (b"GET /health?%%%&=&&[]=%ff HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    "a path that is no UTF-8": (b"GET /%ff%fe%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "a path that climbs": (b"GET /docs/assets/../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "a path that climbs in code": (
        b"GET /docs/assets/%2e%2e%2f%2e%2e%2fetc%2fpasswd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        404,
    ),
    "a coded body": (
        b"POST /cancel HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
        415,
    ),
    "a body in no code": (request("POST", "/cancel", {"job_id": "a"}, {"Content-Encoding": "identity"}), 202),
    "a wish for a websocket": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        200,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_ordinary_request_is_answered(server: Server, name: str) -> None:
    sent, status = CASES[name]
    answers, _ = talk(server.url, sent)
    assert answers[0].status == status, answers[0]
    if status >= 400:
        assert answers[0].json().keys() == {"code", "message", "retriable"}
        assert len(answers[0].body) < 1000
        assert b"bytearray" not in answers[0].body
    assert {"date", "x-correlation-id", "x-request-id"} <= answers[0].headers.keys()
    assert httpx.get(f"{server.url}/health").status_code == 200


def head_of(size: int) -> bytes:
    """A request whose head has so many bytes."""
    begin, end = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Padding: ", b"\r\n\r\n"
    return begin + b"x" * (size - len(begin) - len(end)) + end


@pytest.mark.parametrize(("size", "status"), [(20_000, 200), (1 << 16, 200), ((1 << 16) + 1, 431), (100_000, 431)])
def test_a_head_has_one_limit_however_it_comes(server: Server, size: int, status: int) -> None:
    sent = head_of(size)
    for step in (size, 9_000):
        answers, _ = talk(server.url, *[sent[i : i + step] for i in range(0, size, step)], pause=0.02)
        assert answers[0].status == status, step
        if status == 431:
            assert answers[0].json()["code"] == "HEADERS_TOO_LARGE"
            assert "65536 bytes" in answers[0].json()["message"]


def test_what_is_refused_before_it_is_a_request_is_answered_as_well_as_any_and_logged_once(server: Server) -> None:
    head = b"POST /cancel HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: %s\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"

    found, port = rest_of(server.url, head % b"bad-chunk")
    assert found.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"x-request-id: bad-chunk\r\n" in found
    (line,) = server.logged("request refused", status=400, correlation_id="bad-chunk")
    assert line["peer"] == f"127.0.0.1:{port}"
    assert line["reason"] == "this is no HTTP request that can be served: illegal chunk header"
    assert not server.logged("Invalid HTTP request received.")


def test_what_is_refused_has_the_shape_of_its_own_path_not_of_the_last(server: Server) -> None:
    answers, _ = talk(server.url, request("GET", "/v1/models"), b"nonsense\r\n\r\n", pause=0.1, answers=2)
    assert (answers[0].status, answers[1].status) == (200, 400)
    assert answers[1].json()["code"] == "INVALID_REQUEST"


def test_a_route_that_reads_no_body_and_gets_a_bad_one_is_answered_once(server: Server) -> None:
    for method in ("GET", "HEAD"):
        head = f"{method} /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        rest, _ = rest_of(server.url, head.encode() + b"zz\r\n")
        assert rest.count(b"HTTP/1.1 ") == 1
        assert rest.endswith(b"\r\n\r\n") == (method == "HEAD")
    assert not [line for line in server.lines if "Traceback" in str(line)]


def test_head_has_the_headers_alone(server: Server) -> None:
    with server.client() as client:
        head = client.head("/health")
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) > 100
        assert client.head("/execute").status_code == 405
        assert client.get("/health").status_code == 200  # on the same connection


def test_a_client_that_expects_100_continue_is_told_to(server: Server) -> None:
    head = request("POST", "/cancel", b"", {"Content-Length": "15", "Expect": "100-continue"})

    async def conversation() -> Answer:
        async with connect(server.url) as wire:
            await wire.send(head)
            assert (await wire.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            await wire.send(b'{"job_id": "a"}')
            return await wire.answer()

    assert asyncio.run(conversation()).status == 202


def test_requests_that_are_sent_together_are_answered_in_order(server: Server) -> None:
    jobs = [request("POST", "/execute", JOB | {"job_id": f"pipelined {i}"}) for i in range(3)]
    answers, _ = talk(server.url, b"".join(jobs), answers=3)
    assert [answer.events[0]["job_id"] for answer in answers] == [f"pipelined {i}" for i in range(3)]
    assert all(answer.events[-1]["type"] == "end" for answer in answers)
