"""Log-probabilities in the two shapes that OpenAI has for them.

They are the natural logarithms of the model's own distribution, before temperature, penalties and the like.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from llorch.core.requests import TokenLogprobs
from llorch.core.tokenizer import Tokenizer

LEAST = -9999.0  # for what JSON has no number for


def chat_logprobs(tokenizer: Tokenizer, items: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
    """`choices[].logprobs` of a chat completion; null where there is none."""
    content = [
        _entry(tokenizer, item.token, item.logprob)
        | {"top_logprobs": [_entry(tokenizer, token, logprob) for token, logprob in item.top]}
        for item in items
    ]
    return {"content": content, "refusal": None} if content else None


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    text = data.decode(errors="replace") or tokenizer.text(token)
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(data) or None}


class CompletionLogprobs:
    """`choices[].logprobs` of completions: one choice's, whose tokens lie behind each other in its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0  # characters

    def __call__(self, items: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        offsets = []
        for item in items:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(item.token)))
        if not items:
            return None
        return {
            "tokens": [self._text(item.token) for item in items],
            "token_logprobs": [max(item.logprob, LEAST) for item in items],
            "top_logprobs": [self._top(item) for item in items],
            "text_offset": offsets,
        }

    def _top(self, item: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, and the one that was drawn. Of several with one text the most likely."""
        found: dict[str, float] = {}
        for token, logprob in (*item.top, (item.token, item.logprob)):
            found.setdefault(self._text(token), max(logprob, LEAST))
        return found

    def _text(self, token: int) -> str:
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode() or self._tokenizer.text(token)
        except UnicodeDecodeError:  # a part of a character, in OpenAI's notation
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
