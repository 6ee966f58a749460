"""Small vocabulary files for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
Token = tuple[str, float, int]

BYTES: list[Token] = [(f"<0x{i:02X}>", 0.0, BYTE) for i in range(256)]
BASE: list[Token] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), *BYTES]
LETTERS: list[Token] = [(letter, -100.0, NORMAL) for letter in "▁abcd"]


def write_sentencepiece(path: Path, tokens: Sequence[Token], /, *, tensors: bool = False, **fields: Any) -> Path:
    """A SentencePiece vocabulary; see `write`."""
    texts, scores, types = zip(*tokens, strict=True)
    known = {"model": "llama", "tokens": texts, "scores": scores, "token_type": types, **fields}
    return write(path, known, tensors=tensors)


def write_bpe(
    path: Path,
    tokens: Sequence[str | tuple[str, int]],
    merges: Sequence[str],
    /,
    *,
    tensors: bool = False,
    **fields: Any,
) -> Path:
    """A byte-level BPE vocabulary, `tokens` with their types or normal ones; see `write`."""
    typed = [(token, NORMAL) if isinstance(token, str) else token for token in tokens]
    texts, types = zip(*typed, strict=True)
    known = {"model": "gpt2", "pre": "gpt-2", "tokens": texts, "token_type": types, "merges": merges, **fields}
    return write(path, known, tensors=tensors)


def write(path: Path, fields: Mapping[str, Any], *, tensors: bool) -> Path:
    """A file with these fields of `tokenizer.ggml`; with tensors, a model that llama.cpp loads, too.

    A field that is None is left out. `general_name` is the model's name.
    """
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        if key == "general_name":
            writer.add_name(value)
            continue
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            (writer.add_uint32 if value >= 0 else writer.add_int32)(name, value)
        elif value is not None:
            writer.add_array(name, list(value))
    if tensors:
        add_tensors(writer, len(fields["tokens"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensors(writer: gguf.GGUFWriter, size: int, dim: int = 32) -> None:
    writer.add_context_length(64)
    writer.add_embedding_length(dim)
    writer.add_block_count(1)
    writer.add_feed_forward_length(dim)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(dim)
    shapes = {"token_embd": (size, dim), "output": (size, dim), "output_norm": (dim,)}
    shapes |= {f"blk.0.{name}": (dim,) for name in ("attn_norm", "ffn_norm")}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": (dim, dim) for name in matrices}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))


# ---- byte-level BPE ----

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def train_bpe(texts: Sequence[str], size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level vocabulary whose merges cross every boundary that the texts have.

    So whatever a pre-tokenizer cuts shows in the ids.
    """
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=1, show_progress=False, initial_alphabet=ALPHABET)
    library.train_from_iterator(texts, trainer)
    model = json.loads(library.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [" ".join(pair) for pair in model["merges"]]
