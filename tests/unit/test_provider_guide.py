"""The guide `docs/writing-a-provider.md`, first line to last: every command is run and prints what the guide says.

Every Python block is put into the provider that the guide builds: a class in it holds what is added to that class, or
replaced in it. A block that begins with `# in FILE` is a file of its own.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.snippets import commands_of, matches
from tests.support import ROOT, absent, shared
from tests.unit.test_new_provider import ONE_THREAD

GUIDE = ROOT / "docs" / "writing-a-provider.md"
MODULE = Path("llorch-provider-acme", "src", "llorch_provider_acme", "__init__.py")


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)


def merged(module: str, snippet: str) -> str:
    """A module with a block of the guide put in."""
    tree = ast.parse(module)
    for node in ast.parse(snippet).body:
        known = {item.name: item for item in tree.body if isinstance(item, ast.ClassDef)}
        if isinstance(node, ast.ClassDef) and node.name in known:
            for item in node.body:
                _put(known[node.name].body, item)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            tree.body.insert(2, node)  # behind the docstring and `from __future__`
        else:
            first_class = next(i for i, item in enumerate(tree.body) if isinstance(item, ast.ClassDef))
            tree.body.insert(first_class, node)
    return ast.unparse(tree)


def _put(body: list[ast.stmt], item: ast.stmt) -> None:
    same = [i for i, known in enumerate(body) if isinstance(item, ast.FunctionDef) and _name(known) == item.name]
    if same:
        body[same[0]] = item
    else:
        body.append(item)


def _name(node: ast.stmt) -> str | None:
    return node.name if isinstance(node, ast.FunctionDef) else None


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A virtual environment over this one's packages, into which the guide's provider can be installed."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    python = folder / "bin" / "python"
    for name, module in (("llorch", "llorch"), ("pytest", "pytest")):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {python} -m {module} "$@"\n')
        script.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS") and "LLORCH_" not in k}
    return {
        **kept, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "160", "NO_COLOR": "1",
        "TERM": "dumb", "PIP_QUIET": "3", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONDONTWRITEBYTECODE": "1",
        **ONE_THREAD,
    }  # fmt: skip


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(40) is not None


def test_the_guide_shows_python_and_output() -> None:
    languages = [language for language, _ in blocks()]
    assert languages.count("python") >= 8
    assert languages.count("console") >= 10
    assert set(languages) == {"python", "console"}, "a block of another kind is run by nobody"


def test_a_block_replaces_what_it_names_and_adds_the_rest() -> None:
    module = "'doc'\nfrom __future__ import annotations\nclass A:\n    x = 1\n    def f(self): return 1\n"
    block = "import os\nB = 2\nclass A:\n    def f(self): return B\n    def g(self): return os.sep\n"
    names: dict[str, type] = {}
    exec(merged(module, block), names)
    a = names["A"]()
    assert (a.x, a.f(), a.g()) == (1, 2, os.sep)


def test_every_snippet_of_the_guide_does_what_it_says(environment, servers, tmp_path) -> None:
    shutil.copy(shared("models", "stories260K.gguf"), tmp_path / "model.gguf")
    for language, text in blocks():
        if language == "console":
            for command in commands_of(text):
                _run(command.line, command.output, environment, servers, tmp_path)
        elif named := re.match(r"# in (\S+)\n", text):
            (tmp_path / named[1]).write_text(text)
        else:
            (tmp_path / MODULE).write_text(merged((tmp_path / MODULE).read_text(), text))


def _run(
    line: str, expected: str, environment: dict[str, str], servers: list[subprocess.Popen[str]], folder: Path
) -> None:
    if line.startswith("llorch serve"):
        servers.append(_start(line, environment, folder))
        return
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, text=True, timeout=300, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if line.startswith("pip") and ("Could not find a version" in done.stdout or "No matching" in done.stdout):
        absent("pip builds the guide's package with a backend from the package index, and reaches none")
    assert done.returncode == 0, f"$ {line}\n{done.stdout[-5000:]}"
    assert matches(done.stdout, expected), f"$ {line}\nprinted:\n{done.stdout}\nthe guide says:\n{expected}"


def _start(line: str, environment: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    """Starts a server, and waits until it answers."""
    log = folder / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=folder, env=environment, text=True, stdout=out,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    port = line.split("--port ")[1].split()[0]
    ready = [
        "curl",
        "-sf",
        "--retry",
        "60",
        "--retry-delay",
        "1",
        "--retry-all-errors",
        f"http://127.0.0.1:{port}/health",
    ]
    done = subprocess.run(ready, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, f"{line}\n{log.read_text()}"
    return process
