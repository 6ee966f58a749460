"""One generation as a terminal shows it: streamed, timed, and stopped by Ctrl-C."""

from __future__ import annotations

import itertools
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from pydantic import Field

from llorch.settings import CommandSettings, StringList

if TYPE_CHECKING:
    from llorch.core.engine import Engine
    from llorch.core.requests import Event, Request, SamplingParams, StopReason


class SamplingSettings(CommandSettings):
    """What every command takes that generates text."""

    temperature: float = Field(1.0, ge=0, description="0 takes the most likely token each time")
    top_k: int = Field(0, ge=0, description="sample from the K most likely tokens, 0 from all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the most likely tokens that sum to this probability")
    min_p: float = Field(0.0, ge=0, le=1, description="drop tokens less likely than this share of the most likely")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: make recent tokens less likely")
    seed: int | None = Field(None, ge=0, description="seed of the random choices, drawn by default")
    stop: StringList = Field([], description="stop before this text; may be repeated")

    def sampling(self) -> SamplingParams:
        from llorch.core.requests import SamplingParams

        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


class Interrupt:
    """While it is entered, Ctrl-C only sets `pressed`: a step is not torn in the middle, where the engine would be left
    in pieces. A second one raises KeyboardInterrupt, for a step that does not end."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> Interrupt:
        self.pressed = False
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


@dataclass
class Answer:
    """What came of a request so far. Times are in seconds of time.perf_counter."""

    text: str = ""
    tokens: int = 0
    reason: StopReason | None = None  # None: it was interrupted
    start: float = 0.0
    first: float = 0.0  # when the first text came
    end: float = 0.0
    tokens_first: int = 0  # tokens of the first text

    @property
    def figures(self) -> str:
        """How many tokens, and how fast they came."""
        if not self.tokens:
            return "no tokens"
        timed = self.tokens - self.tokens_first
        rate = f", {timed / (self.end - self.first):.1f} tokens/s" if timed and self.end > self.first else ""
        count = "1 token" if self.tokens == 1 else f"{self.tokens} tokens"
        return f"{count}, the first after {self.first - self.start:.2f} s{rate}"


def generate(engine: Engine, request: Request, write: Callable[[str], None], interrupt: Interrupt) -> Answer:
    """Steps the engine until the request ends, or `interrupt` is pressed; `write` gets each piece of text.

    Raises what the engine refuses the request with, or fails it with.
    """
    events: deque[Event] = deque()
    answer = Answer(start=time.perf_counter())
    engine.submit(request, events.append)
    try:
        while True:
            if interrupt.pressed:
                engine.cancel(request.job_id)
            engine.step()
            while events:
                if _take(events.popleft(), answer, write):
                    answer.end = time.perf_counter()
                    return answer
    except BaseException:
        engine.cancel(request.job_id)  # the next step frees what it holds
        raise


def _take(event: Event, answer: Answer, write: Callable[[str], None]) -> bool:
    """One event into the answer; whether it was the last."""
    from llorch.core.requests import Ended, Failed, Token
    from llorch.errors import CancelledError

    match event:
        case Token():
            if not answer.tokens:
                answer.first, answer.tokens_first = time.perf_counter(), event.tokens
            answer.tokens += event.tokens
            answer.text += event.text
            write(event.text)
        case Ended():
            answer.reason = event.reason
            return True
        case Failed():
            if isinstance(event.error, CancelledError):
                return True
            raise event.error
    return False


def next_job_id() -> str:
    return f"terminal-{next(_numbers)}"


_numbers = itertools.count(1)
