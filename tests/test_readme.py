"""Every command in the README is run, and what it prints is what the README says it prints.

A block fenced as `console` holds commands behind `$ ` and their output; `...` in the output stands for anything. The
command that runs these tests is the one that is not run. `llorch serve` goes on in the background until the end.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import ROOT, shared

README = ROOT / "README.md"
NOT_RUN = ("make test", "git clone", "cd llorch")


@dataclass
class Command:
    line: str
    output: str


def commands() -> list[Command]:
    blocks = re.findall(r"^```console\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    return [command for block in blocks for command in commands_of(block)]


def commands_of(block: str) -> list[Command]:
    """The commands of one console block."""
    found = []
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        while lines[0].endswith("\\"):
            lines[:2] = [lines[0] + "\n" + lines[1]]
        found.append(Command(lines[0], "\n".join(lines[1:])))
    return found


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def matches(printed: str, expected: str) -> bool:
    """Whether the expected text, `...` standing for anything, is what was printed; spaces at line ends don't count."""
    clean = re.sub(r"[ \t]+$", "", printed, flags=re.MULTILINE).strip()
    pattern = ".*?".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, clean, re.DOTALL) is not None


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    shared("models", "stories260K.gguf")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}


@pytest.fixture(scope="module")
def servers(environment) -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(40) is not None


def start(line: str, expected: str, environment: dict[str, str], log: Path) -> subprocess.Popen[str]:
    """Starts a server and waits until it has printed what the README shows."""
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=ROOT, env=environment, text=True, stdout=out, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + 60
    while not matches(log.read_text(), expected):
        assert process.poll() is None, f"{line} ended with {process.returncode}:\n{log.read_text()}"
        assert time.monotonic() < end, f"{line} printed:\n{log.read_text()}\nthe README says:\n{expected}"
        time.sleep(0.1)
    return process


def test_the_readme_has_commands_and_shows_output() -> None:
    lines = [command.line for command in commands()]
    assert sum("llorch" in line for line in lines) >= 5
    assert any("/execute" in line for line in lines)


def test_matching_can_fail() -> None:
    assert matches("a 12 b\n", "a ... b")
    assert not matches("a 12 c", "a ... b")
    assert not matches("a 12 b\nmore", "a ... b")


@pytest.mark.parametrize("snippet", snippets())
def test_every_python_snippet_of_the_readme_runs(environment, snippet) -> None:
    done = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "Lily" in done.stdout


def test_every_command_of_the_readme_prints_what_it_says(environment, servers, tmp_path) -> None:
    for command in commands():
        if command.line.startswith(NOT_RUN):
            continue
        if "serve" in command.line.split("#")[0].split()[:3]:
            servers.append(start(command.line, command.output, environment, tmp_path / f"serve-{len(servers)}.log"))
            continue
        done = subprocess.run(
            ["bash", "-c", command.line], cwd=ROOT, env=environment, text=True, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"$ {command.line}\n{done.stdout}"
        assert matches(done.stdout, command.output), (
            f"$ {command.line}\nprinted:\n{done.stdout}\nthe README says:\n{command.output}"
        )
