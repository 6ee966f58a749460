"""Copies of a GGUF file: the same weights dequantised to float32, or other metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType


def rewrite(source: Path, target: Path, *, dequantise: bool = False, metadata: Mapping[str, Any] | None = None) -> Path:
    """Writes `source` to `target`, every tensor as float32 where `dequantise`, and with these values in the metadata.

    Raises KeyError for a metadata key that the source has not.
    """
    reader = gguf.GGUFReader(source)
    replaced = metadata or {}
    if unknown := replaced.keys() - reader.fields.keys():
        raise KeyError(f"{source} has no metadata {sorted(unknown)}")
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":  # the header, and what the writer has written
            continue
        sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, replaced.get(key, field.contents()), field.types[0], sub_type)
    for tensor in reader.tensors:
        if dequantise:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
