"""POST /execute: what a job's stream says."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest

import llorch
from tests.server.conftest import Start
from tests.server.process import Server, eventually, execute, run, text
from tests.server.scripted import EOS, SPACE, utf8, write_model
from tests.support import shared

PROMPT = "Once upon a time, Lily saw a big red ball"
OTHER_PROMPT = "Tom had a little dog"


@pytest.fixture(scope="module")
def greedy_text(stories: Path) -> str:
    """llama.cpp's 64 greedy tokens behind PROMPT, as text."""
    with np.load(shared("reference", "stories260K-checkpoints.npz")) as recorded:
        prompt, greedy = recorded["tokens"].tolist(), recorded["greedy"].tolist()
    tokenizer = llorch.Tokenizer.from_gguf(stories)
    assert tokenizer.encode(PROMPT) == prompt
    assert len(greedy) == 64
    return tokenizer.decode(prompt + greedy).removeprefix(tokenizer.decode(prompt))


def test_events_come_in_order_and_are_numbered(client: httpx.Client) -> None:
    events = run(client, job_id="order", prompt=PROMPT, max_tokens=20, temperature=0)
    kinds = [event["type"] for event in events if event["type"] != "metrics"]
    assert kinds == ["started", *["token"] * (len(kinds) - 2), "end"]
    assert [event["i"] for event in events if event["type"] == "token"] == list(range(len(kinds) - 2))
    started, end = events[0], events[-1]
    assert started.keys() == {"type", "job_id", "model", "started_at", "seed"}
    assert started["job_id"] == "order"
    assert abs(datetime.fromisoformat(started["started_at"]).timestamp() - time.time()) < 60
    assert datetime.fromisoformat(started["started_at"]).utcoffset() == timedelta(0)
    assert end.keys() == {"type", "tokens_out", "decode_time_ms", "stop_reason"}
    assert (end["tokens_out"], end["stop_reason"]) == (20, "MAX_TOKENS")
    assert end["decode_time_ms"] > 0


def test_the_response_is_an_event_stream_that_nothing_buffers(client: httpx.Client) -> None:
    body = {"job_id": "headers", "prompt": PROMPT, "max_tokens": 1}
    with client.stream("POST", "/execute", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "no-cache" in response.headers["cache-control"]
        assert response.headers["x-accel-buffering"] == "no"
        assert next(response.iter_lines()) == ": keep-alive"


def test_temperature_0_gives_llama_cpps_text(client: httpx.Client, greedy_text: str) -> None:
    events = run(client, job_id="greedy", prompt=PROMPT, max_tokens=64, temperature=0)
    assert text(events) == greedy_text
    assert events[-1]["tokens_out"] == 64


def test_two_jobs_at_once_share_steps_and_say_what_each_says_alone(
    client: httpx.Client, server: Server, greedy_text: str
) -> None:
    def job(job_id: str, prompt: str) -> str:
        return text(run(client, job_id=job_id, prompt=prompt, max_tokens=64, temperature=0))

    other_text = job("alone", OTHER_PROMPT)
    assert other_text != greedy_text
    before = server.metrics()
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(job, ("a", "b"), (PROMPT, OTHER_PROMPT)))
    assert together == [greedy_text, other_text]
    after = server.metrics()
    shared_steps = after["llorch_engine_shared_steps_total"] - before["llorch_engine_shared_steps_total"]
    steps = after["llorch_engine_steps_total"] - before["llorch_engine_steps_total"]
    # each job takes 64 or more steps alone; a late start of the second costs some of those they could share
    assert shared_steps >= 20
    assert steps + shared_steps >= 2 * 64


def test_the_seed_that_is_reported_gives_the_same_text_again(client: httpx.Client) -> None:
    first = run(client, job_id="drawn", prompt=PROMPT, max_tokens=40, temperature=1.5, seed=None)
    seed = first[0]["seed"]
    again = run(client, job_id="again", prompt=PROMPT, max_tokens=40, temperature=1.5, seed=seed)
    other = run(client, job_id="other", prompt=PROMPT, max_tokens=40, temperature=1.5, seed=seed ^ 1)
    assert text(first) == text(again)
    assert text(first) != text(other)


def test_max_tokens_beyond_the_room_is_cut_to_it(client: httpx.Client, stories: Path) -> None:
    prompt = "Once upon a time, there was a little girl. " * 20
    room = 512 - len(llorch.Tokenizer.from_gguf(stories).encode(prompt))
    assert 0 < room < 300
    end = run(client, job_id="room", prompt=prompt, max_tokens=2000, temperature=2.0, seed=3)[-1]
    assert end["tokens_out"] <= room
    default = run(client, job_id="default", prompt=prompt, temperature=2.0, seed=3)[-1]
    assert default["tokens_out"] == end["tokens_out"]


def test_tokens_are_sent_when_they_are_computed(slow_client: httpx.Client) -> None:
    with execute(slow_client, job_id="paced", prompt="Once", max_tokens=60, temperature=0) as stream:
        began = time.monotonic()
        stream.next("token")
        first = time.monotonic() - began
        stream.next("end")
        last = time.monotonic() - began
    assert first < last / 3


def test_metrics_come_between_the_tokens(slow_client: httpx.Client) -> None:
    events = run(slow_client, job_id="metrics", prompt="Once", max_tokens=80, temperature=0)
    metrics = [event for event in events if event["type"] == "metrics"]
    assert len(metrics) >= 2  # 80 steps of 10 ms or more, one event each 200 ms
    for event in metrics:
        assert event.keys() == {"type", "tokens_per_sec", "vram_bytes"}
        assert 0 < event["tokens_per_sec"] <= 100
        assert event["vram_bytes"] > 1_000_000
    assert events[-1]["type"] == "end"


def test_comments_keep_a_silent_stream_alive(slow_client: httpx.Client) -> None:
    prompt = "Once upon a time, there was a little girl. " * 8  # prefill, 10 ms a token, sends nothing
    with execute(slow_client, job_id="silence", prompt=prompt, max_tokens=1, temperature=0) as stream:
        stream.next("token")
        assert stream.comments >= 4  # one at the start, then one each 200 ms


# ---- a model whose text is known ----

SCRIPT = ["o", "Hello", f"{SPACE}wor", "ld", *utf8("😀"), f"{SPACE}A", *utf8("€"), *utf8("é"), "!", EOS]
SCRIPTED_TEXT = "Hello world😀 A€é!"


@pytest.fixture(scope="module")
def scripted(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    model = write_model(tmp_path_factory.mktemp("models") / "scripted.gguf", SCRIPT)
    with start(model=model).wait_healthy().client() as client:
        yield client


def test_split_characters_are_sent_whole(scripted: httpx.Client) -> None:
    events = run(scripted, job_id="emoji", prompt="o", temperature=0)
    assert text(events) == SCRIPTED_TEXT
    pieces = [event["t"] for event in events if event["type"] == "token"]
    assert "😀" in pieces
    assert "€" in pieces
    assert [event["i"] for event in events if event["type"] == "token"] == list(range(len(pieces)))
    assert events[-1]["stop_reason"] == "EOS"
    assert events[-1]["tokens_out"] == len(SCRIPT) - 2  # neither the prompt nor EOS


@pytest.mark.parametrize("max_tokens", [4, 5, 6])
def test_a_character_that_the_end_splits_is_no_replacement_character(scripted: httpx.Client, max_tokens: int) -> None:
    events = run(scripted, job_id=f"cut-{max_tokens}", prompt="o", temperature=0, max_tokens=max_tokens)
    assert text(events) == "Hello world"
    assert events[-1]["tokens_out"] == max_tokens


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["lo wor"], "Hel"),  # begins within a token, ends within the third
        (["Hello"], ""),
        (["world😀 A"], "Hello "),
        (["ld\U0001f600"], "Hello wor"),
        (["zzz", "é!"], "Hello world😀 A€"),
        (["€é", "😀"], "Hello world"),  # the first to be complete ends the text
    ],
)
def test_a_stop_string_ends_the_text_and_is_not_in_it(scripted: httpx.Client, stop: list[str], expected: str) -> None:
    events = run(scripted, job_id=f"stop-{stop}", prompt="o", temperature=0, stop=stop)
    assert text(events) == expected
    end = events[-1]
    assert end["stop_reason"] == "STOP_SEQUENCE"
    assert end["stop_sequence_matched"] in stop
    assert SCRIPTED_TEXT.startswith(expected + end["stop_sequence_matched"])


def test_the_beginning_of_a_stop_string_is_given_when_it_goes_on_otherwise(scripted: httpx.Client) -> None:
    events = run(scripted, job_id="no-stop", prompt="o", temperature=0, stop=["lo world!", "é!!"])
    assert text(events) == SCRIPTED_TEXT
    assert events[-1]["stop_reason"] == "EOS"
    assert "stop_sequence_matched" not in events[-1]


def test_control_tokens_written_in_the_prompt_are_parsed(scripted: httpx.Client, server: Server) -> None:
    as_token = run(scripted, job_id="control", prompt=f"{EOS}o", temperature=0)
    assert text(as_token) == SCRIPTED_TEXT
    with server.client() as client:
        run(client, job_id="control-length", prompt=f"{EOS}o", max_tokens=1)
    accepted = eventually(lambda: server.logged("job accepted", job_id="control-length"))[-1]
    assert accepted["prompt_tokens"] <= 4  # as text, "</s>" alone is more


# ---- logs ----


def test_the_prompt_is_in_no_log_line_but_its_length_and_hash_are(client: httpx.Client, server: Server) -> None:
    prompt = "A secret about the purple elephant"
    run(client, job_id="secret", prompt=prompt, max_tokens=2, stop=["confidential"])
    client.post("/execute", json={"job_id": "bad", "prompt": prompt, "temperature": 9, "purple elephant": 1})
    client.post("/execute", content=b'{"prompt": "purple elephant')
    # what is logged after them, so that all their lines are there
    client.get("/nowhere", headers={"X-Correlation-Id": "after-the-secret"})
    eventually(lambda: server.logged("request", correlation_id="after-the-secret"))
    (accepted,) = server.logged("job accepted", job_id="secret")
    assert accepted["prompt_characters"] == len(prompt)
    assert re.fullmatch("[0-9a-f]{16}", accepted["prompt_sha256"])
    assert server.logged("job over", job_id="secret", outcome="ended")
    for word in ("purple", "confidential"):
        assert not [line for line in server.lines if word in str(line)]
