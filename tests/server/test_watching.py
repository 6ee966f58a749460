"""What leaves the worker for those who watch it: heartbeats, traces, and metrics on a dashboard."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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


def test_a_request_is_a_trace_with_its_queue_prefill_and_decode(start: Start) -> None:
    trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    with collector() as backend:
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": backend.url, "OTEL_SERVICE_NAME": "teller", "NO_PROXY": "127.0.0.1"}
        server = start("--traces", env=env).wait_healthy()
        with server.client() as client:
            assert run(client, job_id="traced", **JOB)[-1]["type"] == "end"
        server.signal(signal.SIGTERM)  # what is not yet sent is sent now
        assert server.wait() == 0
        spans, names = {}, set()
        for path, body in backend.bodies:
            assert path == "/v1/traces"
            message = trace_service.ExportTraceServiceRequest.FromString(body)
            for resource in message.resource_spans:
                names |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
                spans |= {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert names == {"teller"}
    assert spans.keys() == {"request", "queue", "prefill", "decode"}
    request = spans["request"]
    order = [spans[name] for name in ("queue", "prefill", "decode")]
    assert {span.parent_span_id for span in order} == {request.span_id}
    assert len({span.trace_id for span in spans.values()}) == 1
    moments = [moment for span in order for moment in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert moments == sorted(moments)
    assert (moments[0], moments[-1]) == (request.start_time_unix_nano, request.end_time_unix_nano)
    attributes = {a.key: a.value for a in request.attributes}
    assert attributes["llorch.job_id"].string_value == "traced"
    assert attributes["gen_ai.usage.output_tokens"].int_value == 6


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
