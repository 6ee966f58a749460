"""Where tests find real data: the folder `shared` beside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("LLORCH_SHARED", ROOT.parent / "shared"))


def absent(reason: str) -> NoReturn:
    """Skips with the reason; in CI a proof that is skipped is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (a skip is a failure in CI)")
    pytest.skip(reason)


def shared(*parts: str) -> Path:
    """The path of a file under `../shared`; skips the test where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        absent(f"{Path(*parts)} is not in the folder `shared` beside the repository")
    return path


def synthetic(folder: Path, preset: str, quant: str, seed: int = 0) -> Path:
    """A Llama-architecture GGUF with random weights, written once per folder."""
    path = folder / f"{preset}-{quant}-{seed}.gguf"
    if not path.exists():
        script = shared("lab", "make_synthetic.py")
        command = [sys.executable, str(script), str(path), "--preset", preset, "--quant", quant, "--seed", str(seed)]
        subprocess.run(command, check=True, timeout=300)
    return path
