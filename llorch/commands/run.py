"""`llorch run`: one prompt, its text streamed to standard output; everything else goes to standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from llorch.commands._generation import Answer, Interrupt, SamplingSettings, generate, next_job_id
from llorch.commands._model import load_model
from llorch.commands._terminal import writer
from llorch.settings import ModelSettings, parse

if TYPE_CHECKING:
    from llorch import LLM


class RunSettings(SamplingSettings, ModelSettings):
    """Generate text from a prompt, streamed to the terminal."""

    model_config = SettingsConfigDict(cli_shortcuts={"max-tokens": "n"})

    prompt: CliPositionalArg[str] = Field(
        description="text to continue; - reads standard input", examples=["'Once upon a time'"]
    )
    max_tokens: int = Field(128, ge=1, description="most tokens to generate")
    parallel: int = Field(1, ge=1, le=4096, description="sequences to keep room for")


def main(argv: Sequence[str]) -> int:
    settings = parse(RunSettings, argv, "llorch run")
    prompt = sys.stdin.read() if settings.prompt == "-" else settings.prompt
    with load_model(settings) as llm:
        answer = _generate(llm, prompt, settings)
    interrupted = answer.reason is None
    if sys.stdout.isatty() or interrupted:
        print(flush=True)
    print(f"{'interrupted: ' if interrupted else ''}{answer.figures}", file=sys.stderr)
    return 130 if interrupted else 0


def _generate(llm: LLM, prompt: str, settings: RunSettings) -> Answer:
    from llorch.core.requests import Request

    request = Request(
        job_id=next_job_id(),
        prompt=tuple(llm.tokenizer.encode(prompt)),
        max_tokens=settings.max_tokens,
        sampling=settings.sampling(),
        stop=tuple(settings.stop),
    )
    with Interrupt() as interrupt:
        return generate(llm.engine(), request, writer(), interrupt)
