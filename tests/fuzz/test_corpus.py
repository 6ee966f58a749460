"""The fuzzer's corpus holds, without the fuzzer; and what it would miss, it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from llorch.core.config import ModelConfig
from tests.fuzz import target
from tests.fuzz.mutate import mutated
from tests.fuzz.seeds import CORPUS, files, small

INPUTS = sorted(CORPUS.iterdir())


def test_every_input_of_the_corpus_ends_in_errors_of_ours_or_none(tmp_path: Path) -> None:
    errors = {path.name: target.check(path.read_bytes(), tmp_path / "input.gguf") for path in INPUTS}
    assert len(INPUTS) >= 100
    assert any(not found for found in errors.values())  # some load
    assert len({found[0].split(":")[1] for found in errors.values() if found}) >= 20  # and fail in many ways


def test_changed_files_end_so_too(tmp_path: Path) -> None:
    whole = list(files())
    for seed in range(500):
        target.check(mutated(whole[seed % len(whole)], seed), tmp_path / "input.gguf")


def test_the_smallest_file_loads(tmp_path: Path) -> None:
    assert target.check(small().bytes(), tmp_path / "input.gguf") == []


def test_an_error_that_is_not_ours_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_file: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(ModelConfig, "from_gguf", broken)
    with pytest.raises(KeyError):
        target.check(small().bytes(), tmp_path / "input.gguf")


@pytest.mark.parametrize(("limit", "value"), [("SECONDS", 0.0), ("BYTES", -1), ("LETTERS", 10)])
def test_a_run_over_a_limit_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    monkeypatch.setattr(target, limit, value)
    with pytest.raises(target.Finding):
        target.check(b"no model", tmp_path / "input.gguf")
