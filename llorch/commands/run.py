"""`llorch run`: one prompt, its text streamed to standard output; everything else goes to standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from llorch.commands._model import load_model
from llorch.settings import ModelSettings, StringList, parse

if TYPE_CHECKING:
    from llorch import LLM
    from llorch.core.requests import Event


class RunSettings(ModelSettings):
    """Generate text from a prompt, streamed to the terminal."""

    model_config = SettingsConfigDict(cli_shortcuts={"max-tokens": "n"})

    prompt: CliPositionalArg[str] = Field(
        description="text to continue; - reads standard input", examples=["'Once upon a time'"]
    )
    max_tokens: int = Field(128, ge=1, description="most tokens to generate")
    temperature: float = Field(1.0, ge=0, description="0 takes the most likely token each time")
    top_k: int = Field(0, ge=0, description="sample from the K most likely tokens, 0 from all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the most likely tokens that sum to this probability")
    min_p: float = Field(0.0, ge=0, le=1, description="drop tokens less likely than this share of the most likely")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: make recent tokens less likely")
    seed: int | None = Field(None, ge=0, description="seed of the random choices, drawn by default")
    stop: StringList = Field([], description="stop before this text; may be repeated")
    parallel: int = Field(1, ge=1, le=4096, description="sequences to keep room for")


def main(argv: Sequence[str]) -> int:
    settings = parse(RunSettings, argv, "llorch run")
    prompt = sys.stdin.read() if settings.prompt == "-" else settings.prompt
    with load_model(settings) as llm:
        return _print(_events(llm, prompt, settings))


def _events(llm: LLM, prompt: str, settings: RunSettings) -> Iterator[Event]:
    from llorch.core.requests import SamplingParams

    sampling = SamplingParams(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        seed=settings.seed,
    )
    return llm.stream(prompt, sampling, max_tokens=settings.max_tokens, stop=settings.stop)


def _print(events: Iterator[Event]) -> int:
    """Writes each piece at once; then how fast they came. Ctrl-C ends the text, not the figures."""
    from llorch.core.requests import Token

    start = first = time.perf_counter()
    tokens, tokens_first, status = 0, 0, 0
    try:
        for event in events:
            if isinstance(event, Token):
                if not tokens:
                    first, tokens_first = time.perf_counter(), event.tokens
                tokens += event.tokens
                print(event.text, end="", flush=True)
    except KeyboardInterrupt:
        status = 130
    end = time.perf_counter()
    if sys.stdout.isatty() or status:
        print(flush=True)
    rate = f", {(tokens - tokens_first) / (end - first):.1f} tokens/s" if tokens > tokens_first else ""
    interrupted = "interrupted: " if status else ""
    print(f"{interrupted}{tokens} tokens, the first after {first - start:.2f} s{rate}", file=sys.stderr)
    return status
