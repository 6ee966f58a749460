"""Llama models with random weights of a given shape, in seconds: every 64 rows of a matrix are the same.

What a model says does not matter for its speed, and each matrix still has memory of its own.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import gguf
import numpy as np
from gpu_limits import Shape

from llorch.providers.conformance.models import TinyModel, layer_matrices, write_metadata

ROWS = 64


def write(path: Path, shape: Shape, kind: str, context: int) -> Path:
    """The model as a GGUF file, written once; a file of that name is taken as it is."""
    if path.exists():
        return path
    temporary = path.with_suffix(".partial")
    w = gguf.GGUFWriter(temporary, "llama")
    model = TinyModel(type=kind, context=context, **asdict(shape))
    write_metadata(w, model, "benchmark")
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, cols: int) -> None:
        some = rng.standard_normal((min(rows, ROWS), cols), dtype=np.float32) * np.float32(cols**-0.5)
        quantised = gguf.GGMLQuantizationType[kind]
        blocks = some.astype(np.float16) if kind == "F16" else gguf.quants.quantize(some, quantised)
        repeated = np.resize(blocks, (rows, blocks.shape[1]))
        w.add_tensor(name, repeated, raw_dtype=None if kind == "F16" else quantised)

    def vector(name: str) -> None:
        w.add_tensor(name, np.ones(shape.dim, np.float32))

    matrix("token_embd.weight", shape.vocab, shape.dim)
    matrix("output.weight", shape.vocab, shape.dim)
    vector("output_norm.weight")
    for layer in range(shape.layers):
        p = f"blk.{layer}."
        vector(f"{p}attn_norm.weight")
        vector(f"{p}ffn_norm.weight")
        for name, (rows, cols) in layer_matrices(model).items():
            matrix(f"{p}{name}.weight", rows, cols)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    temporary.replace(path)  # a run that was stopped leaves no half of a model
    return path
