"""What holds for every route: keys, correlation ids, JSON errors, /health, /metrics, /docs."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median

import httpx
import pytest

from llorch import __version__
from tests.server.conftest import Start
from tests.server.process import Server, eventually, execute, run

JOB = {"prompt": "Once", "max_tokens": 2}


def test_health_tells_what_is_served(client: httpx.Client) -> None:
    response = client.get("/health")
    assert response.status_code == 200
    health = response.json()
    assert health.pop("uptime_seconds") > 0
    assert health.pop("vram_bytes_used") > 1_000_000
    assert health.pop("model")
    assert health == {
        "status": "healthy",
        "provider": "numpy-cpu",
        "device": "cpu",
        "resident": True,
        "quant_kind": "F32",
        "tokenizer_kind": health["tokenizer_kind"],
        "vocab_size": 512,
        "context_length": 512,
        "capabilities": ["text-gen"],
        "protocol": "sse",
        "version": __version__,
        "running": 0,
        "waiting": 0,
        "kv_blocks_free": 8 * 512 // 32,
    }
    assert isinstance(health["tokenizer_kind"], str)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "NOT_FOUND"),
        ("GET", "/health/deeper", 404, "NOT_FOUND"),
        ("GET", "/docs/nothing", 404, "NOT_FOUND"),
        ("GET", "/docs/assets/nothing", 404, "NOT_FOUND"),
        ("GET", "/execute", 405, "METHOD_NOT_ALLOWED"),
        ("DELETE", "/health", 405, "METHOD_NOT_ALLOWED"),
    ],
)
def test_errors_of_routing_are_json(client: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    body = response.json()
    assert body.keys() == {"code", "message", "retriable"}
    assert (body["code"], body["retriable"]) == (code, False)


@pytest.mark.parametrize(
    ("path", "methods"), [("/health", {"GET", "HEAD"}), ("/v1/models", {"GET", "HEAD"}), ("/execute", {"POST"})]
)
def test_allow_lists_what_a_path_answers(client: httpx.Client, path: str, methods: set[str]) -> None:
    for asked in ("DELETE", "OPTIONS"):
        assert set(client.request(asked, path).headers["allow"].split(", ")) == methods | {"OPTIONS"}


@pytest.mark.parametrize("path", ["/execute", "/v1/completions", "/tokenize"])
def test_a_body_that_is_encoded_is_415_and_the_encoding_named(client: httpx.Client, path: str) -> None:
    response = client.post(path, content=b"{}", headers={"Content-Encoding": "gzip"})
    assert (response.status_code, response.headers["accept-encoding"]) == (415, "identity")
    body = response.json()
    assert "'gzip'" in body.get("error", body)["message"]


def test_answers_do_not_wait_for_an_acknowledgement(client: httpx.Client) -> None:
    """Without TCP_NODELAY each answer, and each event, takes 40 ms more."""

    def seconds() -> float:
        began = time.perf_counter()
        client.get("/health")
        return time.perf_counter() - began

    assert median(seconds() for _ in range(21)) < 0.03


# ---- correlation ids ----

PATHS = [("GET", "/health", 200), ("GET", "/nothing", 404), ("POST", "/execute", 400), ("GET", "/execute", 405)]


@pytest.mark.parametrize(("method", "path", "status"), PATHS)
def test_a_correlation_id_is_sent_back(client: httpx.Client, method: str, path: str, status: int) -> None:
    response = client.request(method, path, headers={"X-Correlation-Id": "abc-123"})
    assert (response.status_code, response.headers["x-correlation-id"]) == (status, "abc-123")


@pytest.mark.parametrize(("method", "path", "status"), PATHS)
def test_a_request_id_is_another_name_of_it_and_both_are_sent(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    for sent, found in (
        ({"X-Request-Id": "req-1"}, "req-1"),
        ({"X-Request-Id": "req-1", "X-Correlation-Id": "abc-123"}, "abc-123"),
        ({"X-Request-Id": "req-1", "X-Correlation-Id": "not valid"}, "req-1"),
        ({"X-Request-Id": "not valid"}, "[0-9a-f]{32}"),
    ):
        headers = client.request(method, path, headers=sent).headers
        assert re.fullmatch(found, headers["x-correlation-id"])
        assert headers["x-request-id"] == headers["x-correlation-id"]


@pytest.mark.parametrize(("method", "path", "status"), PATHS)
def test_a_correlation_id_is_generated_where_absent(client: httpx.Client, method: str, path: str, status: int) -> None:
    ids = {client.request(method, path).headers["x-correlation-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", found) for found in ids)


@pytest.mark.parametrize("sent", [b"x" * 129, b"with space", b"caf\xc3\xa9", b"tab\there", b""])
def test_a_correlation_id_that_is_long_or_unprintable_is_replaced(client: httpx.Client, sent: bytes) -> None:
    response = client.get("/health", headers={b"X-Correlation-Id": sent})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-correlation-id"])


def test_each_log_line_of_a_request_has_its_correlation_id(server: Server) -> None:
    with server.client(headers={"X-Correlation-Id": "in-the-logs"}) as client:
        run(client, job_id="logged", **JOB)
        client.post("/execute", content=b"{}")

    def lines() -> list[str] | None:
        found = [line["event"] for line in list(server.lines) if line.get("correlation_id") == "in-the-logs"]
        return found if len(found) == 5 else None

    assert eventually(lines) == ["job accepted", "job over", "request", "request refused", "request"]
    request = server.logged("request", correlation_id="in-the-logs", status=200)[0]  # the other is 400
    assert (request["method"], request["path"]) == ("POST", "/execute")
    assert request["duration_ms"] > 0
    assert {line["client"] for line in server.lines if line.get("correlation_id") == "in-the-logs"} == {"127.0.0.1"}


def test_each_log_line_of_a_request_says_whose_it_is_and_not_with_which_key(locked: Server) -> None:
    headers = {"X-Correlation-Id": "whose", "Authorization": "Bearer second-key"}
    with locked.client(headers=headers) as client:
        run(client, job_id="whose", **JOB)
    eventually(lambda: locked.logged("request", correlation_id="whose"))
    lines = [line for line in locked.lines if line.get("correlation_id") == "whose"]
    assert [line["event"] for line in lines] == ["job accepted", "job over", "request"]
    assert {line["key"] for line in lines} == {hashlib.sha256(b"second-key").hexdigest()[:8]}
    assert "second-key" not in str(locked.lines)
    with locked.client(headers={"X-Correlation-Id": "nobody"}) as client:
        client.post("/execute", json={})
    assert "key" not in eventually(lambda: locked.logged("request", correlation_id="nobody"))[0]


# ---- metrics ----


def test_metrics_count_what_happens(client: httpx.Client, server: Server) -> None:
    before = server.metrics()
    tokens = sum(run(client, job_id=f"counted {i}", prompt="Once", max_tokens=5)[-1]["tokens_out"] for i in range(2))
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before[name]

    assert grown('llorch_requests_total{outcome="ended"}') == 2
    assert grown("llorch_requests_accepted_total") == 2
    assert grown("llorch_tokens_generated_total") == tokens
    assert grown("llorch_prompt_tokens_total") >= 4
    assert grown("llorch_time_to_first_token_seconds_count") == 2
    assert grown("llorch_inter_token_seconds_count") > 0
    assert grown("llorch_queue_seconds_count") == grown("llorch_request_seconds_count") == 2
    assert grown('llorch_http_requests_total{route="/execute",status="200"}') == 2
    build = f'llorch_build_info{{model="stories260K",provider="numpy-cpu",version="{__version__}"}}'
    assert after[build] == 1
    assert not [name for name in after if "_created" in name]
    assert after["llorch_vram_bytes"] > 1_000_000
    assert after["llorch_kv_blocks_total"] > 0
    assert after["llorch_uptime_seconds"] > before["llorch_uptime_seconds"]
    assert after["llorch_queue_depth"] == after["llorch_running_requests"] == after["llorch_kv_blocks_used"] == 0


def test_metrics_tell_apart_why_requests_were_rejected(slow_client: httpx.Client, slow: Server) -> None:
    before = slow.metrics()
    waiting = [execute(slow_client, job_id=f"fills {i}", prompt="Once", max_tokens=400) for i in range(3)]
    with ExitStack() as stack:
        for stream in waiting:
            stack.enter_context(stream)
        body = {"job_id": "fills 0", "prompt": "Once"}
        assert slow_client.post("/execute", json=body).status_code == 409
        assert slow_client.post("/execute", json=body | {"job_id": "more"}).status_code == 503
        assert slow_client.post("/execute", json={}).status_code == 400
        assert slow_client.get("/nothing/" + "x" * 50).status_code == 404
        after = slow.metrics()
    codes = ("INVALID_REQUEST", "JOB_EXISTS", "QUEUE_FULL", "WORKER_UNHEALTHY")
    names = [f'llorch_requests_rejected_total{{code="{code}"}}' for code in codes]
    assert [after[name] - before[name] for name in names] == [1, 1, 1, 0]
    total = 'llorch_requests_total{outcome="rejected"}'
    assert after[total] - before[total] == 3
    assert after['llorch_http_requests_total{route="/execute",status="503"}'] >= 1
    assert after['llorch_http_requests_total{route="other",status="404"}'] >= 1
    assert "/nothing" not in str(after)


TEXTS = {
    "/": "text/html",
    "/page/app.js": "text/javascript",
    "/page/style.css": "text/css",
    "/metrics": "text/plain; version=0.0.4",
    "/docs": "text/html",
    "/docs/start.js": "text/javascript",
}


@pytest.mark.parametrize("path", TEXTS)
def test_a_text_names_its_charset_once(client: httpx.Client, path: str) -> None:
    assert client.get(path).headers.get_list("content-type") == [f"{TEXTS[path]}; charset=utf-8"]


def test_metrics_come_in_the_format_that_is_asked_for(client: httpx.Client) -> None:
    kind = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}).headers[
        "content-type"
    ]
    assert kind.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert kind.count("charset") == 1


# ---- keys ----


@pytest.fixture(scope="module")
def locked(start: Start) -> Server:
    return start(env={"LLORCH_API_KEY": "first-key, second-key"}).wait_healthy()


@pytest.fixture
def locked_client(locked: Server) -> Iterator[httpx.Client]:
    with locked.client() as client:
        yield client


GUARDED = [
    ("POST", "/execute"),
    ("POST", "/cancel"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/docs/openapi.json"),
    ("GET", "/nothing"),
    ("GET", "/health/deeper"),
    ("GET", "//health"),
]


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "MISSING_API_KEY"),
        ("Basic Zmlyc3Qta2V5", "MISSING_API_KEY"),
        ("Bearer", "MISSING_API_KEY"),
        ("Bearer wrong", "INVALID_API_KEY"),
        ("Bearer first-key, second-key", "INVALID_API_KEY"),
        ("Bearer first-ke", "INVALID_API_KEY"),
    ],
)
def test_a_route_without_the_right_key_is_401(
    locked_client: httpx.Client, method: str, path: str, header: str | None, code: str
) -> None:
    url = str(locked_client.base_url).rstrip("/") + path
    response = locked_client.request(method, url, headers={} if header is None else {"Authorization": header})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-correlation-id"]
    error = response.json()["error"]
    assert error.keys() == {"code", "message"}
    assert error["code"] == code
    assert "-key" not in error["message"]


def test_health_needs_no_key_and_the_root_page_is_left_open(locked_client: httpx.Client) -> None:
    assert locked_client.get("/health").status_code == 200
    assert locked_client.get("/").status_code != 401


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_each_key_opens_every_route(locked: Server, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    with locked.client(headers=headers) as client:
        assert run(client, job_id="with a key", **JOB)[-1]["type"] == "end"
        assert client.post("/cancel", json={"job_id": "x"}).status_code == 202
        assert client.get("/docs").status_code == 200
    assert locked.metrics(headers)["llorch_uptime_seconds"] > 0


def test_keys_are_in_no_log_line(locked: Server) -> None:
    assert not [line for line in locked.lines if "-key" in str(line)]


# ---- docs ----


def test_docs_load_nothing_from_another_host(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    # the browser itself refuses whatever the assets might ask for elsewhere
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    references = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(references) == 4
    for reference in references:
        assert reference.startswith("/docs/")
        asset = client.get(reference)
        assert asset.status_code == 200, reference
        assert len(asset.content) > 100
    start = client.get("/docs/start.js").text
    assert "validatorUrl: null" in start
    for served in (page.text, start, client.get("/docs/openapi.json").text):
        assert not re.search(r"https?://|[\"'(]//", served)


def test_the_document_describes_each_route(client: httpx.Client) -> None:
    document = client.get("/docs/openapi.json").json()
    assert document["openapi"] == "3.0.3"
    openai = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model_id}"}
    worker = {"/health", "/execute", "/cancel", "/metrics", "/tokenize", "/detokenize", "/debug/engine"}
    assert document["paths"].keys() == worker | openai
    execute = document["paths"]["/execute"]["post"]
    assert execute["responses"].keys() == {"200", "400", "408", "409", "413", "499", "503"}
    assert execute["responses"]["200"]["content"].keys() == {"text/event-stream"}
    fields = execute["requestBody"]["content"]["application/json"]["schema"]
    assert fields["required"] == ["job_id", "prompt"]
    assert fields["additionalProperties"] is False
    assert fields["properties"]["temperature"] == {
        "type": "number",
        "description": fields["properties"]["temperature"]["description"],
        "default": 1.0,
        "minimum": 0.0,
        "maximum": 2.0,
    }
    example = execute["requestBody"]["content"]["application/json"]["example"]
    assert run(client, **example)[-1]["type"] == "end"
    for item in document["paths"].values():
        for operation in item.values():
            assert operation["summary"]
            assert operation["responses"]


def test_the_document_of_a_locked_worker_names_the_keys(locked: Server) -> None:
    with locked.client(headers={"Authorization": "Bearer first-key"}) as client:
        document = client.get("/docs/openapi.json").json()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert "401" in document["paths"]["/execute"]["post"]["responses"]
    assert document["paths"]["/health"]["get"]["security"] == []


def test_the_document_keeps_to_openapi_3_0(client: httpx.Client) -> None:
    """Swagger UI 4 renders nothing else."""

    def check(node: object, path: str = "") -> None:
        if isinstance(node, list):
            for i, item in enumerate(node):
                check(item, f"{path}[{i}]")
        elif isinstance(node, dict):
            assert not isinstance(node.get("type"), list), path
            assert node.get("type") != "null", path
            assert "const" not in node, path
            assert node.get("required") != [], path
            if "$ref" in node:
                assert resolve(str(node["$ref"])), path
            for key, value in node.items():
                check(value, f"{path}/{key}")

    document = client.get("/docs/openapi.json").json()

    def resolve(reference: str) -> object:
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
        return node

    check(document)
