"""How a worker ends with many streams open, and what is left behind when it is killed."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path

import psutil
import pytest

from tests.server.conftest import Start
from tests.server.process import Server, eventually, execute, run
from tests.server.wire import Answer, connect, request

STREAMS = 64
JOB = {"prompt": "Once", "temperature": 0}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


async def end_under(server: Server, streams: int, max_tokens: int) -> tuple[list[Answer], list[Answer]]:
    """The answers to streams that were open when SIGTERM came, and to those that asked after it."""
    accepted = asyncio.Semaphore(0)

    async def client(number: int) -> Answer:
        async with connect(server.url) as wire:
            job = {"job_id": f"open {number}", "max_tokens": max_tokens, **JOB}
            await wire.send(request("POST", "/execute", job))
            status, headers = await wire.head()
            accepted.release()
            return Answer(status, headers, b"".join([part async for part in wire.parts(status, headers)]))

    async def late(number: int) -> Answer:
        async with connect(server.url) as wire:
            return await wire.ask("POST", "/execute", {"job_id": f"late {number}", **JOB})

    opened = [asyncio.create_task(client(i)) for i in range(streams)]
    for _ in range(streams):
        await accepted.acquire()
    server.signal(signal.SIGTERM)
    await asyncio.to_thread(eventually, lambda: server.logged("shutting down"))
    refused = await asyncio.gather(*(late(i) for i in range(8)))
    return await asyncio.gather(*opened), refused


@pytest.mark.parametrize("limit", [60.0, 0.5])
def test_sigterm_under_64_streams_ends_each_in_order(start: Start, limit: float) -> None:
    options = ("--provider", "paced", "--shutdown-timeout", str(limit))
    server = start(*options, env={"PACED_STEP_SECONDS": "0.02"}).wait_healthy()
    opened, refused = asyncio.run(end_under(server, STREAMS, 10))
    assert server.wait() == 0
    assert server.stderr == ""
    for answer in refused:
        assert (answer.status, answer.json()["code"]) == (503, "WORKER_UNHEALTHY")
        assert answer.headers["retry-after"]
    last = [answer.events[-1] for answer in opened]
    assert len(last) == STREAMS
    if limit > 10:
        assert {event["type"] for event in last} == {"end"}
    else:
        cut = [event for event in last if event["type"] == "error"]
        assert cut, "64 streams of 10 tokens, 8 at a time and 20 ms a step, take longer than 0.5 s"
        assert {(event["code"], event["retriable"]) for event in cut} == {("WORKER_UNHEALTHY", True)}
        assert {event["type"] for event in last} <= {"end", "error"}


def test_sigkill_leaves_nothing_that_stops_the_next_start(start: Start, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    options = ("--provider", "paced", "--chat-template", str(_template(tmp_path, "{{ messages[0].content }}")))
    env = {"PACED_STEP_SECONDS": "0.01", "TMPDIR": str(scratch)}
    server = start(*options, port=port, env=env).wait_healthy()
    with server.client() as client, execute(client, job_id="runs", **JOB) as stream:
        stream.next("token")
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children, "the process that renders chat templates"
        server.signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        again = start(*options, port=port, env=env).wait_healthy()  # at once, on the same port
    eventually(lambda: not any(map(_alive, children)), 5, "an end of the killed server's children")
    with again.client() as client:
        assert run(client, job_id="runs", max_tokens=2, **JOB)[-1]["type"] == "end"
    again.close()
    assert list(scratch.iterdir()) == []


def test_a_template_that_hangs_does_not_outlive_a_killed_server(start: Start, tmp_path: Path) -> None:
    server = start("--chat-template", str(_template(tmp_path, ENDLESS))).wait_healthy()
    (renderer,) = psutil.Process(server.process.pid).children()

    async def kill_while_it_renders() -> None:
        async with connect(server.url) as wire:
            await wire.send(request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}))
            before = renderer.cpu_times().user
            await asyncio.to_thread(eventually, lambda: renderer.cpu_times().user > before + 0.2)
            server.signal(signal.SIGKILL)
            await wire.closed()

    asyncio.run(kill_while_it_renders())
    eventually(lambda: not _alive(renderer), 15, "an end of the template")


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # where nobody collects the children of the dead
    except psutil.NoSuchProcess:
        return False


def _template(folder: Path, text: str) -> Path:
    path = folder / "template.jinja"
    path.write_text(text)
    return path
