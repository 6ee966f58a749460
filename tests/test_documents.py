"""Every block of the README and of the documentation is run, and what it prints is what the document says it prints.

Two pages have tests of their own: `docs/writing-a-provider.md`, whose blocks build one package
(tests/unit/test_provider_guide.py), and `docs/gpu-status.md`, whose blocks want a card (tests/test_gpu_page.py).
"""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from docs import settings_table
from llorch.core.requests import Ended, Started, StopReason, Token
from llorch.errors import CancelledError
from llorch.http import sse
from llorch.http.settings import ServeSettings
from llorch.setting_sources import known_keys
from llorch.settings import command_parser
from tests.snippets import Reader, blocks_of, commands_of, matches, not_run
from tests.support import ROOT

README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "writing-a-provider.md"
GPU_PAGE = ROOT / "docs" / "gpu-status.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path != GUIDE]
# the command that runs these tests, and what only a machine without llorch needs
NOT_RUN = ("make test", "git clone", "cd ", "pip install", "source ", "docker ")
CONTRACT = ROOT / "docs" / "worker-contract.md"
RUN = {"console", "python", "toml", "sh"}
# what a page's script is run with in place of its defaults
SMALL = {BENCHMARKS: {"SHAPES": "tiny", "TYPES": "Q4_0", "ROUNDS": "1", "PEER": "--without-llamacpp"}}


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """In a folder of its own."""
    found = Reader(tmp_path, tmp_path)
    yield found
    found.close()


@pytest.fixture
def cloner(tmp_path: Path) -> Iterator[Reader]:
    """In a clone of the repository."""
    found = Reader(ROOT, tmp_path)
    yield found
    found.close()


def work_through(document: Path, reader: Reader) -> None:
    """Runs the blocks in their order."""
    blocks = blocks_of(document)
    for (language, text), following in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language == "console":
            for command in commands_of(text):
                if not command.line.startswith(NOT_RUN):
                    reader.run(command)
        elif language == "python" and text.startswith("# in "):
            (reader.scratch / text.splitlines()[0].removeprefix("# in ")).write_text(text)
        elif language == "python":
            reader.python(text, following[1] if following[0] == "text" else None)
        elif language == "toml":
            check_toml(text, reader)
        elif language == "sh":
            reader.script(text, SMALL[document] | {name: str(reader.scratch) for name in ("RESULTS", "PICTURES")})


def check_toml(text: str, reader: Reader) -> None:
    """Keys of llorch.toml are settings; entry points are installed beside the document's modules."""
    values = tomllib.loads(text)
    if "project" not in values:
        assert values.keys() <= known_keys()
        return
    project = values["project"]
    assert {"name", "version"} <= project.keys(), "a project that pip does not install"
    [(group, points)] = project["entry-points"].items()
    name, version = project["name"], project["version"]
    metadata = reader.scratch / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


def test_matching_can_fail() -> None:
    assert matches("a 12 b\n", "a ... b")
    assert not matches("a 12 c", "a ... b")
    assert not matches("a 12 b\nmore", "a ... b")


def test_what_a_document_says_and_a_command_does_not_print_is_found(reader: Reader, tmp_path: Path) -> None:
    document = tmp_path / "wrong.md"
    document.write_text("```console\n$ llorch --version\nllorch 99\n```\n")
    with pytest.raises(AssertionError, match="the document says"):
        work_through(document, reader)
    document.write_text('```python\nprint("a")\n```\n\n```text\nb\n```\n')
    with pytest.raises(AssertionError, match="the document says"):
        work_through(document, reader)


def test_a_script_that_fails_half_way_is_found(reader: Reader) -> None:
    reader.script("true ${SIZE:-8}", {"SIZE": "1"})
    with pytest.raises(AssertionError, match="false"):
        reader.script("false ${SIZE:-8}\ntrue", {"SIZE": "1"})
    with pytest.raises(AssertionError, match="SIZE has no default"):
        reader.script("true", {"SIZE": "1"})


@pytest.mark.parametrize("document", [README, *PAGES], ids=lambda path: path.name)
def test_no_block_is_of_a_kind_that_nobody_runs(document: Path) -> None:
    languages = [language for language, _ in blocks_of(document)]
    shown = [before for before, language in zip(["", *languages], languages, strict=False) if language == "text"]
    assert set(languages) <= {*RUN, "text"}
    assert set(shown) <= {"python"} or document == CONTRACT, "text that no Python block before it prints"
    fences = 2 * (len(blocks_of(document)) + len(not_run(document)))
    assert fences == document.read_text().count("```"), "a fence that is not a block of its own"


def test_the_readme_does_what_it_says(cloner: Reader) -> None:
    lines = [c.line for language, text in blocks_of(README) if language == "console" for c in commands_of(text)]
    assert sum("llorch" in line for line in lines) >= 5
    work_through(README, cloner)


@pytest.mark.parametrize("page", [p for p in PAGES if p != GPU_PAGE and blocks_of(p)], ids=lambda path: path.name)
def test_a_page_of_the_documentation_does_what_it_says(request: pytest.FixtureRequest, page: Path) -> None:
    work_through(page, request.getfixturevalue("cloner" if page in SMALL else "reader"))


def test_the_benchmarks_stand_beside_llama_cpp(cloner: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    if (peer := os.environ.get("LLAMACPP_PYTHON")) is None:
        pytest.skip("LLAMACPP_PYTHON names no interpreter that has llama-cpp-python, which takes minutes to compile")
    monkeypatch.setitem(SMALL[BENCHMARKS], "PEER", f"--llamacpp-python {peer}")
    work_through(BENCHMARKS, cloner)
    result = json.loads((cloner.scratch / "tiny-Q4_0.json").read_text())
    assert {row["engine"] for row in result["rows"]} == {"llama.cpp", "numba-cpu"}


UNRUN = [(page, *block) for page in [README, *PAGES] for block in not_run(page)]


@pytest.mark.parametrize(("page", "reason", "language", "text"), UNRUN, ids=lambda value: getattr(value, "name", ""))
def test_a_block_that_is_not_run_could_be(page: Path, reason: str, language: str, text: str) -> None:
    if language == "yaml":
        check_pod(text)
    elif language == "ini":
        check_unit(text)
    else:
        subprocess.run(["sh", "-n", "-c", text], check=True)
    pytest.skip(f"{page.name}: {reason}")


def check_pod(text: str) -> None:
    pod = yaml.safe_load(text)["spec"]
    (container,) = pod["containers"]
    assert container["args"][:2] == ["llorch", "serve"]
    given = command_parser("serve").parse_args(container["args"][2:])
    assert float(given.shutdown_timeout) < pod["terminationGracePeriodSeconds"]
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert probes == [{"path": "/health", "port": ServeSettings.model_fields["port"].default}] * 3
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]


def check_unit(text: str) -> None:
    unit = configparser.RawConfigParser()
    unit.read_string(text)
    program, command, *options = unit["Service"]["ExecStart"].split()
    assert (Path(program).name, command) == ("llorch", "serve")
    command_parser("serve").parse_args(options)
    assert float(unit["Service"]["TimeoutStopSec"]) > ServeSettings.model_fields["shutdown_timeout"].default


def test_extras_and_make_targets_that_a_document_or_an_error_names_exist() -> None:
    projects = [
        tomllib.loads(path.read_text())["project"]
        for path in files("pyproject.toml", "plugins/*/pyproject.toml", "examples/*/pyproject.toml")
    ]
    extras = {project["name"]: project.get("optional-dependencies", {}).keys() for project in projects}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    documents = files("*.md", "docs/*.md", "plugins/*/*.md", "examples/*/*.md")
    sources = files("llorch/**/*.py", "plugins/*/src/**/*.py", "benchmarks/*.py")
    named = [
        found for path in documents + sources for found in re.findall(r"(llorch[\w-]*)\[(\w+)\]", path.read_text())
    ]
    made = [found for path in documents for found in re.findall(r"(?:`|^\$ |^)make ([a-z-]+)", path.read_text(), re.M)]
    assert len(named) > 10
    assert len(made) > 10
    assert [f"{name}[{extra}]" for name, extra in named if extra not in extras[name]] == []
    assert set(made) <= targets


def files(*patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def test_the_contract_lists_the_events_of_the_code() -> None:
    ended = Ended(StopReason.STOP_SEQUENCE, 1, 1.0, stop_sequence="x")
    events = [sse.started("1", "m", Started(0.0, 1)), sse.token(Token("a", 0)), sse.metrics(1.0, 1), sse.end(ended)]
    events.append(sse.error(CancelledError("it was")))
    [(_, text)] = [block for block in blocks_of(CONTRACT) if block[0] == "text"]
    assert len(text.splitlines()) == len(events)
    for line, event in zip(text.splitlines(), events, strict=True):
        content = json.loads(event.decode().partition("data: ")[2])
        assert re.findall(r'[{,]"(\w+)"', line) == list(content)
        assert f'"type":"{content["type"]}"' in line
    reasons = "|".join(f'"{reason}"' for reason in StopReason)
    assert f'"stop_reason":{reasons}' in text


def test_the_table_of_settings_is_that_of_the_code() -> None:
    page = settings_table.PAGE.read_text()
    assert page == settings_table.written(page), "run python docs/settings_table.py"
    assert page != settings_table.written(page.replace("`8080`", "`8081`"))[:-1]
