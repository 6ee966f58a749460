"""A device that fails under a real server: what clients and /health see, and how the process goes on or ends."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.conftest import Start
from tests.server.process import Server, eventually, execute, run, text

JOB = {"prompt": "Once upon a time", "max_tokens": 200, "temperature": 0, "seed": 1}
GUILTY = [1, 300, 5]  # the ids of a prompt that faults name


def faulty(start: Start, faults: str, *options: str) -> Server:
    return start("--provider", "faulty", *options, env={"LLORCH_FAULTS": f"pace=0.002,{faults}"}).wait_healthy()


def streams(server: Server, pool: ThreadPoolExecutor, count: int) -> list[Future[list[dict[str, Any]]]]:
    """Jobs that run, each with a client of its own; their events once they are over."""

    def one(name: str) -> list[dict[str, Any]]:
        with server.client() as client:
            return run(client, job_id=name, **JOB)

    found = [pool.submit(one, f"stream-{i}") for i in range(count)]
    with server.client() as client:
        eventually(lambda: client.get("/health").json().get("running") == count, what="streams that run")
    return found


class HealthWatch:
    """Asks for /health all the time: when it was first unhealthy, and why."""

    def __init__(self, server: Server) -> None:
        self._server, self._stop = server, threading.Event()
        self.unhealthy_at, self.reason = 0.0, ""
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        with self._server.client() as client:
            while not self._stop.wait(0.01):
                answer = client.get("/health")
                if answer.status_code == 503 and not self.unhealthy_at:
                    self.unhealthy_at, self.reason = time.monotonic(), answer.json()["reason"]

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


def complete(client: httpx.Client, prompt: list[int]) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4, "temperature": 0})


@pytest.mark.parametrize("kind", ["raise", "die"])
def test_a_failure_ends_all_streams_shows_in_health_and_is_over_with_the_same_weights(start: Start, kind: str) -> None:
    server = faulty(start, f"{kind}#300")
    with server.client() as client, ThreadPoolExecutor(4) as pool:
        expected = text(run(client, job_id="before", **JOB | {"max_tokens": 8}))
        hit = streams(server, pool, 3)
        watch = HealthWatch(server)
        guilty = pool.submit(complete, client, GUILTY)
        for events in hit:
            last = events.result(20)[-1]
            assert (last["type"], last["code"], last["retriable"]) == ("error", "WORKER_UNHEALTHY", True)
        failed = time.monotonic()
        eventually(lambda: watch.unhealthy_at)
        assert watch.unhealthy_at - failed < 1
        assert "told to" in watch.reason
        watch.end()
        assert guilty.result(20).status_code == 503
        server.wait_healthy()
        assert text(run(client, job_id="after", **JOB | {"max_tokens": 8})) == expected
    assert server.metrics()["llorch_engine_failures_total"] == 1
    assert {line["level"] for line in server.logged("job over", outcome="failed")} == {"warning"}
    assert len(server.logged("loading", percent=100)) == 1
    assert server.process.poll() is None
    server.close()


@pytest.mark.parametrize(("kind", "status"), [("nan", 500), ("memory", 503)])
def test_where_one_request_is_guilty_the_others_go_on(start: Start, kind: str, status: int) -> None:
    server = faulty(start, f"{kind}#300")
    with server.client() as client, ThreadPoolExecutor(3) as pool:
        others = streams(server, pool, 3)
        refused = complete(client, GUILTY)
        assert refused.status_code == status, refused.text
        assert client.get("/health").status_code == 200
        answers = [events.result(30) for events in others]
        assert {events[-1]["type"] for events in answers} == {"end"}
        assert len({text(events) for events in answers}) == 1
        assert complete(client, [1, 301, 5]).status_code == 200
    metrics = server.metrics()
    assert metrics["llorch_engine_failures_total"] == 0
    assert metrics["llorch_kv_blocks_used"] == 0
    server.close()


def test_three_failures_within_a_minute_end_the_process(start: Start) -> None:
    server = faulty(start, "raise#300")
    with server.client() as client:
        for _ in range(3):
            server.wait_healthy()
            assert complete(client, GUILTY).status_code == 503
        assert server.wait(20) == 1
    assert "told to raise" in server.stderr
    assert "3 failures within 60 s" in server.stderr
    assert "3 failures within 60 s" in server.logged("worker failed", level="error")[0]["reason"]


def test_a_step_that_hangs_ends_streams_with_an_error_and_then_the_process(start: Start) -> None:
    server = faulty(start, "stall=60@30", "--step-timeout", "0.5")
    with server.client() as client, server.client() as other, execute(client, job_id="hit", **JOB) as stream:
        stream.next("token")
        *_, last = stream
        assert (last["type"], last["retriable"]) == ("error", True)
        assert "no progress" in last["message"]
        health = other.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
        assert "--step-timeout" in health.json()["reason"]
    assert server.wait(15) == 1
    assert "no progress" in server.stderr
