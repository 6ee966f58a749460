"""The examples in examples/clients, each run against a real server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.conftest import Start
from tests.server.process import Server, run, text
from tests.support import ROOT, absent

CLIENTS = {"chat.sh": "bash", "chat_httpx.py": sys.executable, "chat_openai.py": sys.executable, "chat.mjs": "node"}
QUESTION = 'Lily said "hi" to the d\u00f6g'


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "plain.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return path


@pytest.fixture(scope="module")
def locked(start: Start, template: Path) -> Server:
    return start("--chat-template", str(template), env={"LLORCH_API_KEY": "key"}).wait_healthy()


def ask(server: Server, client: str, key: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which(CLIENTS[client])
    if program is None or (client == "chat.sh" and shutil.which("curl") is None):
        absent(f"{CLIENTS[client]} or curl is not installed")
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return subprocess.run(
        [program, str(ROOT / "examples" / "clients" / client), QUESTION],
        env={**environment, "LLORCH_URL": server.url, "LLORCH_KEY": key},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_client_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples" / "clients").iterdir() if path.is_file()} == CLIENTS.keys()


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_prints_the_answer(locked: Server, client: str) -> None:
    done = ask(locked, client, "key")
    assert done.returncode == 0, done.stderr
    with locked.client(headers={"Authorization": "Bearer key"}) as http:
        expected = text(run(http, job_id=client, prompt=QUESTION, max_tokens=64, temperature=0))
    assert len(expected) > 40
    assert done.stdout.rstrip("\n") == expected.rstrip("\n")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_that_is_refused_fails(locked: Server, client: str) -> None:
    done = ask(locked, client, "wrong")
    assert done.returncode != 0
    assert "key" in done.stdout + done.stderr
