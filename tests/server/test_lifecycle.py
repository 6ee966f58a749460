"""A worker from its start to its end: loading, the callback, faults, signals."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from llorch import __version__
from tests.server.conftest import Start
from tests.server.process import Server, eventually, execute, run

JOB = {"prompt": "Once", "temperature": 0}


class PoolManager:
    """An orchestrator that takes registrations, after as many 500s as it is told."""

    def __init__(self, failures: int) -> None:
        self.registrations: list[dict[str, Any]] = []
        self.times: list[float] = []
        manager = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                manager.times.append(time.monotonic())
                manager.registrations.append({"path": self.path, **json.loads(body)})
                self.send_response(500 if len(manager.registrations) <= failures else 204)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/pool/ready?token=hidden"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def pool_manager(failures: int = 0) -> Iterator[PoolManager]:
    manager = PoolManager(failures)
    try:
        yield manager
    finally:
        manager.close()


# ---- the start ----


def test_a_loading_worker_says_so_and_then_registers(start: Start, tmp_path: Path, stories: Path) -> None:
    gate = tmp_path / "open"
    with pool_manager() as manager:
        options = ("--worker-id", "w-1", "--callback-url", manager.url)
        server = start("--provider", "paced", *options, env={"PACED_OPEN_WHEN": str(gate)})
        with server.client() as client:
            health = client.get("/health")
            assert health.status_code == 503
            assert health.json().keys() == {"status", "progress"}
            assert health.json()["status"] == "loading"
            assert 0.0 <= health.json()["progress"] < 1.0
            refused = client.post("/execute", json={"job_id": "early", **JOB})
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert (refused.json()["code"], refused.json()["retriable"]) == ("WORKER_UNHEALTHY", True)
            assert not manager.registrations
            gate.touch()
            server.wait_healthy()
            eventually(lambda: manager.registrations)
            eventually(lambda: server.logged("callback sent"))
            (registration,) = manager.registrations
            assert registration.pop("vram_bytes") == client.get("/health").json()["vram_bytes_used"]
        assert registration == {
            "path": "/pool/ready?token=hidden",
            "worker_id": "w-1",
            "uri": server.url,
            "model_ref": str(stories),
            "worker_type": "paced",
            "memory_architecture": "cpu",
            "capabilities": ["text-gen"],
        }
    assert [line["percent"] for line in server.logged("loading")] == [0, 25, 50, 75, 100]
    assert "hidden" not in str(server.lines)
    server.close()


def test_the_log_says_which_provider_and_device_were_chosen_and_why_then_the_address(server: Server) -> None:
    eventually(lambda: server.logged("ready"))  # /health may say so first
    events = [line["event"] for line in server.lines]
    chosen = next(i for i, event in enumerate(events) if event.startswith("provider numpy-cpu on cpu"))
    assert "chosen by name" in events[chosen]
    assert events[0] == "settings"
    assert set(events[1:chosen]) == {"loading"}
    assert "operations bound" in events[chosen + 1]
    ready = server.lines[events.index("ready")]
    assert ready["uri"] == server.url
    assert (ready["provider"], ready["device"], ready["context"], ready["parallel"]) == ("numpy-cpu", "cpu", 512, 8)
    assert events.index("ready") > chosen


def test_the_log_says_which_file_was_read_and_what_it_changed_but_no_secret(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text('parallel = 3\nchunk = 512\napi_key = ["hidden-key"]\n')
    options = ("--config", str(file), "--callback-url", "http://user:hidden@localhost:9999/?token=hidden")
    server = start(*options).wait_healthy()
    (line,) = server.logged("settings")
    assert line["file"] == str(file)
    assert line["version"] == __version__
    changed = line["changed"]
    assert changed.pop("model").endswith(".gguf")
    assert changed == {
        "api_key": "(secret)",
        "callback_url": "http://localhost:9999/",
        "config": str(file),
        "log_format": "json",
        "parallel": 3,
        "port": 0,
        "provider": "numpy-cpu",
    }
    assert "hidden" not in str(server.lines)
    server.close()


def test_a_context_that_is_too_long_says_where_it_was_written(start: Start) -> None:
    server = start(env={"LLORCH_CONTEXT": "4096"})
    assert "context 4096 is outside 2 to 512" in ends(server, 2)
    logs_why(server, "(LLORCH_CONTEXT; --context counts more)")


def test_a_callback_is_tried_again_with_growing_pauses(start: Start) -> None:
    with pool_manager(failures=4) as manager:
        server = start("--callback-url", manager.url, "--callback-pause", "0.1").wait_healthy()
        eventually(lambda: server.logged("callback sent"))
        assert len(manager.registrations) == 5
        pauses = [later - earlier for earlier, later in zip(manager.times, manager.times[1:], strict=False)]
        assert pauses == sorted(pauses)
        assert pauses[-1] >= 4 * 0.1
        assert len({registration["worker_id"] for registration in manager.registrations}) == 1
        server.close()


def test_a_callback_that_never_succeeds_ends_the_worker(start: Start) -> None:
    with pool_manager(failures=100) as manager:
        server = start("--callback-url", manager.url, "--callback-pause", "0.01")
        assert server.wait() == 1
        assert len(manager.registrations) == 5
    assert "failed 5 times, last: status 500" in server.stderr
    assert "hidden" not in server.stderr
    assert len(server.stderr.splitlines()) <= 2


def test_a_callback_nobody_answers_ends_the_worker(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        server = start("--callback-url", url, "--callback-pause", "0.01", "--callback-timeout", "0.1")
        assert server.wait() == 1
    assert "Timeout" in server.stderr


def test_a_callback_in_test_mode_is_skipped(start: Start) -> None:
    server = start("--callback-url", "http://localhost:9999/callback").wait_healthy()
    assert eventually(lambda: server.logged("callback skipped: the URL says test mode"))
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_a_start_where_nothing_can_be_kept_takes_longer_and_says_so(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("llorch_provider_numba")
    (tmp_path / "file").touch()
    server = start("--provider", "numba-cpu", env={"XDG_CACHE_HOME": str(tmp_path / "file")}).wait_healthy()
    with server.client() as client:
        assert run(client, job_id="a", max_tokens=2, **JOB)[-1]["type"] == "end"
    (warning,) = (line for line in server.lines if line["level"] == "warning")
    assert str(tmp_path / "file" / "llorch") in warning["event"]
    assert "Not a directory" in warning["event"]
    assert "half a minute" in warning["event"]
    assert [line for line in server.lines if line["event"].startswith("numba-cpu compiles the operations")]
    server.close()
    assert server.stderr == ""


# ---- what cannot start ----


def ends(server: Server, status: int) -> str:
    """What it says on stderr, once it has ended with this status."""
    assert server.wait(60) == status
    assert 1 <= len(server.stderr.splitlines()) <= 2, server.stderr
    assert server.stderr.startswith("llorch: error: ")
    return server.stderr


def logs_why(server: Server, reason: str) -> None:
    """It has logged why it ended, and nothing that did not happen."""
    (error,) = server.logged("cannot start")
    assert error["level"] == "error"
    assert reason in error["reason"]
    assert not server.logged("shutting down")
    assert not server.logged("stopped")


def test_a_port_in_use(start: Start, server: Server) -> None:
    port = httpx.URL(server.url).port
    second = start(port=port)
    assert f"port {port}" in ends(second, 2)
    logs_why(second, f"port {port}")


def test_a_model_that_is_not_there(start: Start, tmp_path: Path) -> None:
    server = start(model=tmp_path / "missing.gguf")
    assert "missing.gguf" in ends(server, 1)
    logs_why(server, "missing.gguf")


def test_a_model_that_is_none(start: Start, tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_text("<html>not a model</html>")
    assert "page.gguf" in ends(start(model=tmp_path / "page.gguf"), 1)


def test_an_unknown_provider(start: Start) -> None:
    assert "numpy-cpu" in ends(start("--provider", "numpi-cpu"), 1)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_open_to_others_without_a_key(start: Start, host: str) -> None:
    error = ends(start("--host", host), 2)
    assert "LLORCH_API_KEY" in error
    assert "--insecure" in error


def test_a_key_that_is_empty(start: Start) -> None:
    assert "LLORCH_API_KEY" in ends(start(env={"LLORCH_API_KEY": " , "}), 2)


def test_an_unknown_option(start: Start) -> None:
    assert "did you mean --max-queue" in ends(start("--max-queu", "5"), 2)


def test_a_job_in_a_step_that_takes_long_still_ends_on_time(start: Start, tmp_path: Path) -> None:
    stall = tmp_path / "stall"
    env = {"PACED_STALL_WHEN": str(stall), "PACED_STEP_SECONDS": "0.01"}
    server = start("--provider", "paced", "--request-timeout", "1", env=env).wait_healthy()
    with server.client() as client, execute(client, job_id="stuck", **JOB) as stream:
        stream.next("token")
        stall.touch()
        assert list(stream)[-1]["code"] == "INFERENCE_TIMEOUT"
        stall.unlink()
        assert run(client, job_id="after", max_tokens=2, **JOB)[-1]["type"] == "end"
    server.close()


# ---- the end ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_a_running_job_finish_and_turns_new_ones_away(start: Start, number: signal.Signals) -> None:
    server = start("--provider", "paced", env={"PACED_STEP_SECONDS": "0.01"}).wait_healthy()
    with server.client() as client, execute(client, job_id="runs", max_tokens=80, **JOB) as stream:
        stream.next("token")
        server.signal(number)
        eventually(lambda: server.logged("shutting down"))
        with server.client() as other:  # a new connection, which is answered, not refused
            refused = other.post("/execute", json={"job_id": "late", **JOB})
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert refused.json()["retriable"] is True
            health = other.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
            assert health.headers["retry-after"]
        end = list(stream)[-1]
        assert (end["type"], end["tokens_out"]) == ("end", 80)
    assert server.wait() == 0
    assert server.stderr == ""


def test_a_job_beyond_the_shutdown_timeout_gets_an_error_event(start: Start) -> None:
    options = ("--provider", "paced", "--shutdown-timeout", "0.3")
    server = start(*options, env={"PACED_STEP_SECONDS": "0.02"}).wait_healthy()
    with server.client() as client, execute(client, job_id="runs", **JOB) as stream:
        stream.next("token")
        server.signal(signal.SIGTERM)
        began = time.monotonic()
        last = list(stream)[-1]
        assert (last["type"], last["code"], last["retriable"]) == ("error", "WORKER_UNHEALTHY", True)
        assert 0.2 < time.monotonic() - began < 2
    assert server.wait() == 0
    assert server.stderr == ""


def test_a_second_signal_ends_at_once(start: Start) -> None:
    server = start("--provider", "paced", env={"PACED_STEP_SECONDS": "0.05"}).wait_healthy()
    with server.client() as client, execute(client, job_id="runs", **JOB) as stream:
        stream.next("token")
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGTERM)  # the same wish, delivered twice
        time.sleep(0.3)
        assert server.process.poll() is None
        server.signal(signal.SIGTERM)
        assert server.wait(2) == 128 + signal.SIGTERM
        with pytest.raises(httpx.RemoteProtocolError):
            list(stream)


def test_a_signal_while_loading_ends_in_order(start: Start, tmp_path: Path) -> None:
    server = start("--provider", "paced", env={"PACED_OPEN_WHEN": str(tmp_path / "never")})
    assert server.url
    server.signal(signal.SIGTERM)
    assert server.wait(5) == 0


def test_a_terminal_that_goes_away_does_not_end_what_nohup_started(start: Start) -> None:
    server = start(wrapper=("nohup",)).wait_healthy()
    server.signal(signal.SIGHUP)
    time.sleep(0.3)
    assert server.process.poll() is None
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_an_idle_worker_ends_quickly(start: Start) -> None:
    server = start().wait_healthy()
    began = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.wait(3) == 0
    assert time.monotonic() - began < 2


def test_console_logs_are_lines_for_people(stories: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llorch", "serve", "--model", str(stories), "--port", "0"]
    command += ["--provider", "numpy-cpu", "--log-format", "console"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        while "load_s=" not in lines[-1]:
            lines.append(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert any("provider numpy-cpu on cpu" in line for line in lines)
    assert not any(line.startswith("{") for line in lines)
