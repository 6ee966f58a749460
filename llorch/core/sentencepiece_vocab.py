"""SentencePiece vocabularies (`tokenizer.ggml.model` "llama"): a ModelProto built in memory from GGUF metadata.

llama.cpp merges neighbours by score, highest first: SentencePiece's BPE algorithm, run by its own library here. The one
difference is on purpose: llama.cpp may also merge ordinary text into a control or byte token, this never does.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llorch.core.gguf import GGUFFile
from llorch.core.vocabulary import BYTE_TEXT, RECONVERT, Defaults, TokenType, Vocabulary, byte_of, token_array
from llorch.errors import TokenizerError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for the space in token texts
_DEFAULTS = Defaults(bos_id=1, eos_id=2, unk_id=0, add_bos=True)
_pb: Any = sentencepiece_model_pb2  # protobuf makes its names at import
_Piece = _pb.ModelProto.SentencePiece


class SentencePieceModel:
    """Ordinary text to ids, and the bytes of each token. Special tokens are the Tokenizer's."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    pre = None

    def __init__(self, file: GGUFFile) -> None:
        """Raises TokenizerError for a vocabulary that cannot be used, GGUFError for a field of a wrong type."""
        self.vocabulary = Vocabulary.from_gguf(file, _DEFAULTS)
        self.space_prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
        byte_tokens = _byte_tokens(self.vocabulary)
        self._token_bytes = _token_bytes(self.vocabulary, byte_tokens)
        self._all_bytes = len(byte_tokens) == 256
        proto = _model_proto(self.vocabulary, _scores(file, len(self.vocabulary.texts)), byte_tokens)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        except RuntimeError as error:
            raise TokenizerError(
                f"{file.path}: tokenizer.ggml.tokens is no SentencePiece vocabulary: {error}"
            ) from error

    def encode(self, text: str, after_special: bool) -> list[int]:
        """Ids of a text without special tokens; at the start and after a special token llama.cpp puts a space first."""
        ids: list[int] = self._processor.EncodeAsIds(" " + text if self.space_prefix and after_special else text)
        if self._all_bytes:
            return ids
        # The pieces that _model_proto has added stand for what this vocabulary cannot spell.
        size, unk_id = len(self._token_bytes), self.vocabulary.unk_id
        assert unk_id is not None  # 0 by default
        return [i if i < size else unk_id for i in ids]

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text: nothing for control tokens."""
        return self._token_bytes[token]


def _scores(file: GGUFFile, size: int) -> list[float]:
    values = token_array(file, "scores", size)
    if values is None:
        raise TokenizerError(
            f"{file.path}: tokenizer.ggml.scores is missing, a SentencePiece vocabulary of {size} tokens needs {size}; "
            f"{RECONVERT}"
        )
    if not np.issubdtype(values.dtype, np.floating):
        raise TokenizerError(
            f"{file.begin('tokenizer.ggml.scores')} holds {values.dtype}, expected float32; {RECONVERT}"
        )
    if (wrong := np.isnan(values)).any():
        index = int(wrong.argmax())
        raise TokenizerError(f"{file.begin('tokenizer.ggml.scores')}[{index}] is NaN, expected a number; {RECONVERT}")
    scores: list[float] = values.tolist()
    return scores


def _byte_tokens(vocabulary: Vocabulary) -> dict[int, int]:
    """Token id by byte. Files without token types, or with all of them normal, name their bytes by text alone."""
    tokens = {byte_of(vocabulary, i): i for i, kind in enumerate(vocabulary.types) if kind == TokenType.BYTE}
    if not tokens:
        for i, text in enumerate(vocabulary.texts):
            if vocabulary.types[i] == TokenType.NORMAL and (match := BYTE_TEXT.fullmatch(text)):
                tokens[int(match[1], 16)] = i
    return tokens


def _token_bytes(vocabulary: Vocabulary, byte_tokens: dict[int, int]) -> list[bytes]:
    """What each token adds to a text. As in llama.cpp, user-defined tokens keep U+2581, and unused ones add nothing."""
    values = dict.fromkeys(range(len(vocabulary.texts)), b"")
    for i, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True)):
        if kind == TokenType.NORMAL:
            values[i] = text.replace(SPACE, " ").encode()
        elif kind == TokenType.USER_DEFINED:
            values[i] = text.encode()
        elif kind == TokenType.BYTE:
            values[i] = bytes([int(text[3:5], 16)])
    values |= {i: bytes([byte]) for byte, i in byte_tokens.items()}
    return list(values.values())


def _model_proto(vocabulary: Vocabulary, scores: list[float], byte_tokens: dict[int, int]) -> Any:
    """A ModelProto whose first pieces are the tokens, so that piece ids are token ids.

    Behind them come the pieces that the library insists on and the vocabulary may lack: an unknown one, missing bytes.
    What text must not become, or the library refuses (a text that is empty, repeated or has a NUL), is a control piece
    whose text starts with a space, which no text has once its spaces are U+2581.
    """
    proto = _pb.ModelProto()
    proto.trainer_spec.model_type = _pb.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = bool(byte_tokens)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False  # `encode` adds it: also after special tokens
    proto.normalizer_spec.remove_extra_whitespaces = False
    mergeable = _mergeable(vocabulary, byte_tokens)
    bytes_by_id = {i: byte for byte, i in byte_tokens.items()}
    for i, (text, score) in enumerate(zip(vocabulary.texts, scores, strict=True)):
        if i in bytes_by_id:
            proto.pieces.add(piece=f"<0x{bytes_by_id[i]:02X}>", type=_Piece.BYTE)
        elif i in mergeable:
            proto.pieces.add(piece=text, score=score)
        else:
            proto.pieces.add(piece=f" {i}", type=_Piece.CONTROL)
    proto.pieces.add(piece=" unknown", type=_Piece.UNKNOWN)
    for byte in range(256) if byte_tokens else ():
        if byte not in byte_tokens:
            proto.pieces.add(piece=f"<0x{byte:02X}>", type=_Piece.BYTE)
    return proto


def _mergeable(vocabulary: Vocabulary, byte_tokens: dict[int, int]) -> set[int]:
    """Ids of tokens that merging may arrive at. Of tokens with the same text the last one counts, as in llama.cpp."""
    kinds = {TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED}
    by_text = {t: i for i, (t, k) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True)) if k in kinds}
    bytes_ = {f"<0x{byte:02X}>" for byte in byte_tokens}
    return {i for text, i in by_text.items() if text and "\0" not in text and text not in bytes_}
