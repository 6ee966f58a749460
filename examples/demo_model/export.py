"""Writes the trained model as a GGUF file: matrices in Q8_0, with chat template, licence and model card."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import sentencepiece
from corpus import CHAT_TEMPLATE, END
from model import Llama
from sentencepiece import sentencepiece_model_pb2

DESCRIPTION = (
    "A demonstration model of llorch: short children's stories, small talk, simple sums. Its whole corpus was written by the "
    "grammar in examples/demo_model. It knows nothing else and must not be relied on for anything."
)


def write_gguf(path: Path, model: Llama, vocabulary: Path, held_out_loss: float, tokens: int) -> None:
    """`held_out_loss` in nats a token; `tokens` is how many it was trained on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, held_out_loss, tokens)
    _sizes(writer, model)
    _vocabulary(writer, vocabulary)
    for name, parameter in model.named_parameters():
        data = parameter.detach().numpy().astype(np.float32)
        if data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, held_out_loss: float, tokens: int) -> None:
    writer.add_name("llorch-demo")
    writer.add_description(DESCRIPTION)
    writer.add_license("MIT")
    writer.add_author("The llorch project")
    writer.add_languages(["en"])
    writer.add_tags(["text-generation", "demonstration"])
    writer.add_string("llorch.demo.training", f"{tokens} tokens; {held_out_loss:.4f} nats a token on fresh text")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _sizes(writer: gguf.GGUFWriter, model: Llama) -> None:
    shape = model.shape
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_vocab_size(shape.vocab)


def _vocabulary(writer: gguf.GGUFWriter, path: Path) -> None:
    pieces = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes()).pieces
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(path))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece for piece in pieces])
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_types([piece.type for piece in pieces])  # the numbers are SentencePiece's own
    writer.add_bos_token_id(vocabulary.bos_id())
    writer.add_eos_token_id(vocabulary.eos_id())
    writer.add_unk_token_id(vocabulary.unk_id())
    writer.add_eot_token_id(vocabulary.piece_to_id(END))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)
