"""Special tokens in a text: where they stand, as llama.cpp finds them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llorch.core.vocabulary import Vocabulary

_SPACE = r"[ \t\n\v\f\r]"  # C's isspace
_MARK = re.compile("([\ud800-\udbff][\udc00-\udfff])")


class SpecialTokens:
    """Splits texts at some of a vocabulary's tokens.

    A longer token (in bytes) wins over a shorter one that overlaps it, even where the shorter one starts first.
    """

    def __init__(self, vocabulary: Vocabulary, ids: Iterable[int]) -> None:
        """Of tokens with the same text the last one counts."""
        texts = {vocabulary.texts[i]: i for i in ids if vocabulary.texts[i]}
        self.ids = dict(sorted(texts.items(), key=lambda item: -len(item[0].encode())))
        self._patterns = {i: pattern for i in self.ids.values() if (pattern := _stripping(vocabulary, i)) is not None}

    def split(self, text: str) -> list[str | int]:
        """Pieces of text and tokens in their order. The text is well-formed Unicode: it has no surrogates."""
        # Each token found becomes a pair of surrogates, which no later token's text matches.
        for number, (special, token) in enumerate(self.ids.items()):
            mark = chr(0xD800 + (number >> 10)) + chr(0xDC00 + (number & 0x3FF))
            text = self._patterns[token].sub(mark, text) if token in self._patterns else text.replace(special, mark)
        tokens = list(self.ids.values())
        pieces = enumerate(_MARK.split(text))
        return [tokens[_number(piece)] if index % 2 else piece for index, piece in pieces if piece]


def _number(mark: str) -> int:
    return (ord(mark[0]) - 0xD800 << 10) + ord(mark[1]) - 0xDC00


def _stripping(vocabulary: Vocabulary, token: int) -> re.Pattern[str] | None:
    """What a token matches that takes white space with it; None for one that does not."""
    left, right = token in vocabulary.lstrip_ids, token in vocabulary.rstrip_ids
    if not left and not right:
        return None
    # a run of white space is looked at from its start alone, or a long one would take quadratic time
    before, behind = f"(?<!{_SPACE}){_SPACE}*" if left else "", f"{_SPACE}*" if right else ""
    return re.compile(before + re.escape(vocabulary.texts[token]) + behind)
