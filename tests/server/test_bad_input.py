"""Hundreds of bad bodies, over every route that takes one: refused, at once, and no other stream notices."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import httpx
import pytest

from tests.server.bad_bodies import Case, cases
from tests.server.conftest import Start
from tests.server.process import Server, execute, run
from tests.server.wire import Answer, HungError, connect

PACED = {"prompt": "Once upon a time", "temperature": 1, "seed": 7, "max_tokens": 400}
CONNECTIONS = 4


@pytest.fixture(scope="module")
def paced(start: Start) -> Iterator[Server]:
    server = start("--provider", "paced", env={"PACED_STEP_SECONDS": "0.01"}).wait_healthy()
    yield server
    server.close()


def problem(case: Case, answer: Answer) -> str | None:
    """What is wrong with the answer to a bad body."""
    expected = {413} if case.name == "a megabyte and a byte" else {400, 404} if "model" in case.name else {400}
    if answer.status not in expected:
        return f"status {answer.status}"
    if len(answer.body) > 20_000:
        return f"{len(answer.body)} bytes"
    content = answer.json()
    if case.path.startswith("/v1"):
        shape = content["error"].keys() == {"message", "type", "param", "code"}
    elif answer.status == 413:
        shape = content.keys() == {"code", "message", "retriable"}
    else:
        shape = content.keys() == {"errors"} and bool(content["errors"])
    return None if shape else f"shape {content}"


async def send_all(url: str, found: list[Case]) -> list[str]:
    """What went wrong."""
    waiting, problems = list(reversed(found)), []

    async def client() -> None:
        while waiting:
            async with connect(url) as wire:  # a new connection after an answer that closes it
                kept = True
                while waiting and kept:
                    case = waiting.pop()
                    try:
                        answer = await wire.ask("POST", case.path, case.body)
                        wrong = problem(case, answer)
                        kept = answer.headers.get("connection") != "close"
                    except (HungError, EOFError, ConnectionError) as error:
                        wrong, kept = repr(error), False
                    if wrong:
                        problems.append(f"{case.path} {case.name}: {wrong}")

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return problems


def test_bad_bodies_are_refused_and_no_other_stream_notices(paced: Server) -> None:
    found = list(cases())
    assert len({(case.path, case.body) for case in found}) >= 300
    with paced.client() as client:
        alone = run(client, job_id="alone", **PACED)
        with execute(client, job_id="beside", **PACED) as stream:
            stream.next("token")
            problems = asyncio.run(send_all(paced.url, found))
            beside = [event for event in stream if event["type"] in ("token", "end")]
    assert problems == []
    tokens = [event for event in alone if event["type"] == "token"]
    assert beside[:-1] == tokens[1:]
    assert beside[-1]["tokens_out"] == alone[-1]["tokens_out"]
    assert not paced.logged("request failed")


# ---- odd, and right ----


@pytest.mark.parametrize(
    "prompt",
    [
        "<s></s><unk>",
        "</s>" * 100,
        "<s>" * 100,
        "\x00",
        "\x00" * 50,
        "<0x00>",
        "\u2581" * 50,
        "\ufffe\uffff",
        "\U0010ffff",
    ],
)
def test_an_odd_prompt_is_served(server: Server, prompt: str) -> None:
    with server.client() as client:
        events = run(client, job_id=f"odd {prompt!a}"[:60], prompt=prompt, max_tokens=4)
    assert events[-1]["type"] == "end"


def test_of_two_fields_of_one_name_the_last_counts(server: Server) -> None:
    with server.client() as client:
        response = client.post("/cancel", content=b'{"job_id": "", "job_id": "last"}')
        assert response.json()["job_id"] == "last"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/xml", "multipart/form-data", "garbage", "application/json; charset=utf-16"]
)
def test_the_content_type_does_not_matter(server: Server, kind: str) -> None:
    with server.client() as client:
        response = client.post("/cancel", content=b'{"job_id": "a"}', headers={"Content-Type": kind})
        assert response.status_code == 202


def test_what_clients_write_makes_no_log_line_of_its_own(stories: Path, tmp_path: Path) -> None:
    """Neither in the path nor in a job's name, in logs for people, where a line break would."""
    command = [sys.executable, "-m", "llorch", "serve", "--model", str(stories), "--port", "0"]
    command += ["--provider", "numpy-cpu", "--log-format", "console"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        started = "".join(takewhile(lambda line: "load_s=" not in line, process.stdout))
        url = re.search(r" uri=(\S+)", started)
        if url is None:
            process.kill()  # or the block would wait for it
            pytest.fail(started)
        with httpx.Client(base_url=url[1], trust_env=False) as client:
            client.get("/%0Aforged%0D%0Aforged%1B%5B31m%E2%80%A8forged")
            forged = "\nforged\r\nforged\x1b[31m\u2028forged"
            for body in (
                {"job_id": forged, "prompt": forged, "max_tokens": 1},
                {forged: 1},
                {"job_id": "a", forged: 1},
            ):
                client.post("/execute", json=body)
        process.terminate()
        lines = process.stdout.read().splitlines()
        assert process.wait(10) == 0
    assert sum("forged" in line for line in lines) >= 2
    assert all(re.match(r"\d{4}-\d\d-\d\dT", line) for line in lines)
    assert not any("\x1b" in line for line in lines)


def test_a_line_break_of_unicode_does_not_cut_an_event(client: httpx.Client) -> None:
    """Clients that use str.splitlines would cut at them."""
    breaks = "\x85\u2028\u2029"
    (started, *_) = run(client, job_id=breaks, prompt="Once", max_tokens=1)
    assert started["job_id"] == breaks
