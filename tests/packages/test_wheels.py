"""What a user gets: wheels in a fresh environment, nothing editable, the demo model served from them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import httpx
import pytest

from tests.snippets import Reader
from tests.support import ROOT, absent
from tests.test_gpu_page import FROM_WHEELS, MAKE_WHEELS, put_emulator

PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
START_SECONDS = 120.0  # numba-cpu compiles its kernels at its first start


def pip(python: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make dist` fills, elsewhere."""
    folder = tmp_path_factory.mktemp("dist")
    reached = pip(sys.executable, "download", "--no-deps", "--dest", str(tmp_path_factory.mktemp("index")), "hatchling")
    if reached.returncode:
        absent(f"no package index can be reached: {reached.stderr.strip().splitlines()[-1]}")
    built = pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(folder), ".", *map(str, PLUGINS))
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def environment(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment into which `llorch[cpu]` was installed from that folder."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=True)
    pins = ("-c", str(ROOT / "constraints.txt"), "--find-links", str(wheels))
    installed = pip(folder / "bin" / "python", "install", "--no-compile", *pins, "llorch[cpu]")
    assert installed.returncode == 0, installed.stderr
    return folder / "bin"


def test_there_is_a_wheel_of_llorch_and_of_every_plugin(wheels: Path) -> None:
    names = {path.name.split("-")[0] for path in wheels.glob("*.whl")}
    assert names == {"llorch", *(plugin.name.replace("-", "_") for plugin in PLUGINS)}


def test_nothing_is_installed_from_the_source_tree(environment: Path, tmp_path: Path) -> None:
    program = "import llorch, llorch_provider_numba as p; print(llorch.__file__); print(p.__file__)"
    command = [environment / "python", "-c", program]
    paths = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert [Path(path).is_relative_to(environment.parent) for path in paths] == [True, True]


def test_a_fresh_environment_serves_the_demo_model(environment: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [environment / "llorch", "serve", "--provider", "numba-cpu", "--port", "0", "--log-format", "json"]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=_clean(tmp_path), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    try:
        ready = _ready(process, log)
        body = {"messages": [{"role": "user", "content": "Tell me a story about a fox named Pip"}], "max_tokens": 40}
        answer = httpx.post(f"{ready['uri']}/v1/chat/completions", json=body, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
        assert re.match(r"[A-Z]\w* ", answer.json()["choices"][0]["message"]["content"])
        assert "no --model was given" in log.read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()


def test_a_folder_of_wheels_is_all_that_a_machine_without_a_network_needs(wheels: Path, tmp_path: Path) -> None:
    """The page docs/gpu-status.md, its second block here and its third in an environment that has nothing but pip."""
    reader, carried = Reader(ROOT, tmp_path), str(tmp_path / "wheels")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    reader.script(MAKE_WHEELS, {"WHEELS": carried, "PYTHON_VERSION": python, "DIST": str(tmp_path / "dist")})
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=True)
    put_emulator(tmp_path)
    reader.environment["PATH"] = f"{bare / 'bin'}{os.pathsep}{os.environ['PATH']}"
    reader.environment |= {"PIP_NO_INDEX": "1", "PROVIDER": "cuda-emulated", "PARTS": "install providers topk"}
    folders = {"WHEELS": carried, "SITE": str(tmp_path / "site"), "RESULTS": str(tmp_path / "results")}
    status, said = reader.script_status(FROM_WHEELS, {**folders, "SIZES": "--help"})
    assert status == 0, said
    assert [line.split()[1] for line in said.splitlines() if line.startswith("ok ")] == ["install", "providers", "topk"]
    assert "usage: gpu.py" in said


def _clean(folder: Path) -> dict[str, str]:
    """The process's environment without settings of llorch and Python, and with nothing compiled yet."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LLORCH_", "PYTHON"))}
    return {**inherited, "XDG_CACHE_HOME": str(folder / "cache")}


def _ready(process: subprocess.Popen[bytes], log: Path) -> dict[str, str]:
    """The log line that says where the server is."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        for line in log.read_text().splitlines():
            if '"event": "ready"' in line and line.endswith("}"):
                return dict(json.loads(line))
        time.sleep(0.1)
    raise AssertionError(f"not ready after {START_SECONDS} s:\n{log.read_text()}")
