"""What every kind of vocabulary in a GGUF file has: texts, types, special tokens. Checked once, at load."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
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
# of eos and eot.
# fmt: off
END_OF_GENERATION = frozenset({
    "</s>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "<end_of_utterance>", "<turn|>", "<|return|>", "<|call|>",
    "<|calls|>", "<|flush|>", "<|tool_response>", "[e~[", "<|ifm|im_end|>", "<｜end▁of▁sentence｜>",
})
# What code models emit to pad, or to begin another repository or file: by their texts where the metadata names none.
FILL_IN_THE_MIDDLE = {
    "fim_pad": frozenset({"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"}),
    "fim_rep": frozenset({"<|fim_repo|>", "<fim-repo>", "<|repo_name|>", "<REPO>", "<reponame>"}),
    "fim_sep": frozenset({"<|file_sep|>", "<|plamo:file_separator|>"}),
}
# fmt: on
# ... but not where these others are in the vocabulary: there the first only closes one message of several.
_NOT_ENDING_BESIDE = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|calls|>", "<|flush|>"}),
    ("</s>", {"<|tool_response>"}),
    ("</s>", {"<|plamo:eos|>"}),
)
BYTE_TEXT = re.compile(r"<0x([0-9A-Fa-f]{2})>")
RECONVERT = "convert the model again with a current converter"


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What llama.cpp assumes of a kind of vocabulary where the metadata is silent."""

    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    add_bos: bool


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Token texts and types by id, the ids with a role, and whether encoding adds BOS and EOS."""

    source: str  # the file and the field of the texts, for messages
    texts: list[str]
    types: list[int]
    forced_control: frozenset[int]  # control tokens that are none in the file
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    add_bos: bool
    add_eos: bool
    eog_ids: frozenset[int]
    lstrip_ids: frozenset[int]  # special tokens that take the white space in front of them with them
    rstrip_ids: frozenset[int]  # ... and behind them

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
        in_code = {role: _special_id(file, role, size) for role in FILL_IN_THE_MIDDLE}
        roles = (eos_id, _special_id(file, "eot", size), _special_id(file, "eom", size), *in_code.values())
        named = {token for token in roles if token is not None}
        ending = _ending_ids(texts, [role for role, token in in_code.items() if token is None])
        types = _types(file, size, unk_id)
        control = ending
        if "tokenizer.ggml.token_type" not in file.metadata:
            control = control | named | ({bos_id} if bos_id is not None else set())
        forced = frozenset(token for token in control if types[token] != TokenType.CONTROL)
        for token in forced:
            types[token] = TokenType.CONTROL
        lstrip_ids, rstrip_ids = _stripping_ids(file, texts, types)
        return cls(
            source=file.begin("tokenizer.ggml.tokens"),
            texts=texts,
            types=types,
            forced_control=forced,
            bos_id=bos_id,
            eos_id=eos_id,
            unk_id=unk_id,
            add_bos=_adds(file, "bos", defaults.add_bos, bos_id),
            add_eos=_adds(file, "eos", False, eos_id),
            eog_ids=frozenset(named | ending),
            lstrip_ids=lstrip_ids,
            rstrip_ids=rstrip_ids,
        )

    @cached_property
    def text_set(self) -> frozenset[str]:
        return frozenset(self.texts)


def token_array(file: GGUFFile, name: str, size: int) -> npt.NDArray[Any] | None:
    """The field `tokenizer.ggml.<name>`, one number a token; None where it is absent."""
    key = f"tokenizer.ggml.{name}"
    values = file.get(key, np.ndarray, None)
    if values is not None and len(values) != size:
        raise TokenizerError(
            f"{file.begin(key)} has {len(values)} entries, tokenizer.ggml.tokens has {size}; {RECONVERT}"
        )
    return values


def byte_of(vocabulary: Vocabulary, token: int) -> int:
    """The byte that a byte token stands for. Raises TokenizerError where its text is none of `<0x00>` to `<0xFF>`."""
    match = BYTE_TEXT.fullmatch(vocabulary.texts[token])
    if match is None:
        raise TokenizerError(
            f"{vocabulary.source}[{token}] is the byte token {vocabulary.texts[token]!r:.40}, "
            f"expected <0x00> to <0xFF>; {RECONVERT}"
        )
    return int(match[1], 16)


def _special_id(file: GGUFFile, role: str, size: int, default: int | None = None) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    token = file.get(key, int, None)
    if token is None:
        return default if default is not None and default < size else None
    if not 0 <= token < size:
        raise TokenizerError(f"{file.begin(key)} is {token}, the vocabulary has {size} tokens; {RECONVERT}")
    return token


def _ending_ids(texts: list[str], in_code: list[str]) -> set[int]:
    """Ids of tokens with a text that is known to end generation; `in_code`: the roles in code to look for, too."""
    ending = END_OF_GENERATION.union(*(FILL_IN_THE_MIDDLE[role] for role in in_code))
    beside = set().union(*(others for _, others in _NOT_ENDING_BESIDE))
    ids = {text: i for i, text in enumerate(texts) if text in ending or text in beside}
    not_ending = {text for text, others in _NOT_ENDING_BESIDE if others <= ids.keys()}
    return {i for text, i in ids.items() if text in ending and text not in not_ending}


def _types(file: GGUFFile, size: int, unk_id: int | None) -> list[int]:
    """Token types by id, as the file has them; in one without types all are normal but the unknown token."""
    values = token_array(file, "token_type", size)
    if values is None:
        values = np.full(size, TokenType.NORMAL)
        if unk_id is not None:
            values[unk_id] = TokenType.UNKNOWN
    if (wrong := np.isin(values, list(TokenType), invert=True)).any():
        index = int(wrong.argmax())
        key = file.begin("tokenizer.ggml.token_type")
        raise TokenizerError(f"{key}[{index}] is {values[index]}, expected 1 to 6; {RECONVERT}")
    types: list[int] = values.astype(np.int64).tolist()
    return types


def _stripping_ids(file: GGUFFile, texts: list[str], types: list[int]) -> tuple[frozenset[int], frozenset[int]]:
    """Tokens that take white space to their left, and to their right, with them.

    No field says which: as in llama.cpp (src/llama-vocab.cpp) they go by the names of the models that have such tokens.
    """
    name, pre = file.get("general.name", str, "").lower(), file.get("tokenizer.ggml.pre", str, "")
    if any(jina in pre for jina in ("jina-v2-de", "jina-v2-es", "jina-v2-code")):
        return frozenset(i for i, text in enumerate(texts) if text == "<mask>"), frozenset()
    if "phi-3" in name or "phi3" in name:
        special, plain = (
            {TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN},
            {"<unk>", "<s>", "<|endoftext|>"},
        )
        tokens = enumerate(zip(texts, types, strict=True))
        return frozenset(), frozenset(i for i, (text, kind) in tokens if kind in special and text not in plain)
    if "modern-bert" in name:
        return frozenset(i for i, text in enumerate(texts) if text == "[MASK]"), frozenset()
    return frozenset(), frozenset()


def _adds(file: GGUFFile, role: str, default: bool, token: int | None) -> bool:
    key = f"tokenizer.ggml.add_{role}_token"
    adds = file.get(key, bool, default)
    if adds and token is None:
        raise TokenizerError(
            f"{file.begin(key)} is true, but the vocabulary has no {role.upper()} token; "
            f"set tokenizer.ggml.{role}_token_id with gguf-set-metadata"
        )
    return adds
