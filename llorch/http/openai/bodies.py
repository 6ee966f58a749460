"""The request bodies of the OpenAI routes: what OpenAI names, and llorch's own top_k, min_p and repetition_penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from llorch.core.requests import SamplingParams
from llorch.http.bodies import PRIORITY, sampling_fields
from llorch.http.fields import BodyError, Field, Integer, Number, Text, Violation, parse_body
from llorch.http.openai.fields import Flag, LogitBias, Messages, Prompt, Stop, StreamOptions, Unsupported, Variables

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_LENGTH = 16, 1000
MOST_TOKENS = 2**31 - 1  # where the operator has set no limit: what the context leaves is one
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of /v1/completions


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a body's rules take from the worker."""

    max_tokens: int = MOST_TOKENS
    vocab_size: int | None = None  # None before the model is loaded
    choices: int = MAX_CHOICES  # that the queue and the places of the engine hold together


@dataclass(frozen=True, kw_only=True)
class GenerationBody:
    """What both bodies have."""

    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    n: int = 1
    max_tokens: int | None = None  # None: what the context leaves
    stop: tuple[str, ...] = field(default=(), repr=False)
    logprobs: int | None = None  # None: off; else how many alternatives
    priority: int = 0
    sampling: SamplingParams


@dataclass(frozen=True, kw_only=True)
class ChatBody(GenerationBody):
    """The body of POST /v1/chat/completions, checked."""

    messages: tuple[dict[str, str], ...] = field(repr=False)
    variables: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class CompletionBody(GenerationBody):
    """The body of POST /v1/completions, checked."""

    prompts: tuple[str | tuple[int, ...], ...] = field(repr=False)


def _common(bounds: Bounds) -> tuple[Field, ...]:
    return (
        Text(name="model", description="The model's id, as GET /v1/models lists it; the one there is by default."),
        Flag(name="stream", default=False, description="Whether to stream the answer as server-sent events."),
        StreamOptions(name="stream_options", description="`include_usage`: a last chunk with the token counts."),
        Integer(
            name="n",
            low=1,
            high=bounds.choices,
            default=1,
            description="How many answers. Answer i of a seed is that of seed + i.",
        ),
        Integer(
            name="seed",
            low=-(2**63),
            high=2**64 - 1,
            description="Seed of the random draws, taken modulo 2^64; drawn by default.",
        ),
        *sampling_fields(bounds.vocab_size),
        Number(
            name="frequency_penalty",
            low=-2.0,
            high=2.0,
            default=0.0,
            description="Taken from a token's logit for each time it is among the last 64 tokens, prompt included.",
        ),
        Number(
            name="presence_penalty",
            low=-2.0,
            high=2.0,
            default=0.0,
            description="Taken from a token's logit where it is among the last 64 tokens, prompt included.",
        ),
        LogitBias(
            name="logit_bias",
            vocab_size=bounds.vocab_size,
            description="Added to the logits of these token ids, before all else.",
        ),
        Stop(
            name="stop",
            max_count=MAX_STOPS,
            max_length=MAX_STOP_LENGTH,
            description="Strings that end the text; they are not part of it.",
        ),
        PRIORITY,
    )


@lru_cache
def chat_fields(bounds: Bounds) -> tuple[Field, ...]:
    """The fields of POST /v1/chat/completions that are known; others are passed over."""
    return (
        Messages(name="messages", required=True, description="The conversation, for the model's chat template."),
        *_common(bounds),
        Integer(
            name="max_completion_tokens",
            low=1,
            high=bounds.max_tokens,
            description="Most tokens to generate, by default what the context leaves; a value beyond is cut to it.",
        ),
        Integer(name="max_tokens", low=1, high=bounds.max_tokens, description="The older name of the same."),
        Flag(name="logprobs", default=False, description="Whether to report the tokens' log-probabilities."),
        Integer(
            name="top_logprobs",
            low=0,
            high=MAX_LOGPROBS,
            description="How many of the most likely tokens to report at each position, with `logprobs`.",
        ),
        Variables(name="chat_template_kwargs", description="Further names for the chat template, with plain values."),
        Unsupported(
            name="response_format",
            asks_for_nothing=lambda value: isinstance(value, dict) and value.get("type") == "text",
            instead='leave it out, or send {"type": "text"}',
            description="A grammar for the answer.",
        ),
        Unsupported(name="tools", description="Functions that the model may call."),
        Unsupported(
            name="tool_choice",
            asks_for_nothing=lambda value: value in ("none", "auto"),
            description="Which function the model is to call.",
        ),
        Unsupported(name="functions", description="The older name of tools."),
        Unsupported(
            name="function_call",
            asks_for_nothing=lambda value: value in ("none", "auto"),
            description="The older name of tool_choice.",
        ),
        Unsupported(
            name="modalities", asks_for_nothing=lambda value: value == ["text"], description="Other output than text."
        ),
        Unsupported(name="audio", description="Spoken output."),
        Unsupported(name="web_search_options", description="Searches."),
    )


@lru_cache
def completion_fields(bounds: Bounds) -> tuple[Field, ...]:
    """The fields of POST /v1/completions that are known; others are passed over."""
    return (
        Prompt(
            name="prompt",
            required=True,
            vocab_size=bounds.vocab_size,
            description="The rendered prompt or prompts: text, in which control tokens are parsed, or token ids.",
        ),
        *_common(bounds),
        Integer(
            name="max_tokens",
            low=1,
            high=bounds.max_tokens,
            default=DEFAULT_COMPLETION_TOKENS,
            description="Most tokens to generate; a value beyond what the context leaves is cut to it.",
        ),
        Integer(
            name="logprobs",
            low=0,
            high=MAX_LOGPROBS,
            description="Report the tokens' log-probabilities, and this many of the most likely at each position.",
        ),
        Unsupported(name="echo", description="The prompt before the text."),
        Unsupported(name="suffix", description="Text to end before."),
        Integer(
            name="best_of", low=1, high=MAX_CHOICES, description="At most `n`: no more are generated than are sent."
        ),
    )


def parse_chat(raw: bytes, bounds: Bounds) -> ChatBody:
    """Raises BodyError with every violation at once."""
    given = parse_body(raw, chat_fields(bounds), lenient=True)
    wanted = given.get("logprobs", False)
    if "top_logprobs" in given and not wanted:
        raise BodyError([Violation("top_logprobs", "needs(logprobs)", "needs logprobs to be true")])
    return ChatBody(
        **_shared(given),
        messages=given["messages"],
        variables=given.get("chat_template_kwargs", {}),
        max_tokens=given.get("max_completion_tokens", given.get("max_tokens")),
        logprobs=given.get("top_logprobs", 0) if wanted else None,
    )


def parse_completion(raw: bytes, bounds: Bounds) -> CompletionBody:
    """Raises BodyError with every violation at once."""
    given = parse_body(raw, completion_fields(bounds), lenient=True)
    prompts, n = given["prompt"], given.get("n", 1)
    if given.get("best_of", n) > n:
        message = f"is {given['best_of']}, n is {n}: choosing among more answers than are sent is not supported"
        raise BodyError([Violation("best_of", "unsupported", message)])
    if len(prompts) * n > bounds.choices:
        message = f"asks for {len(prompts)} x {n} answers, this worker takes {bounds.choices} at once: send fewer"
        raise BodyError([Violation("prompt", f"max_count({bounds.choices})", message)])
    return CompletionBody(
        **_shared(given),
        prompts=prompts,
        max_tokens=given.get("max_tokens", DEFAULT_COMPLETION_TOKENS),
        logprobs=given.get("logprobs"),
    )


_SAMPLING: Sequence[str] = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
)


def _shared(given: Mapping[str, Any]) -> dict[str, Any]:
    if "stream_options" in given and not given.get("stream"):
        raise BodyError([Violation("stream_options", "needs(stream)", "needs stream to be true")])
    seed = given.get("seed")
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    fields = {name: given[name] for name in ("model", "stream", "n", "stop", "priority") if name in given}
    return {
        **fields,
        "include_usage": given.get("stream_options", False),
        "sampling": SamplingParams(**sampling, seed=None if seed is None else seed % 2**64),
    }
