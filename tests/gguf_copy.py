"""Copies of a GGUF file with something changed: metadata, tensors, or the same weights as float32."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

_TYPES = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
    list: GGUFValueType.ARRAY,
}


def rewrite(
    source: Path,
    target: Path,
    *,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    drop: Container[str] = (),
    dequantise: bool = False,
) -> Path:
    """Writes `source` to `target` with these metadata fields set (None: left out), these arrays as tensors, replaced or
    added, without those dropped, and every other one as float32 where `dequantise`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    changed, arrays = fields or {}, tensors or {}
    copy_fields(reader, writer, without=changed)
    for key, value in changed.items():
        if value is not None:
            writer.add_key_value(key, value, _TYPES[type(value)])
    for name, array in arrays.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    for tensor in reader.tensors:
        if tensor.name in arrays or tensor.name in drop:
            continue
        if dequantise:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    return finish(writer, target)


def copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, without: Container[str] = ()) -> None:
    """All metadata but these keys; the header and the architecture are the writer's own."""
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in without:
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
