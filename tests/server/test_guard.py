"""Pages of other sites, in a browser on the worker's own machine: without a key, and with sites that may ask."""

from __future__ import annotations

import socket

import httpx
import pytest

from tests.server.conftest import Start
from tests.server.process import Server, eventually

JOB = {"job_id": "guarded", "prompt": "Once", "max_tokens": 1}
OTHER = "http://evil.example"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example:80",
        "localhost.evil.example",
        "10.0.0.1",
        "[::2]",
        "[",
        "",
        "nolocalhost",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/", "/debug/engine"])
def test_a_name_that_is_not_this_machines_is_refused(client: httpx.Client, host: str, path: str) -> None:
    response = client.get(path, headers={"Host": host})
    assert response.status_code == 403
    body = response.json()
    code, message = (
        (body["error"]["code"], body["error"]["message"]) if "error" in body else (body["code"], body["message"])
    )
    assert code.upper() == "FORBIDDEN"
    assert "--allowed-host" in message
    assert ("error" in body) == path.startswith("/v1")


LOCAL = ["localhost", "LOCALHOST:1", "a.localhost", "localhost.", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:8080"]


@pytest.mark.parametrize("host", LOCAL)
def test_this_machines_names_are_taken(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_names_that_are_allowed_and_the_pools_own_are_taken_and_no_others(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    names = ("--allowed-host", "Worker.lan", "--allowed-host", "other.lan", "--uri", "http://pool.name:80")
    server = start(*names, port=port)
    eventually(lambda: server.logged("ready"), 60)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        for host in ("worker.lan:9", "OTHER.lan", "pool.name", "localhost"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200, host
        assert client.get("/v1/models", headers={"Host": "third.lan"}).status_code == 403
    server.close()


@pytest.mark.parametrize("origin", [OTHER, "null", "https://localhost:1", "http://127.0.0.1"])
def test_another_sites_page_cannot_post(client: httpx.Client, server: Server, origin: str) -> None:
    accepted = server.metrics()["llorch_requests_accepted_total"]
    for path in ("/execute", "/cancel", "/v1/completions"):
        headers = {"Origin": origin, "Content-Type": "text/plain"}
        response = client.post(path, json=JOB, headers=headers)
        assert response.status_code == 403
        assert "--allowed-origin" in response.text
    assert server.metrics()["llorch_requests_accepted_total"] == accepted
    assert client.get("/health", headers={"Origin": origin}).status_code == 200  # which its browser keeps from it


def test_the_workers_own_page_can_post(client: httpx.Client, server: Server) -> None:
    assert client.post("/cancel", json={"job_id": "x"}, headers={"Origin": server.url}).status_code == 202


def test_with_a_key_names_and_sites_do_not_matter(start: Start) -> None:
    server = start(env={"LLORCH_API_KEY": "key"}).wait_healthy()
    headers = {"Authorization": "Bearer key", "Host": "evil.example", "Origin": OTHER}
    with server.client(headers=headers) as client:
        assert client.post("/cancel", json={"job_id": "x"}).status_code == 202
        assert client.get("/debug/engine", headers={"X-Forwarded-For": "10.0.0.1"}).status_code == 200
    server.close()


# ---- sites that may ask ----

PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
SITE = "https://chat.example"


def test_no_other_site_may_ask_unless_it_is_allowed(client: httpx.Client) -> None:
    headers = {"Origin": SITE, **PREFLIGHT}
    assert "access-control-allow-origin" not in client.options("/v1/chat/completions", headers=headers).headers
    assert "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": SITE}).headers


@pytest.mark.parametrize("key", [None, "key"])
def test_a_site_that_is_allowed_may_ask_and_see_the_answers(start: Start, key: str | None) -> None:
    server = start(
        "--allowed-origin", SITE, "--allowed-origin", "http://localhost:3000", env=key_of(key)
    ).wait_healthy()
    given = {"Authorization": f"Bearer {key}"} if key else {}
    with server.client() as client:
        for path in ("/v1/completions", "/execute"):
            asked = client.options(path, headers={"Origin": SITE, **PREFLIGHT})
            assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (204, SITE)
            assert "authorization" in asked.headers["access-control-allow-headers"].lower()
            answer = client.post(path, json=JOB, headers={"Origin": SITE, **given})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, SITE)
            assert "X-Correlation-Id" in answer.headers["access-control-expose-headers"]
            wrong = client.post(path, json={}, headers={"Origin": SITE, **given})
            assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (400, SITE)
        refused = client.options("/v1/completions", headers={"Origin": OTHER, **PREFLIGHT})
        assert "access-control-allow-origin" not in refused.headers
        if key:
            for origin, seen in ((SITE, SITE), (OTHER, None)):
                locked = client.post("/v1/completions", json=JOB, headers={"Origin": origin})
                assert (locked.status_code, locked.headers.get("access-control-allow-origin")) == (401, seen)
            assert client.options("/v1/completions", headers={"Origin": SITE}).status_code == 401
        else:
            assert client.post("/v1/completions", json=JOB, headers={"Origin": OTHER}).status_code == 403
    server.close()


def test_every_site_may_be_allowed(start: Start) -> None:
    server = start("--allowed-origin", "*").wait_healthy()
    with server.client() as client:
        answer = client.post("/v1/completions", json=JOB, headers={"Origin": OTHER})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
        assert client.get("/v1/models", headers={"Host": "evil.example", "Origin": OTHER}).status_code == 403
    server.close()


def test_what_is_no_site_is_refused_at_the_start(start: Start) -> None:
    server = start("--allowed-origin", "chat.example")
    assert server.wait() == 2
    assert "https://chat.example" in server.stderr


def key_of(key: str | None) -> dict[str, str]:
    return {"LLORCH_API_KEY": key} if key else {}


# ---- who looks into the engine ----


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Real-IP"])
def test_the_engine_is_not_shown_to_whom_a_proxy_passes_on(client: httpx.Client, header: str) -> None:
    assert client.get("/debug/engine").status_code == 200
    response = client.get("/debug/engine", headers={header: "127.0.0.1"})
    assert (response.status_code, response.json()["code"]) == (403, "FORBIDDEN")
