"""Where tests find real data: the folder `shared` beside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import gguf
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


def with_metadata(source: Path, target: Path, **metadata: object) -> Path:
    """A copy of a GGUF file with further metadata: strings, booleans or lists of strings; `__` in a name is a dot."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    added = {name.replace("__", "."): value for name, value in metadata.items()}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", *added):
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for key, value in added.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
