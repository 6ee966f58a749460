"""What leaves the worker for those who watch it: heartbeats, traces, and metrics on a dashboard."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import Start
from tests.server.process import Server, eventually, run
from tests.support import ROOT

JOB = {"prompt": "Once upon a time", "max_tokens": 6, "temperature": 0}


class Collector(ThreadingHTTPServer):
    """Keeps what is posted to it."""

    def __init__(self, status: int = 200) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        self.status = status
        super().__init__(("127.0.0.1", 0), _Keep)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Keep(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append((self.path, body))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def collector(status: int = 200) -> Iterator[Collector]:
    with Collector(status) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join()


def test_a_heartbeat_tells_state_and_load_again_and_again(start: Start) -> None:
    with collector() as pool:
        options = ("--heartbeat-url", f"{pool.url}/beat?token=hidden", "--heartbeat-interval", "0.1")
        server = start("--worker-id", "w-7", *options).wait_healthy()
        eventually(lambda: len(pool.bodies) >= 3)
        path, body = pool.bodies[-1]
        assert path == "/beat?token=hidden"
        assert json.loads(body) == {
            "worker_id": "w-7",
            "status": "healthy",
            "model": "stories260K",
            "device": "cpu",
            "running": 0,
            "waiting": 0,
            "kv_blocks_free": 128,
        }
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_heartbeat_that_is_not_taken_is_logged_without_its_secrets_and_costs_nothing(start: Start) -> None:
    with collector(status=500) as pool:
        options = ("--heartbeat-url", f"{pool.url}/beat?token=hidden", "--heartbeat-interval", "0.1")
        server = start(*options).wait_healthy()
        eventually(lambda: len(server.logged("heartbeat not taken", status=500)) >= 2)
        with server.client() as client:
            assert run(client, job_id="a", **JOB)[-1]["type"] == "end"
        assert "hidden" not in str(server.lines)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def traced(start: Start, requests: Callable[[httpx.Client], None], **env: str) -> tuple[list[Any], set[str]]:
    """The spans that a worker has sent when it has ended, and the names of the services they are of."""
    trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    with collector() as backend:
        env |= {"OTEL_EXPORTER_OTLP_ENDPOINT": backend.url, "NO_PROXY": "127.0.0.1"}
        server = start("--traces", env=env).wait_healthy()
        with server.client() as client:
            requests(client)
        server.signal(signal.SIGTERM)  # what is not yet sent is sent now
        assert server.wait() == 0
        assert {path for path, _ in backend.bodies} <= {"/v1/traces"}
        messages = [trace_service.ExportTraceServiceRequest.FromString(body) for _, body in backend.bodies]
    resources = [resource for message in messages for resource in message.resource_spans]
    attributes = [attribute for resource in resources for attribute in resource.resource.attributes]
    names = {attribute.value.string_value for attribute in attributes if attribute.key == "service.name"}
    return [span for resource in resources for scope in resource.scope_spans for span in scope.spans], names


def test_a_request_is_a_trace_with_its_queue_prefill_and_decode(start: Start) -> None:
    def requests(client: httpx.Client) -> None:
        assert run(client, job_id="traced", **JOB)[-1]["type"] == "end"

    found, names = traced(start, requests, OTEL_SERVICE_NAME="teller")
    spans = {span.name: span for span in found}
    assert names == {"teller"}
    assert spans.keys() == {"request", "queue", "prefill", "decode"}
    request = spans["request"]
    assert not request.parent_span_id
    order = [spans[name] for name in ("queue", "prefill", "decode")]
    assert {span.parent_span_id for span in order} == {request.span_id}
    assert len({span.trace_id for span in spans.values()}) == 1
    moments = [moment for span in order for moment in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert moments == sorted(moments)
    assert (moments[0], moments[-1]) == (request.start_time_unix_nano, request.end_time_unix_nano)
    attributes = {a.key: a.value for a in request.attributes}
    assert attributes["llorch.job_id"].string_value == "traced"
    assert attributes["gen_ai.usage.output_tokens"].int_value == 6


def test_a_request_goes_on_the_trace_of_its_sender_and_is_not_recorded_where_that_is_not(start: Start) -> None:
    headers = {
        name: {"traceparent": f"00-{digit * 32}-{digit * 16}-{flags}"}
        for name, digit, flags in (("execute", "1", "01"), ("complete", "2", "01"), ("unrecorded", "3", "00"))
    } | {"broken": {"traceparent": f"00-{'4' * 32}-{'0' * 16}-01"}}

    def requests(client: httpx.Client) -> None:
        for name, sent in headers.items():
            if name == "complete":
                body = {"prompt": "Once", "max_tokens": 2}
                assert client.post("/v1/completions", json=body, headers=sent).status_code == 200
            else:
                with client.stream("POST", "/execute", json={"job_id": name, **JOB}, headers=sent) as response:
                    response.read()

    spans, _ = traced(start, requests)
    request = {span.trace_id.hex(): span for span in spans if span.name == "request"}
    for digit in "12":
        found = request.pop(digit * 32)
        assert found.parent_span_id.hex() == digit * 16
        parts = [span for span in spans if span.trace_id == found.trace_id and span is not found]
        assert {span.parent_span_id for span in parts} == {found.span_id}
        assert len(parts) == 3
    (own,) = request.values()  # a broken header is none
    assert {a.key: a.value for a in own.attributes}["llorch.job_id"].string_value == "broken"
    assert not own.parent_span_id
    assert len(spans) == 3 * 4


def test_every_metric_that_the_dashboard_asks_for_is_there(server: Server) -> None:
    board = json.loads((ROOT / "examples" / "grafana" / "llorch.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(?:llorch|process)_\w+", query)}
    assert len(asked) >= 15
    there = {name.partition("{")[0] for name in server.metrics()}
    assert not asked - there


def test_without_traces_nothing_of_opentelemetry_is_imported(tmp_path: Path) -> None:
    from tests.unit.test_layout import loaded_by

    assert "opentelemetry" not in loaded_by("import llorch.http.server")
    assert "opentelemetry" in loaded_by("from llorch.http.traces import Tracer; Tracer()")
