"""A Llama-architecture GGUF that says what it is told: each token has one most likely successor.

Attention and feed-forward weights are zero, so the residual stream is the embedding of the current token, one-hot; row
t of the output matrix points at the tokens that t follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np

BOS, EOS = "<s>", "</s>"
SPACE = "\u2581"
_SPECIAL = ["<unk>", BOS, EOS]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def utf8(character: str) -> list[str]:
    """The byte tokens of a character."""
    return [f"<0x{byte:02X}>" for byte in character.encode()]


def write_model(path: Path, script: Sequence[str], *, context: int = 512) -> Path:
    """A model that follows `script`, from its first token on; an earlier token as the last makes it a loop.

    Every token but that last one must be different. Any prompt that ends with the first token starts it.
    """
    texts = sorted({token for token in script if token not in _SPECIAL + _BYTES} | {SPACE})
    tokens = _SPECIAL + _BYTES + texts
    dim = -(-len(tokens) // 16) * 16
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    writer.add_context_length(context)
    writer.add_embedding_length(dim)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(dim // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_vocabulary(writer, tokens, texts)
    _add_tensors(writer, tokens, script, dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, tokens: list[str], texts: list[str]) -> None:
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * (len(tokens) - len(texts)) + [-float(i) for i in range(len(texts))])
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256 + [kinds.NORMAL] * len(texts)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_tensors(writer: gguf.GGUFWriter, tokens: list[str], script: Sequence[str], dim: int) -> None:
    ids = {token: i for i, token in enumerate(tokens)}
    embedding = np.zeros((len(tokens), dim), np.float32)
    embedding[np.arange(len(tokens)), np.arange(len(tokens))] = 1
    output = np.zeros_like(embedding)
    for token, successor in pairwise(script):
        output[ids[successor], ids[token]] = 1
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", output)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(dim, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((dim, dim), np.float32))
    for name in ("ffn_gate", "ffn_up"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((32, dim), np.float32))
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((dim, 32), np.float32))
