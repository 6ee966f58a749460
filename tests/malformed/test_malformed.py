"""Every malformed file ends within a second and 64 MiB in a typed error: what is wrong, where, and both numbers."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llorch
from llorch.cli import main
from tests.malformed.layout import byte_level, tiny
from tests.malformed.run import all_cases
from tests.support import ROOT

CASES = {case.name: case for case in all_cases()}
SECONDS, BYTES = 1.0, 64 << 20
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found() -> Iterator[Found]:
    """What became of each case, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # not pytest's own folder: the cases are opened as nobody
        yield _run(Path(name))


def _run(folder: Path) -> Found:
    command = [sys.executable, "-m", "tests.malformed.run", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return {line["name"]: {**line, "folder": folder} for line in map(json.loads, done.stdout.splitlines())}


def test_there_are_200_distinct_files() -> None:
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names)), "two cases of one name"
    contents = {hashlib.sha256(case.content).digest() for case in CASES.values() if case.write is None}
    assert len(contents) == sum(case.write is None for case in CASES.values()), "two cases of one content"
    assert len(contents) >= 200


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_file_ends_in_an_error_that_says_all(found: Found, name: str) -> None:
    case, result = CASES[name], found[name]
    message = result["message"]
    assert result["error"] == case.error, message
    assert str(result["folder"]) in message, message  # the file
    for said in case.says:
        assert said in message, message
    if case.at is not None:
        assert re.search(rf"\boffset {case.at}\b", message), f"offset {case.at}: {message}"
    assert len(message) < (1400 if "known are" in message else 700), message  # 88 names of pre-tokenizers
    assert message.isprintable(), message


def test_each_takes_under_a_second_and_64_mib(found: Found) -> None:
    assert found.keys() == CASES.keys()
    slow = {name: result["seconds"] for name, result in found.items() if result["seconds"] > SECONDS}
    large = {name: result["memory"] >> 20 for name, result in found.items() if result["memory"] > BYTES}
    assert not slow
    assert not large


def test_the_file_that_the_cases_are_made_of_loads(tmp_path: Path) -> None:
    path = tmp_path / "valid.gguf"
    path.write_bytes(tiny().bytes())
    with llorch.load(path, provider="numpy-cpu", parallel=1) as llm:
        assert len(llm.generate_ids([1, 70], max_tokens=8)) == 8
    assert llorch.Tokenizer.from_gguf(path).decode([104, 108]) == "ei"


@pytest.mark.parametrize("name", [*list(CASES)[::12], "an empty file", "a directory"])
def test_inspect_says_the_same(found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """On standard error where the file cannot be read, in its report where it can and no model is in it."""
    path = tmp_path / "case.gguf"
    CASES[name].put(path)
    status = main(["inspect", str(path)])
    output = capsys.readouterr()
    said = output.err if status else output.out
    assert status in (0, 1)
    assert str(path) in said
    assert "Traceback" not in output.err + output.out


def test_a_message_about_something_else_fails(found: Found) -> None:
    """The assertion itself can fail."""
    other = {**found, "version 0": found["version 1"]}
    with pytest.raises(AssertionError):
        test_a_malformed_file_ends_in_an_error_that_says_all(other, "version 0")


def test_the_byte_level_vocabulary_that_cases_are_made_of_loads(tmp_path: Path) -> None:
    file = tiny()
    fields = {k: v for k, v in file.fields.items() if not str(k).startswith("tokenizer.")}
    path = tmp_path / "bpe.gguf"
    path.write_bytes(file.but(fields={**fields, **byte_level()}).bytes())
    tokenizer = llorch.Tokenizer.from_gguf(path)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
