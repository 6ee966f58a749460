"""Jobs that end early: cancelled, left by their client, out of time, refused by a full queue."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from tests.server.conftest import Start
from tests.server.process import Server, Stream, eventually, execute, run

LONG_PROMPT = "Once upon a time, there was a little girl. " * 12  # with a step a token: seconds
JOB = {"prompt": "Once", "temperature": 0}


def cancel(client: httpx.Client, job_id: str) -> None:
    response = client.post("/cancel", json={"job_id": job_id})
    assert response.status_code == 202


def assert_cancelled(stream: Stream, *, tokens_allowed: bool = False) -> None:
    """Exactly an error is left of the stream."""
    (last,) = [event for event in stream if not tokens_allowed or event["type"] not in ("token", "metrics")]
    assert last.keys() == {"type", "code", "message", "retriable"}
    assert (last["type"], last["code"], last["retriable"]) == ("error", "CANCELLED", False)


@pytest.fixture(autouse=True)
def idle(slow: Server) -> Iterator[None]:
    """Each test ends as it began: nothing runs, and every block of the cache is back."""
    yield
    names = ("llorch_running_requests", "llorch_queue_depth", "llorch_kv_blocks_used")
    eventually(lambda: not any(slow.metrics()[name] for name in names), 2, "an idle engine")


def test_in_decode(slow: Server, slow_client: httpx.Client) -> None:
    with execute(slow_client, job_id="decode", **JOB) as stream, slow.client() as other:
        stream.next("token")
        asked = time.monotonic()
        cancel(other, "decode")
        answered = time.monotonic()
        rest = list(stream)
        assert time.monotonic() - answered < 1.5
    assert (rest[-1]["type"], rest[-1]["code"]) == ("error", "CANCELLED")
    # no token but those of the steps, of 10 ms or more, that ended before the cancellation was answered
    assert sum(event["type"] == "token" for event in rest) <= (answered - asked) / 0.01 + 1


def test_in_prefill(slow: Server, slow_client: httpx.Client) -> None:
    with execute(slow_client, job_id="prefill", prompt=LONG_PROMPT, temperature=0) as stream, slow.client() as other:
        stream.next("started")
        cancel(other, "prefill")
        began = time.monotonic()
        assert_cancelled(stream)
        assert time.monotonic() - began < 1.0


def test_while_queued(slow: Server, slow_client: httpx.Client) -> None:
    with (
        execute(slow_client, job_id="ahead", **JOB) as ahead,
        slow.client() as other,
        execute(other, job_id="queued", **JOB) as queued,
        slow.client() as third,
    ):
        ahead.next("started")
        cancel(third, "queued")
        assert_cancelled(queued)  # and no started
        ahead.next("token")  # the one that runs is not touched
        cancel(third, "ahead")
        assert_cancelled(ahead, tokens_allowed=True)


def test_cancel_is_idempotent_and_knows_no_error(client: httpx.Client) -> None:
    for job_id in ("never-was", "never-was"):
        cancel(client, job_id)
    run(client, job_id="finished", max_tokens=1, **JOB)
    cancel(client, "finished")


def test_the_id_of_a_job_that_is_over_can_be_used_again(client: httpx.Client) -> None:
    for _ in range(2):
        assert run(client, job_id="again", max_tokens=1, **JOB)[-1]["type"] == "end"


def test_the_id_of_a_running_job_cannot(slow: Server, slow_client: httpx.Client) -> None:
    with execute(slow_client, job_id="twice", **JOB) as stream, slow.client() as other:
        stream.next("started")
        response = other.post("/execute", json={"job_id": "twice", **JOB})
        assert response.status_code == 409
        assert (response.json()["code"], response.json()["retriable"]) == ("JOB_EXISTS", False)
        stream.next("token")
        cancel(other, "twice")


def test_a_full_queue_is_a_plain_503(slow: Server, slow_client: httpx.Client) -> None:
    with ExitStack() as stack:
        streams = []  # one that is forgotten is closed, and its job with it
        for job_id in ("runs", "waits 1", "waits 2"):
            client = stack.enter_context(slow.client())
            streams.append(stack.enter_context(execute(client, job_id=job_id, **JOB)))
            if job_id == "runs":
                streams[0].next("started")
        response = slow_client.post("/execute", json={"job_id": "too many", **JOB})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert (response.json()["code"], response.json()["retriable"]) == ("QUEUE_FULL", True)
        metrics = slow.metrics()
        assert (metrics["llorch_queue_depth"], metrics["llorch_running_requests"]) == (2, 1)


@pytest.mark.parametrize("until", ["started", "token"])
def test_a_client_that_hangs_up_frees_its_blocks(slow: Server, until: str) -> None:
    cancelled = slow.metrics()['llorch_requests_total{outcome="cancelled"}']
    prompt = LONG_PROMPT if until == "started" else "Once"
    with slow.client() as client, execute(client, job_id="leaves", prompt=prompt, temperature=0) as stream:
        stream.next(until)
        assert slow.metrics()["llorch_kv_blocks_used"] > 0
    left = time.monotonic()
    eventually(lambda: slow.metrics()["llorch_kv_blocks_used"] == 0, 2, "the blocks of a job whose client left")
    assert time.monotonic() - left < 1.5
    assert slow.metrics()['llorch_requests_total{outcome="cancelled"}'] == cancelled + 1


def test_a_client_that_hangs_up_while_queued_leaves_the_queue(slow: Server, slow_client: httpx.Client) -> None:
    with execute(slow_client, job_id="ahead", **JOB) as ahead:
        ahead.next("started")
        with slow.client() as other, execute(other, job_id="leaves queue", **JOB):
            assert slow.metrics()["llorch_queue_depth"] == 1
        eventually(lambda: slow.metrics()["llorch_queue_depth"] == 0, 2, "an empty queue")
        ahead.next("token")


def test_time_limits_end_a_job_with_an_error_event(start: Start) -> None:
    limits = ("--request-timeout", "0.5", "--queue-timeout", "0.2")
    server = start("--provider", "paced", "--parallel", "1", *limits, env={"PACED_STEP_SECONDS": "0.01"}).wait_healthy()
    with server.client() as client, server.client() as other, execute(client, job_id="runs", **JOB) as runs:
        runs.next("started")
        (queued,) = run(other, job_id="waits", **JOB)
        assert (queued["code"], queued["retriable"]) == ("QUEUE_TIMEOUT", True)
        refused = other.post("/v1/completions", json={"prompt": "Once"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_timeout")
        assert refused.headers["retry-after"]
        last = list(runs)[-1]
        assert (last["type"], last["code"], last["retriable"]) == ("error", "INFERENCE_TIMEOUT", True)
        assert "0.5 s" in last["message"]
    eventually(lambda: server.metrics()["llorch_kv_blocks_used"] == 0, 2, "the blocks of a job whose time is over")
    assert server.metrics()['llorch_requests_total{outcome="failed"}'] == 3
    server.close()
