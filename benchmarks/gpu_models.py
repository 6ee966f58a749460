"""Llama models with random weights of a given shape, in seconds: every 64 rows of a matrix are the same.

What a model says does not matter for its speed, and each matrix still has memory of its own.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gpu_limits import Shape

ROWS = 64
BYTES = 256


def write(path: Path, shape: Shape, kind: str, context: int) -> Path:
    """The model as a GGUF file, written once; a file of that name is taken as it is."""
    if path.exists():
        return path
    temporary = path.with_suffix(".partial")
    w = gguf.GGUFWriter(temporary, "llama")
    _metadata(w, shape, context)
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
        for name, rows, cols in (
            ("attn_q", shape.dim, shape.dim),
            ("attn_k", shape.kv_dim, shape.dim),
            ("attn_v", shape.kv_dim, shape.dim),
            ("attn_output", shape.dim, shape.dim),
            ("ffn_gate", shape.ffn, shape.dim),
            ("ffn_up", shape.ffn, shape.dim),
            ("ffn_down", shape.dim, shape.ffn),
        ):
            matrix(f"{p}{name}.weight", rows, cols)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    temporary.replace(path)  # a run that was stopped leaves no half of a model
    return path


def _metadata(w: gguf.GGUFWriter, shape: Shape, context: int) -> None:
    w.add_name("benchmark")
    w.add_context_length(context)
    w.add_embedding_length(shape.dim)
    w.add_block_count(shape.layers)
    w.add_feed_forward_length(shape.ffn)
    w.add_head_count(shape.heads)
    w.add_head_count_kv(shape.kv_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(shape.dim // shape.heads)
    w.add_rope_freq_base(10000.0)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(BYTES))]
    w.add_tokenizer_model("llama")
    w.add_token_list([*special, *(f"w{i}" for i in range(shape.vocab - len(special)))])
    w.add_token_scores([-float(i) for i in range(shape.vocab)])
    w.add_token_types([2, 3, 3, *[6] * BYTES, *[1] * (shape.vocab - len(special))])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
