"""What the two kinds of completions look like, whole and as chunks of a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llorch.core.requests import Ended, StopReason, Token, TokenLogprobs
from llorch.core.tokenizer import Tokenizer
from llorch.http.openai.logprobs import CompletionLogprobs, chat_logprobs


@dataclass
class Answer:
    """One choice, as far as it has come."""

    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ended: Ended | None = None
    cached_tokens: int = 0  # of the prompt

    def add(self, event: Token) -> None:
        self.text += event.text
        self.logprobs += event.logprobs

    def end(self, event: Ended) -> None:
        self.ended = event
        self.logprobs += event.logprobs


class Format(ABC):
    """The shape of one response: `head` is what all of its objects begin with."""

    kind = ""
    chunk_kind = ""

    def __init__(self, head: dict[str, Any], tokenizer: Tokenizer, prompts: Sequence[int]) -> None:
        """`prompts`: the length of each, in tokens."""
        self._head, self._tokenizer, self._prompts = head, tokenizer, prompts

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._usage(answers)}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Chunks before a choice's first text."""
        return []

    def text(self, index: int, event: Token) -> dict[str, Any]:
        """The chunk of a choice's next text."""
        return self._chunk(self._part(index, event.text, event.logprobs, None))

    def closing(self, index: int, event: Ended) -> dict[str, Any]:
        """The chunk that says how a choice ended."""
        return self._chunk(self._part(index, "", event.logprobs, finish_reason(event)))

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The last chunk, where it is asked for."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": self._usage(answers)}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": [choice]}

    @abstractmethod
    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A choice of the whole response."""

    @abstractmethod
    def _part(self, index: int, text: str, logprobs: Sequence[TokenLogprobs], reason: str | None) -> dict[str, Any]:
        """A choice of one chunk."""

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """As OpenAI counts: each prompt once, however many answers it has; what of it was cached, of its first."""
        output = sum(answer.ended.tokens_out for answer in answers if answer.ended is not None)
        prompt = sum(self._prompts)
        cached = sum(answer.cached_tokens for answer in answers[:: len(answers) // len(self._prompts)])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class ChatFormat(Format):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})]

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": chat_logprobs(self._tokenizer, answer.logprobs),
            "finish_reason": finish_reason(answer.ended),
        }

    def _part(self, index: int, text: str, logprobs: Sequence[TokenLogprobs], reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        found = chat_logprobs(self._tokenizer, logprobs)
        return {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}


class CompletionFormat(Format):
    kind = chunk_kind = "text_completion"

    def __init__(self, head: dict[str, Any], tokenizer: Tokenizer, prompts: Sequence[int]) -> None:
        super().__init__(head, tokenizer, prompts)
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return self._part(index, answer.text, answer.logprobs, finish_reason(answer.ended))

    def _part(self, index: int, text: str, logprobs: Sequence[TokenLogprobs], reason: str | None) -> dict[str, Any]:
        if (shape := self._logprobs.get(index)) is None:
            shape = self._logprobs[index] = CompletionLogprobs(self._tokenizer)
        return {"index": index, "text": text, "logprobs": shape(logprobs), "finish_reason": reason}


def finish_reason(event: Ended | None) -> str | None:
    if event is None:
        return None
    return "length" if event.reason is StopReason.MAX_TOKENS else "stop"
