"""Text to token ids and back, from the vocabulary of a GGUF file. One class per kind of vocabulary does the merging."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Literal, Protocol

from llorch.core.bpe_vocab import BytePairModel
from llorch.core.gguf import GGUFFile
from llorch.core.model_files import open_model
from llorch.core.sentencepiece_vocab import SentencePieceModel
from llorch.core.special_tokens import SpecialTokens
from llorch.core.vocabulary import TokenType, Vocabulary
from llorch.errors import InvalidRequestError, TokenizerError, UnsupportedModelError

Kind = Literal["sentencepiece", "bpe"]


class TokenizerModel(Protocol):
    """What a kind of vocabulary does for the Tokenizer."""

    @property
    def kind(self) -> Kind: ...

    @property
    def pre(self) -> str | None:
        """The name of the pre-tokenizer, where there is one."""
        ...

    vocabulary: Vocabulary
    space_prefix: bool  # `encode` puts a space before text at the start and after special tokens

    def encode(self, text: str, after_special: bool) -> list[int]:
        """Ids of a text that holds no special token."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """What a token of the vocabulary adds to a text; b"" for a control token."""
        ...


# tokenizer.ggml.model -> what reads it
MODELS: dict[str, Callable[[GGUFFile], TokenizerModel]] = {"llama": SentencePieceModel, "gpt2": BytePairModel}
_NOT_YET = {"bert": "WordPiece", "t5": "Unigram", "rwkv": "RWKV", "plamo2": "PLaMo-2", "gemma4": "character-level BPE"}
_MATCHED = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)


class Tokenizer:
    """A model's tokenizer; ids and texts are llama.cpp's. Any number of threads may use one."""

    def __init__(self, model: TokenizerModel) -> None:
        """Use `Tokenizer.from_gguf`."""
        self._model = model
        self._vocabulary = vocabulary = model.vocabulary
        self.kind: Kind = model.kind
        self.pre = model.pre
        self.vocab_size = len(vocabulary.texts)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.eog_ids = vocabulary.eog_ids
        by_kind = {kind: [i for i, k in enumerate(vocabulary.types) if k == kind] for kind in _MATCHED}
        user_defined = by_kind[TokenType.USER_DEFINED]
        self._user_defined = SpecialTokens(vocabulary, user_defined)
        self._special = SpecialTokens(vocabulary, (i for ids in by_kind.values() for i in ids))
        # a guard breaks a text in two, which one character cannot be
        self.control_texts = {t for t in self._special.ids.keys() - self._user_defined.ids.keys() if len(t) > 1}
        breakable = [i for text, i in self._special.ids.items() if text in self.control_texts]
        self._guarded = SpecialTokens(vocabulary, [*breakable, *user_defined])

    @classmethod
    def from_gguf(cls, source: str | os.PathLike[str] | GGUFFile) -> Tokenizer:
        """The tokenizer of a model or vocabulary file; no tensors are needed.

        Raises GGUFError, TokenizerError for a vocabulary that cannot be used, UnsupportedModelError for another kind.
        """
        if not isinstance(source, GGUFFile):
            with open_model(source) as file:
                return cls.from_gguf(file)
        kind = source.get("tokenizer.ggml.model", str, None)
        if kind is None:
            raise TokenizerError(f"{source.path}: tokenizer.ggml.model is missing; use a GGUF file with a vocabulary")
        if kind not in MODELS:
            what = f"{_NOT_YET[kind]} vocabularies are" if kind in _NOT_YET else "this kind of vocabulary is"
            raise UnsupportedModelError(
                f"{source.path}: tokenizer.ggml.model is {kind!r:.80}: {what} not supported yet; "
                "supported: 'llama' (SentencePiece) and 'gpt2' (byte-level BPE); use a model with such a vocabulary"
            )
        return cls(MODELS[kind](source))

    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = False, guard: str | None = None
    ) -> list[int]:
        """Token ids of a text.

        `add_special` adds BOS and EOS where the vocabulary asks for them. `parse_special` lets texts of control tokens
        (`<s>`, `<|im_end|>`) become those tokens: for rendered templates, never for a user's words. User-defined tokens
        always match. `guard` is a character that stands for nothing: where it breaks the text of a control token, that
        does not match, and it is taken out before the rest is read (control tokens of one character, which cannot be
        broken, do not match at all). Raises InvalidRequestError for a lone surrogate, which no bytes stand for.
        """
        _check_unicode(text)
        vocabulary = self._vocabulary
        ids = [vocabulary.bos_id] if add_special and vocabulary.bos_id is not None and vocabulary.add_bos else []
        after_special = True
        special = self._special if guard is None else self._guarded
        parts = (special if parse_special else self._user_defined).split(text)
        if guard is not None:
            parts = [piece for part in parts for piece in self._without(guard, part)]
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._model.encode(part, after_special)
            after_special = isinstance(part, int)
        if add_special and vocabulary.eos_id is not None and vocabulary.add_eos:
            ids.append(vocabulary.eos_id)
        return ids

    def encode_prompt(self, text: str, guard: str | None = None) -> list[int]:
        """Token ids of a rendered prompt, which the model is to continue: control tokens match, no EOS is added.

        BOS is added where the vocabulary asks for it and the text does not begin with it. Raises as `encode` does.
        """
        ids = self.encode(text, add_special=False, parse_special=True, guard=guard)
        vocabulary = self._vocabulary
        if vocabulary.add_bos and vocabulary.bos_id is not None and ids[:1] != [vocabulary.bos_id]:
            ids.insert(0, vocabulary.bos_id)
        return ids

    def _without(self, guard: str, part: str | int) -> list[str | int]:
        """A part of a text without the guard; user-defined tokens that it broke are whole again."""
        if isinstance(part, int) or guard not in part:
            return [part]
        return self._user_defined.split(part.replace(guard, ""))

    def text(self, token: int) -> str:
        """The vocabulary's own text of a token, such as `<s>`. Raises InvalidRequestError as `token_bytes` does."""
        self.token_bytes(token)
        return self._vocabulary.texts[token]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without control tokens: what `encode` was given.

        So the space that `encode` puts at the start and after a user-defined token is taken away again, unlike in the
        stream of an IncrementalDetokenizer, which continues a text. Bytes that are no UTF-8 become U+FFFD.
        Raises InvalidRequestError for an id outside the vocabulary.
        """
        types, data = self._vocabulary.types, bytearray()
        after_special = self._model.space_prefix
        for token in ids:
            piece = self.token_bytes(token)
            if types[token] == TokenType.USER_DEFINED:
                data += piece
                after_special = self._model.space_prefix
            elif piece:
                data += piece.removeprefix(b" ") if after_special else piece
                after_special = False
        return data.decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token adds to a text, perhaps a part of a character; b"" for a control token.

        Raises InvalidRequestError for an id outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise InvalidRequestError(
                f"token {token} is outside the vocabulary of {self.vocab_size}: use ids from 0 to {self.vocab_size - 1}"
            )
        return self._model.token_bytes(token)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"character {error.start} of {len(text)} is the lone surrogate U+{ord(text[error.start]):04X}: "
            "send well-formed Unicode"
        ) from None
