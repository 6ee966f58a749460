"""How an amount of memory is written, and who takes it."""

from __future__ import annotations

from pathlib import Path

import pytest

import llorch
from llorch.errors import SettingsError
from llorch.providers import MemoryLimit
from llorch.providers.conformance.models import TinyModel, write_model
from llorch.settings import ModelSettings, parse

TOTAL = 24 << 30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("20GiB", 20 << 30),
        ("20", 20 << 30),
        ("1.5 gib", 3 << 29),
        ("900MiB", 900 << 20),
        ("50%", 12 << 30),
        ("99GiB", TOTAL),
    ],
)
def test_a_limit_in_bytes(text: str, nbytes: int) -> None:
    assert MemoryLimit.parse(text).of(TOTAL) == nbytes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.9", "write 90% or 0.9GiB"),
        ("120%", "at most 100%"),
        ("0%", "above 0%"),
        ("0GiB", "above 0"),
        ("20GB", "such as 20GiB"),
        ("-1", "such as 20GiB"),
        ("", "such as 20GiB"),
        ("nan", "such as 20GiB"),
    ],
)
def test_what_is_no_limit(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MemoryLimit.parse(text)
    with pytest.raises(SettingsError, match=r"--gpu-memory: .*, not "):
        parse(ModelSettings, ["--model", "m.gguf", f"--gpu-memory={text}"], "llorch run")


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"gpu_memory": "8GiB"}, "numpy-cpu has no --gpu-memory"), ({"prefill_weights": "half"}, "no --prefill-weights")],
)
def test_a_provider_without_an_option_refuses_it(settings: dict[str, str], said: str, tmp_path: Path) -> None:
    path = write_model(TinyModel(layers=1), tmp_path / "model.gguf")
    with pytest.raises(SettingsError, match=said):
        llorch.load(path, provider="numpy-cpu", **settings)


def test_a_limit_that_is_none_in_python(tmp_path: Path) -> None:
    path = write_model(TinyModel(layers=1), tmp_path / "model.gguf")
    with pytest.raises(SettingsError, match=r"gpu_memory: .* not 'much'"):
        llorch.load(path, provider="numpy-cpu", gpu_memory="much")
