"""The request bodies of the worker contract: one table of fields both checks a body and describes it in /docs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from llorch.core.requests import SamplingParams
from llorch.http.fields import Field, Integer, Number, Text, Texts

MAX_PROMPT_CHARACTERS = 32768

JOB_ID = Text(name="job_id", required=True, description="The job's name, unique among those that wait or run.")
CANCEL_FIELDS: tuple[Field, ...] = (JOB_ID,)
PRIORITY = Integer(
    name="priority",
    low=-100,
    high=100,
    default=0,
    description="Of the requests that wait, those with the lowest number run first.",
)


@dataclass(frozen=True, kw_only=True)
class ExecuteBody:
    """The body of POST /execute, checked."""

    job_id: str
    prompt: str = field(repr=False)
    max_tokens: int | None = None
    temperature: float = 1.0
    seed: int | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = field(default=(), repr=False)
    priority: int = 0

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


def sampling_fields(vocab_size: int | None, top_k: Callable[..., Field] = Integer) -> tuple[Field, ...]:
    """What every body that asks for text may say of how it is sampled; `vocab_size` as in `execute_fields`.

    `top_k`: that field's kind.
    """
    return (
        Number(name="temperature", low=0.0, high=2.0, default=1.0, description="0 always takes the most likely token."),
        Number(
            name="top_p", low=0.0, high=1.0, default=1.0, description="Keeps the most likely tokens up to this mass."
        ),
        top_k(
            name="top_k",
            low=0,
            high=vocab_size,
            default=0,
            description="Keeps this many most likely tokens; 0 keeps all.",
        ),
        Number(
            name="min_p",
            low=0.0,
            high=1.0,
            default=0.0,
            description="Drops tokens less likely than this share of the best.",
        ),
        Number(
            name="repetition_penalty",
            low=0.0,
            high=2.0,
            zero_refused=True,
            default=1.0,
            description="Divides (or multiplies) the logits of the last 64 tokens; 1 is off, 0 is refused.",
        ),
    )


@lru_cache
def execute_fields(max_tokens_limit: int, vocab_size: int | None) -> tuple[Field, ...]:
    """The fields of POST /execute; `vocab_size` bounds top_k and is None before the model is loaded."""
    temperature, *others = sampling_fields(vocab_size)
    return (
        JOB_ID,
        Text(
            name="prompt",
            required=True,
            max_length=MAX_PROMPT_CHARACTERS,
            confidential=True,
            description="The rendered prompt, in characters. Control tokens written in it are parsed.",
        ),
        Integer(
            name="max_tokens",
            low=1,
            high=max_tokens_limit,
            description=f"Most tokens to generate: by default what the context leaves, at most {max_tokens_limit}. "
            "A value beyond that room is cut to it.",
        ),
        temperature,
        Integer(
            name="seed",
            low=0,
            high=2**64 - 1,
            nullable=True,
            default=None,
            description="Seed of the random draws; drawn and reported in `started` where absent or null.",
        ),
        *others,
        Texts(
            name="stop",
            max_count=4,
            max_length=100,
            default=[],
            description="Strings that end the text; they are not part of it. Each is 1 to 100 characters long.",
        ),
        PRIORITY,
    )
