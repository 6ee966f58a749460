"""Servers that tests share, and a factory for those that need their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.process import Server, paced
from tests.support import shared

Start = Callable[..., Server]


@pytest.fixture(scope="session")
def stories() -> Path:
    """A small trained model: context 512, SentencePiece with byte fallback."""
    return shared("models", "stories260K.gguf")


@pytest.fixture(scope="session")
def start(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts `llorch serve` with more options; ended after the session at the latest."""
    servers: list[Server] = []
    folder = tmp_path_factory.mktemp("serve")
    environment = paced(folder)

    def start(*options: str, model: Path | str | None = stories, **settings: object) -> Server:
        env = {**environment, **(settings.pop("env", None) or {})}  # type: ignore[dict-item]
        named = ["--model", str(model)] if model is not None else []
        provider = [] if "--provider" in options else ["--provider", "numpy-cpu"]
        server = Server(folder, *named, *provider, *options, env=env, **settings)  # type: ignore[arg-type]
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def server(start: Start) -> Server:
    """The server as it comes, but for a faster pulse."""
    return start("--keep-alive", "0.2", "--metrics-interval", "0.05").wait_healthy()


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def slow(start: Start) -> Server:
    """A server whose steps take 10 ms, which runs one job at a time and reads a prompt token by token."""
    options = ("--provider", "paced", "--parallel", "1", "--chunk", "1", "--max-queue", "2")
    pulse = ("--keep-alive", "0.2", "--metrics-interval", "0.2")
    return start(*options, *pulse, env={"PACED_STEP_SECONDS": "0.01"}).wait_healthy()


@pytest.fixture
def slow_client(slow: Server) -> Iterator[httpx.Client]:
    with slow.client() as client:
        yield client
