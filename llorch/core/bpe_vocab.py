"""Byte-level BPE vocabularies (`tokenizer.ggml.model` "gpt2"): the tokenizers library, set up from GGUF metadata."""

from __future__ import annotations

from typing import Literal

import numpy as np
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE

from llorch.core.bpe_splits import NOT_BYTE_LEVEL, PRE_TOKENIZERS, PreTokenizer
from llorch.core.gguf import GGUFFile, shown
from llorch.core.vocabulary import RECONVERT, Defaults, TokenType, Vocabulary, byte_of
from llorch.errors import TokenizerError, UnsupportedModelError

MERGES, PRE = "tokenizer.ggml.merges", "tokenizer.ggml.pre"
_MERGEABLE = frozenset({TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.BYTE})


def _alphabet() -> dict[str, int]:
    """The byte that each character of a token's text stands for: GPT-2's, which has no space and no control character.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _alphabet()


class BytePairModel:
    """Ordinary text to ids, and the bytes of each token. Special tokens are the Tokenizer's.

    As in llama.cpp a byte that is no token adds nothing, and `tokenizer.ggml.add_space_prefix` is without effect.
    Unlike there, merging never arrives at what the file calls a control token: merges of one are left out.
    """

    kind: Literal["bpe"] = "bpe"
    space_prefix = False

    def __init__(self, file: GGUFFile) -> None:
        """Raises TokenizerError for a vocabulary that cannot be used, GGUFError for a field of a wrong type,
        UnsupportedModelError for one whose tokens are not of bytes."""
        self.pre: str = file.get(PRE, str, "") or "default"  # as in llama.cpp
        pre = _pre_tokenizer(file, self.pre)
        file.get("tokenizer.ggml.add_space_prefix", bool, False)  # of no effect, but of no other type either
        self.vocabulary = Vocabulary.from_gguf(file, _defaults(file, pre))
        self._library = _library(file, self.vocabulary, pre)

    def encode(self, text: str, after_special: bool) -> list[int]:
        """Ids of a text without special tokens."""
        # encode_batch_fast lets other threads run meanwhile, and counts no offsets
        ids: list[int] = self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text: nothing for control tokens."""
        text, kind = self.vocabulary.texts[token], self.vocabulary.types[token]
        if kind == TokenType.NORMAL:
            try:
                return bytes(map(_BYTES.__getitem__, text))
            except KeyError:  # a token that was added to the vocabulary in plain text
                return text.encode()
        if kind == TokenType.BYTE:
            return bytes([byte_of(self.vocabulary, token)])
        return text.encode() if kind == TokenType.USER_DEFINED else b""


def _defaults(file: GGUFFile, pre: PreTokenizer) -> Defaults:
    """llama.cpp takes token 11, Falcon's <|endoftext|>, for BOS and EOS of all files that name none; here only where it
    is a control token: in GPT-2's vocabulary it is the comma, which ends no text."""
    types = file.get("tokenizer.ggml.token_type", np.ndarray, None)
    falcon = types is not None and len(types) > 11 and types[11] == TokenType.CONTROL
    token = 11 if falcon else None
    has_bos = falcon or "tokenizer.ggml.bos_token_id" in file.metadata
    return Defaults(bos_id=token, eos_id=token, unk_id=None, add_bos=pre.add_bos and has_bos)


def _pre_tokenizer(file: GGUFFile, name: str) -> PreTokenizer:
    if name in NOT_BYTE_LEVEL:
        raise UnsupportedModelError(
            f"{file.begin(PRE)} is '{name}': tokens are merged from characters there, not from bytes, which is not "
            "supported yet; use a model with a byte-level vocabulary"
        )
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{file.begin(PRE)} is '{shown(name)}', which is not known; known are {', '.join(sorted(PRE_TOKENIZERS))}; "
            "where the text is cut as one of them does, set it with gguf-set-metadata"
        )
    return PRE_TOKENIZERS[name]


def _library(file: GGUFFile, vocabulary: Vocabulary, pre: PreTokenizer) -> Library:
    for token, kind in enumerate(vocabulary.types):
        if kind == TokenType.BYTE:
            byte_of(vocabulary, token)
    tokens = enumerate(zip(vocabulary.texts, vocabulary.types, strict=True))
    mergeable, forced = _MERGEABLE, vocabulary.forced_control
    ids = {text: i for i, (text, kind) in tokens if text and (kind in mergeable or i in forced)}
    library = Library(BPE(ids, _merges(file, vocabulary, ids), ignore_merges=pre.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    return library


def _merges(file: GGUFFile, vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs that are joined, first to last. Of the same pair twice the first counts, as in llama.cpp."""
    merges = file.get(MERGES, list, None)
    if merges is None:
        raise TokenizerError(f"{file.begin(MERGES)} is missing, a byte-level BPE vocabulary needs them; {RECONVERT}")
    pairs = []
    for index, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left in ids and right in ids and left + right in ids:
            pairs.append((left, right))
        else:
            _check_left_out(f"{file.begin(MERGES)}[{index}] is '{shown(merge)}'", left, right, ids, vocabulary)
    return pairs if len(set(merges)) == len(merges) else list(dict.fromkeys(pairs))


def _check_left_out(merge: str, left: str, right: str, ids: dict[str, int], vocabulary: Vocabulary) -> None:
    """A merge may only be left out where a control token has part in it."""
    if not (left and right):
        raise TokenizerError(f"{merge}, expected two tokens with a space between them; {RECONVERT}")
    for part in (left, right, left + right):
        if part not in ids and part not in vocabulary.text_set:
            raise TokenizerError(f"{merge}: '{shown(part)}' is none of the {len(vocabulary.texts)} tokens; {RECONVERT}")
