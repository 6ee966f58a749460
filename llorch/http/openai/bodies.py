"""The request bodies of the OpenAI routes: what OpenAI names, and llorch's own top_k, min_p and repetition_penalty."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from llorch.core.requests import SamplingParams
from llorch.http.bodies import PRIORITY, sampling_fields
from llorch.http.fields import BodyError, Field, Integer, Number, Text, Violation, checked, json_object
from llorch.http.openai.fields import (
    Flag,
    LogitBias,
    Messages,
    OrMinusOne,
    Prompt,
    Stop,
    StreamOptions,
    Unsupported,
    Variables,
)

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_LENGTH = 16, 1000
MOST_TOKENS = 2**31 - 1  # where the operator has set no limit: what the context leaves is one
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of /v1/completions

# what other engines take beside OpenAI's fields: passed over, each would give another text than was asked for
OF_OTHER_ENGINES = {
    "grammar": "A grammar for the answer.",
    "json_schema": "A schema for the answer.",
    "guided_json": "A schema for the answer.",
    "guided_regex": "A pattern for the answer.",
    "guided_choice": "The answers that there may be.",
    "guided_grammar": "A grammar for the answer.",
    "structured_outputs": "A grammar, a schema or a pattern for the answer.",
    "format": "A schema for the answer.",
    "ignore_eos": "Whether to go on behind the model's end.",
    "min_tokens": "Least tokens to generate.",
    "stop_token_ids": "Tokens that end the text.",
}
MOST_NAMED = 8
_PLAIN_NAME = re.compile(r"\w{1,40}", re.ASCII)


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
    passed_over: tuple[str, ...] = ()  # names of unknown fields, for the log


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
        *sampling_fields(bounds.vocab_size, top_k=partial(OrMinusOne, stands_for=0)),
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
        Unsupported(
            name="response_format",
            asks_for_nothing=lambda value: isinstance(value, dict) and value.get("type") == "text",
            instead='leave it out, or send {"type": "text"}',
            description="A grammar for the answer.",
        ),
        *(Unsupported(name=name, description=description) for name, description in OF_OTHER_ENGINES.items()),
    )


@lru_cache
def chat_fields(bounds: Bounds) -> tuple[Field, ...]:
    """The fields of POST /v1/chat/completions that are known; others are passed over."""
    return (
        Messages(name="messages", required=True, description="The conversation, for the model's chat template."),
        *_common(bounds),
        OrMinusOne(
            name="max_completion_tokens",
            low=1,
            high=bounds.max_tokens,
            description="Most tokens to generate, by default (and with -1) what the context leaves; a value beyond is "
            "cut to it.",
        ),
        OrMinusOne(name="max_tokens", low=1, high=bounds.max_tokens, description="The older name of the same."),
        Flag(name="logprobs", default=False, description="Whether to report the tokens' log-probabilities."),
        Integer(
            name="top_logprobs",
            low=0,
            high=MAX_LOGPROBS,
            description="How many of the most likely tokens to report at each position, with `logprobs`.",
        ),
        Variables(name="chat_template_kwargs", description="Further names for the chat template, with plain values."),
        Unsupported(name="continue_final_message", description="Whether the last message is to be gone on with."),
        Unsupported(
            name="add_generation_prompt",
            asks_for_nothing=lambda value: value is True,
            instead="the template always begins an answer; leave it out",
            description="Whether the template begins an answer.",
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
        OrMinusOne(
            name="max_tokens",
            low=1,
            high=bounds.max_tokens,
            default=DEFAULT_COMPLETION_TOKENS,
            description="Most tokens to generate; a value beyond what the context leaves, or -1, is cut to it.",
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


def _sent(raw: bytes) -> dict[str, Any]:
    """What a body holds; a field that is null is absent."""
    return {name: value for name, value in json_object(raw).items() if value is not None}


def _without_idle_tools(sent: dict[str, Any]) -> dict[str, Any]:
    """Functions that the model is told not to call ask for nothing."""
    idle = {
        tools
        for tools, choice in (("tools", "tool_choice"), ("functions", "function_call"))
        if sent.get(choice) == "none"
    }
    return {name: value for name, value in sent.items() if name not in idle}


def _passed_over(sent: Mapping[str, Any], fields: Sequence[Field]) -> tuple[str, ...]:
    """Names of unknown fields for the log: a few, and none that could be a piece of somebody's text."""
    unknown = sent.keys() - {known.name for known in fields}
    return tuple(sorted(name for name in unknown if _PLAIN_NAME.fullmatch(name))[:MOST_NAMED])


def parse_chat(raw: bytes, bounds: Bounds) -> ChatBody:
    """Raises BodyError with every violation at once."""
    sent, fields = _without_idle_tools(_sent(raw)), chat_fields(bounds)
    given = checked(sent, fields)
    wanted = given.get("logprobs", False)
    if "top_logprobs" in given and not wanted:
        raise BodyError([Violation("top_logprobs", "needs(logprobs)", "needs logprobs to be true")])
    return ChatBody(
        **_shared(given),
        passed_over=_passed_over(sent, fields),
        messages=given["messages"],
        variables=given.get("chat_template_kwargs", {}),
        max_tokens=given.get("max_completion_tokens", given.get("max_tokens")),
        logprobs=given.get("top_logprobs", 0) if wanted else None,
    )


def parse_completion(raw: bytes, bounds: Bounds) -> CompletionBody:
    """Raises BodyError with every violation at once."""
    sent, fields = _sent(raw), completion_fields(bounds)
    given = checked(sent, fields)
    prompts, n = given["prompt"], given.get("n", 1)
    if given.get("best_of", n) > n:
        message = f"is {given['best_of']}, n is {n}: choosing among more answers than are sent is not supported"
        raise BodyError([Violation("best_of", "unsupported", message)])
    if len(prompts) * n > bounds.choices:
        message = f"asks for {len(prompts)} x {n} answers, this worker takes {bounds.choices} at once: send fewer"
        raise BodyError([Violation("prompt", f"max_count({bounds.choices})", message)])
    return CompletionBody(
        **_shared(given),
        passed_over=_passed_over(sent, fields),
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
