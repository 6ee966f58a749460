"""What the engine takes and gives: requests in, events out. Plain data, no threads."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from llorch.errors import LlorchError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen; names, order and semantics are llama.cpp's. Off by default but for temperature."""

    temperature: float = 1.0  # below 1e-6: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over the last `penalty_window` tokens of prompt and output
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int = 64
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids and what is added to their logits, before all else
    seed: int | None = None  # None: drawn, and reported in Started

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation. `max_tokens` beyond the room that the context leaves is cut to it."""

    job_id: str
    prompt: tuple[int, ...]  # token ids, BOS included
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: off; else how many of the most likely tokens are reported at each position
    priority: int = 0  # of all that wait, the lowest number runs first
    key: str | None = None  # whose request it is: each has its own job ids, and places where those are limited

    @property
    def name(self) -> tuple[str | None, str]:
        """What no other job that waits or runs is called."""
        return self.key, self.job_id


class StopReason(StrEnum):
    MAX_TOKENS = "MAX_TOKENS"
    EOS = "EOS"
    STOP_SEQUENCE = "STOP_SEQUENCE"


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position of the output: the natural logarithms of softmax(logits), as the model gives
    them, before any bias, penalty, filter or temperature."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely tokens, most likely first


@dataclass(frozen=True)
class Started:
    """The job runs for the first time: its first prompt chunk is in this step."""

    started_at: float  # seconds since the epoch
    seed: int
    cached_tokens: int = 0  # of the prompt, whose keys and values were in the cache already


@dataclass(frozen=True)
class Token:
    """Text that became certain. Whole characters only; `index` counts these events from 0 without a gap."""

    text: str
    index: int
    tokens: int = 1  # how many tokens it took: more where a character was split, or what follows was held back
    logprobs: tuple[TokenLogprobs, ...] = ()  # of these tokens, where the request asks for them


@dataclass(frozen=True)
class Ended:
    reason: StopReason
    tokens_out: int
    decode_seconds: float  # from the first token to the last
    stop_sequence: str | None = None
    tokens: tuple[int, ...] = ()  # the ids of all tokens_out
    logprobs: tuple[TokenLogprobs, ...] = ()  # of tokens behind the last Token event, but for those of a stop string


@dataclass(frozen=True)
class Failed:
    error: LlorchError


Event = Started | Token | Ended | Failed
