"""Models to chat with: one that never ends, at a pace, and the demo model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import llorch
from llorch import LLM
from tests.gguf_copy import rewrite
from tests.server.scripted import SPACE, write_model

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(autouse=True)
def _no_settings_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "FORCE_COLOR", *(n for n in os.environ if n.upper().startswith("LLORCH_"))):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers `na no na no ...` until its context of 512 is full."""
    folder = tmp_path_factory.mktemp("endless")
    plain = write_model(folder / "plain.gguf", [">", f"{SPACE}na", f"{SPACE}no", f"{SPACE}na"])
    return rewrite(plain, folder / "endless.gguf", fields={"tokenizer.chat_template": TEMPLATE})


@pytest.fixture(scope="session")
def endless_llm(endless: Path) -> Iterator[LLM]:
    with llorch.load(endless, provider="numpy-cpu", parallel=1) as llm:
        yield llm
