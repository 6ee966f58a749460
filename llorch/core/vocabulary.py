"""What every kind of vocabulary in a GGUF file has: texts, types, special tokens. Checked once, at load."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from llorch.core.gguf import GGUFFile
from llorch.errors import TokenizerError


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`; SentencePiece's own numbering."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Texts that end generation whatever the metadata says, as in llama.cpp (src/llama-vocab.cpp): many files name only one
# of eos and eot. The last two lines are what code models emit to pad or to begin another file.
# fmt: off
END_OF_GENERATION = frozenset({
    "</s>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "<end_of_utterance>", "<turn|>", "<|return|>", "<|call|>",
    "<|calls|>", "<|flush|>", "<|tool_response>", "[e~[", "<｜end▁of▁sentence｜>",
    "<|fim_pad|>", "<fim-pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<fim-repo>", "<|repo_name|>", "<REPO>", "<reponame>", "<|file_sep|>",
})
# fmt: on
# ... but not where these others are in the vocabulary: there the first only closes one message of several.
_NOT_ENDING_BESIDE = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|calls|>", "<|flush|>"}),
    ("</s>", {"<|tool_response>"}),
)
RECONVERT = "convert the model again with a current converter"


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What llama.cpp assumes of a kind of vocabulary where the metadata is silent."""

    bos_id: int
    eos_id: int
    unk_id: int | None
    add_bos: bool


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Token texts and types by id, the ids with a role, and whether encoding adds BOS and EOS."""

    source: str  # the file and the field of the texts, for messages
    texts: list[str]
    types: list[int]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    add_bos: bool
    add_eos: bool
    eog_ids: frozenset[int]

    @classmethod
    def from_gguf(cls, file: GGUFFile, defaults: Defaults) -> Vocabulary:
        """Raises TokenizerError that names the field and both numbers, GGUFError for a field of a wrong type."""
        texts = file.get("tokenizer.ggml.tokens", list, None)
        if not texts:
            state = "is missing" if texts is None else "has 0 tokens"
            raise TokenizerError(f"{file.begin('tokenizer.ggml.tokens')} {state}; use a GGUF file with a vocabulary")
        size = len(texts)
        bos_id = _special_id(file, "bos", size, defaults.bos_id)
        eos_id = _special_id(file, "eos", size, defaults.eos_id)
        unk_id = _special_id(file, "unknown", size, defaults.unk_id)
        named = {eos_id, _special_id(file, "eot", size), _special_id(file, "eom", size)} - {None}
        ending = _ending_ids(texts)
        return cls(
            source=file.begin("tokenizer.ggml.tokens"),
            texts=texts,
            types=_types(file, size, ending, named | {bos_id}, unk_id),
            bos_id=bos_id,
            eos_id=eos_id,
            unk_id=unk_id,
            add_bos=_adds(file, "bos", defaults.add_bos, bos_id),
            add_eos=_adds(file, "eos", False, eos_id),
            eog_ids=frozenset(i for i in named if i is not None) | ending,
        )


def token_array(file: GGUFFile, name: str, size: int) -> npt.NDArray[Any] | None:
    """The field `tokenizer.ggml.<name>`, one number a token; None where it is absent."""
    key = f"tokenizer.ggml.{name}"
    values = file.get(key, np.ndarray, None)
    if values is not None and len(values) != size:
        raise TokenizerError(
            f"{file.begin(key)} has {len(values)} entries, tokenizer.ggml.tokens has {size}; {RECONVERT}"
        )
    return values


def _special_id(file: GGUFFile, role: str, size: int, default: int | None = None) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    token = file.get(key, int, None)
    if token is None:
        return default if default is not None and default < size else None
    if not 0 <= token < size:
        raise TokenizerError(f"{file.begin(key)} is {token}, the vocabulary has {size} tokens; {RECONVERT}")
    return token


def _ending_ids(texts: list[str]) -> set[int]:
    """Ids of tokens with a text that is known to end generation."""
    ids = {text: i for i, text in enumerate(texts) if text in END_OF_GENERATION}
    not_ending = {text for text, others in _NOT_ENDING_BESIDE if others <= ids.keys()}
    return {i for text, i in ids.items() if text not in not_ending}


def _types(file: GGUFFile, size: int, ending: set[int], named: set[int | None], unk_id: int | None) -> list[int]:
    """Token types by id. As in llama.cpp a text known to end generation is a control token whatever the file says,
    for some converters forget it. In a file without types, `named` are control tokens, too."""
    values = token_array(file, "token_type", size)
    types: list[int] = [int(TokenType.NORMAL)] * size if values is None else values.tolist()
    known = set(TokenType)
    for index, kind in enumerate(types):
        if kind not in known:
            raise TokenizerError(
                f"{file.begin('tokenizer.ggml.token_type')}[{index}] is {kind}, expected 1 to 6; {RECONVERT}"
            )
    if values is None and unk_id is not None:
        types[unk_id] = TokenType.UNKNOWN
    for token in ending | (named if values is None else set()):
        if token is not None:
            types[token] = TokenType.CONTROL
    return types


def _adds(file: GGUFFile, role: str, default: bool, token: int | None) -> bool:
    key = f"tokenizer.ggml.add_{role}_token"
    adds = file.get(key, bool, default)
    if adds and token is None:
        raise TokenizerError(
            f"{file.begin(key)} is true, but the vocabulary has no {role.upper()} token; "
            f"set tokenizer.ggml.{role}_token_id with gguf-set-metadata"
        )
    return adds
