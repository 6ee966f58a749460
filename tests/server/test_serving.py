"""What the engine's policies mean for clients of the real process: reuse, turns, places, what can be watched."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from llorch.providers.conformance.models import TinyModel, write_model
from tests.server.conftest import Start
from tests.server.process import Server, eventually, execute, run
from tests.server.scripted import SPACE
from tests.server.scripted import write_model as write_script

SHARED, OWN = 1000, 20
WHOLE = SHARED // 32 * 32  # the 8 tokens behind are not worth the copy of a block
CHUNK, PACE = 64, 0.002  # tokens, and seconds that the provider takes for each: a chunk is 128 ms
STREAMS, LONG = 8, 2000


def prompt(seed: str, tokens: int) -> list[int]:
    numbers = random.Random(seed)
    return [1, *(numbers.randrange(3, 256) for _ in range(tokens - 1))]


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says a b a b ... for ever, a token a word; and a context that long prompts fit in."""
    script = [f"{SPACE}a", f"{SPACE}b", f"{SPACE}a"]
    return write_script(tmp_path_factory.mktemp("model") / "long.gguf", script, context=2304)


@pytest.fixture(scope="module")
def paced(start: Start, long_model: Path) -> Iterator[Server]:
    """A server whose steps take a set time for each of their tokens."""
    options = (
        "--provider",
        "faulty",
        "--parallel",
        str(STREAMS + 1),
        "--chunk",
        "512",
        "--mixed-chunk",
        str(CHUNK),
    )
    server = start(*options, model=long_model, env={"LLORCH_FAULTS": f"pace={PACE}"}).wait_healthy()
    yield server
    server.close()


def complete(client: httpx.Client, tokens: Sequence[int], **body: Any) -> dict[str, Any]:
    body = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, **body}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


# ---- reuse ----


def test_a_prompt_that_shares_its_first_thousand_tokens_starts_at_least_five_times_sooner(
    start: Start, tmp_path: Path
) -> None:
    model = TinyModel(context=2304, dim=512, layers=8, heads=8, ffn=1536, seed=12)
    server = start("--parallel", "2", model=write_model(model, tmp_path / "model.gguf")).wait_healthy()
    ratios = []
    with server.client() as client:
        for turn in range(3):
            shared, seconds = prompt(f"shared {turn}", SHARED), []
            for own in ("cold", "warm"):
                began = time.monotonic()
                answer = complete(client, [*shared, *prompt(own, OWN)[1:]])
                seconds.append(time.monotonic() - began)
            assert cached(answer) == WHOLE
            ratios.append(seconds[0] / seconds[1])
    assert statistics.median(ratios) >= 5, ratios
    assert server.metrics()["llorch_prefix_cache_hit_tokens_total"] == 3 * WHOLE
    server.close()


def test_usage_counts_what_was_cached_once_for_each_prompt_and_a_switch_turns_it_off(start: Start) -> None:
    server = start().wait_healthy()
    off = start("--no-prefix-cache").wait_healthy()
    first, other = prompt("a", 81), prompt("b", 81)
    with server.client() as client, off.client() as without:
        new = complete(client, first, max_tokens=8)
        assert cached(new) == 0
        again = complete(client, first, max_tokens=8, n=3, seed=1)
        assert cached(again) == 80  # all but the last token, whose logits are wanted
        assert text_of(again) == text_of(new)
        hits = server.metrics()["llorch_prefix_cache_hit_tokens_total"]
        several = complete(client, prompt("c", 81), n=4)
        assert cached(several) == 0
        assert server.metrics()["llorch_prefix_cache_hit_tokens_total"] - hits == 3 * 80
        both = client.post("/v1/completions", json={"prompt": [first, other], "max_tokens": 1}).json()
        assert cached(both) == 80
        assert [cached(complete(without, first, max_tokens=8)) for _ in range(2)] == [0, 0]
        assert text_of(complete(without, first, max_tokens=8)) == text_of(new)
    server.close()
    off.close()


def test_a_cache_that_is_too_small_for_all_pauses_the_youngest_and_serves_everyone(start: Start) -> None:
    small = start("--context", "256", "--cache-tokens", "256", "--parallel", "4").wait_healthy()
    roomy = start("--context", "256").wait_healthy()
    jobs = [{"prompt": "The dog ran " * (3 + i), "max_tokens": 120, "temperature": 0} for i in range(6)]

    def answers(server: Server) -> list[list[dict[str, Any]]]:
        found: dict[int, list[dict[str, Any]]] = {}

        def one(i: int) -> None:
            with server.client() as client:
                found[i] = run(client, job_id=f"job-{i}", **jobs[i])

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return [found[i] for i in range(len(jobs))]

    for events, expected in zip(answers(small), answers(roomy), strict=True):
        assert events[-1]["type"] == "end"
        kinds = [event["type"] for event in events if event["type"] != "metrics"]
        assert kinds == ["started", *["token"] * (len(kinds) - 2), "end"]
        assert [event["t"] for event in events if "t" in event] == [event["t"] for event in expected if "t" in event]
    metrics = small.metrics()
    assert metrics["llorch_preemptions_total"] > 0
    assert metrics["llorch_kv_blocks_used"] == 0
    assert roomy.metrics()["llorch_preemptions_total"] == 0
    small.close()
    roomy.close()


def test_a_cache_below_one_context_does_not_start(start: Start) -> None:
    server = start("--context", "256", "--cache-tokens", "100")
    assert server.wait() == 2
    assert "100 tokens is smaller than one context of 256" in server.stderr


# ---- turns ----


def test_a_long_prompt_holds_up_eight_streams_by_no_more_than_twice_the_time_of_its_chunk(paced: Server) -> None:
    times: dict[int, list[float]] = {i: [] for i in range(STREAMS)}

    def stream(i: int) -> None:
        with (
            paced.client() as client,
            execute(client, job_id=f"s{i}", prompt="a", max_tokens=2000, temperature=0) as events,
        ):
            for event in events:
                if event["type"] == "token":
                    times[i].append(time.monotonic())

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(STREAMS)]
    for thread in threads:
        thread.start()
    eventually(lambda: all(len(moments) > 5 for moments in times.values()), 30, "eight streams")
    with paced.client() as client:
        began = time.monotonic()
        complete(client, prompt("long", LONG))
        ended = time.monotonic()
        steps = client.get("/debug/engine").json()["steps"]
        for i in range(STREAMS):
            client.post("/cancel", json={"job_id": f"s{i}"})
    for thread in threads:
        thread.join(30)
    gaps = [
        later - earlier
        for moments in times.values()
        for earlier, later in pairwise(moments)
        if began < later and earlier < ended
    ]
    mixed = [step for step in steps if step["prompt_tokens"] == CHUNK]
    assert len(mixed) >= LONG // CHUNK - 1
    assert all(step["decodes"] == STREAMS for step in mixed)
    assert max(gaps) <= 2 * CHUNK * PACE, f"{max(gaps):.3f} s, a chunk takes {CHUNK * PACE:.3f} s"
    assert ended - began > LONG * PACE  # the prompt was not in the cache


def test_a_lower_priority_number_goes_first(slow: Server, slow_client: httpx.Client) -> None:
    order: list[str] = []

    def one(name: str, priority: int) -> None:
        with (
            slow.client() as client,
            execute(client, job_id=name, prompt="a", max_tokens=2, temperature=0, priority=priority) as events,
        ):
            events.next("started")
            order.append(name)
            list(events)

    with execute(slow_client, job_id="busy", prompt="a", max_tokens=200, temperature=0) as stream:
        stream.next("token")
        threads = []
        for name, priority in (("late", 1), ("early", -1)):
            threads.append(threading.Thread(target=one, args=(name, priority)))
            threads[-1].start()
            eventually(lambda: slow_client_waits(slow) == len(threads), what="a job that waits")
    for thread in threads:
        thread.join(30)
    assert order == ["early", "late"]


def slow_client_waits(server: Server) -> int:
    with server.client() as client:
        return int(client.get("/health").json()["waiting"])


def test_a_priority_out_of_range_is_refused_on_both_apis(client: httpx.Client) -> None:
    refused = client.post("/execute", json={"job_id": "a", "prompt": "a", "priority": 101})
    assert refused.status_code == 400
    assert refused.json()["errors"][0]["constraint"] == "range(-100..=100)"
    other = client.post("/v1/completions", json={"prompt": "a", "priority": "high"})
    assert other.status_code == 400


def test_a_key_has_no_more_places_than_it_may_and_another_passes_it_by(start: Start) -> None:
    env = {"LLORCH_API_KEY": "first,second", "LLORCH_FAULTS": "pace=0.02"}
    server = start("--provider", "faulty", "--max-running-per-key", "1", env=env)
    keys = {name: {"Authorization": f"Bearer {name}"} for name in ("first", "second")}
    with server.client(headers=keys["first"]) as first, server.client(headers=keys["second"]) as second:
        server.wait_healthy()
        assert first.get("/debug/engine", headers={"Authorization": ""}).status_code == 401
        with execute(first, job_id="one", prompt="a", max_tokens=300, temperature=0) as stream:
            stream.next("started")
            waiting = threading.Thread(
                target=run, args=(first,), kwargs={"job_id": "two", "prompt": "b", "max_tokens": 1}
            )
            waiting.start()
            eventually(lambda: first.get("/health").json()["waiting"] == 1)
            assert run(second, job_id="other", prompt="c", max_tokens=2)[-1]["type"] == "end"
            seen = first.get("/debug/engine").json()
            assert [job["job_id"] for job in seen["running"]] == ["one"]
            assert [job["job_id"] for job in seen["waiting"]] == ["two"]
        waiting.join(30)
    server.close()


def test_a_key_has_its_own_jobs(start: Start) -> None:
    env = {"LLORCH_API_KEY": "first,second", "LLORCH_FAULTS": "pace=0.02"}
    server = start("--provider", "faulty", env=env).wait_healthy()
    keys = {name: {"Authorization": f"Bearer {name}"} for name in ("first", "second")}
    job: dict[str, Any] = {"job_id": "secret-name", "prompt": "a", "temperature": 0}
    with server.client(headers=keys["first"]) as first, server.client(headers=keys["second"]) as second:
        with execute(first, max_tokens=300, **job) as stream:
            stream.next("token")
            seen = second.get("/debug/engine").json()
            assert (seen["running"], seen["stats"]["running"]) == ([], 1)
            assert "secret-name" not in str(seen)
            assert second.post("/cancel", json={"job_id": "secret-name"}).json()["found"] is False
            assert run(second, max_tokens=1, **job)[-1]["type"] == "end"  # another job of the same id
            with server.client(headers=keys["first"]) as again:
                assert again.post("/execute", json=job).status_code == 409
                stream.next("token")
                assert again.post("/cancel", json={"job_id": "secret-name"}).json()["found"] is True
            assert list(stream)[-1]["code"] == "CANCELLED"
        eventually(lambda: first.get("/health").json()["running"] == 0)
    server.close()


def test_places_per_key_want_keys(start: Start) -> None:
    server = start("--max-running-per-key", "1")
    assert server.wait() == 2
    assert "LLORCH_API_KEY" in server.stderr


# ---- watching ----


def test_the_debug_route_shows_requests_blocks_and_steps_but_no_prompt(paced: Server) -> None:
    with (
        paced.client() as client,
        paced.client() as other,
        execute(client, job_id="seen", prompt="zebra a", max_tokens=500, temperature=0, priority=3) as stream,
    ):
        for _ in range(3):
            stream.next("token")
        found = other.get("/debug/engine").json()
        (job,) = found["running"]
        assert (job["job_id"], job["priority"]) == ("seen", 3)
        assert job["kv_blocks"] == found["stats"]["kv_blocks_used"] >= 1
        assert job["computed_tokens"] >= job["prompt_tokens"] + job["tokens_out"] - 1
        step = found["steps"][-1]
        assert step["decodes"] == 1
        assert step["milliseconds"] >= 1000 * PACE
        health = other.get("/health").json()
        assert (health["running"], health["waiting"]) == (1, 0)
        assert health["kv_blocks_free"] == found["stats"]["kv_blocks_total"] - job["kv_blocks"]
        assert "zebra" not in str(found)
    assert len(found["steps"]) <= 256
