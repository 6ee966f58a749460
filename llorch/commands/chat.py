"""`llorch chat`: a conversation in the terminal, through the model's chat template.

Answers go to standard output, everything else to standard error. Into a pipe they go plainly, one for each line (or
block) of standard input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from llorch.commands._chat_commands import ALIASES, COMMANDS, complete
from llorch.commands._conversation import Conversation
from llorch.commands._generation import Answer, Interrupt, SamplingSettings, generate, next_job_id
from llorch.commands._line_editor import LineEditor, Typed
from llorch.commands._model import load_model
from llorch.commands._terminal import console, writer
from llorch.errors import LlorchError, SettingsError
from llorch.setting_sources import suggest
from llorch.settings import ChatModelSettings, parse

if TYPE_CHECKING:
    from llorch import LLM

FULL_SOON = 0.8  # share of the context from which it is said that it fills


class ChatSettings(SamplingSettings, ChatModelSettings):
    """Chat with a model in the terminal."""

    system: str | None = Field(None, description="system text: how the model should answer")
    temperature: float = Field(0.7, ge=0, description="0 takes the most likely token each time")
    max_tokens: int | None = Field(
        None, ge=1, description="most tokens of an answer, what the context leaves by default"
    )
    parallel: int = Field(1, ge=1, le=4096, description="sequences to keep room for")


def main(argv: Sequence[str]) -> int:
    settings = parse(ChatSettings, argv, "llorch chat")
    with load_model(settings) as llm:
        if (problem := llm.chat.problem()) is not None:
            raise SettingsError(_no_chat(llm, problem))
        return ChatSession(llm, settings).loop()


def _no_chat(llm: LLM, problem: str) -> str:
    reason = problem if llm.chat.available or llm.chat.names else f"{llm.config.name} has no chat template"
    return f"{reason}\ncontinue a text with `llorch run TEXT --model ...`, or give a template with --chat-template FILE"


class ChatSession:
    """A conversation, its settings, and the terminal it is had in."""

    def __init__(self, llm: LLM, settings: ChatSettings) -> None:
        self.llm, self.settings = llm, settings
        self.conversation = Conversation(llm, settings.system)
        self.over = False
        self._engine = llm.engine()
        self._editor = LineEditor(complete)
        self._console = console(sys.stderr)
        self._failed = False
        self._stopped = False  # Ctrl-C was the last thing that was pressed
        self._warned = False  # that the context fills

    def loop(self) -> int:
        """Until the input ends, /quit, or Ctrl-C twice; the command's exit status."""
        if self._editor.interactive:
            self.say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        while not self.over:
            try:
                typed = self._editor.read()
                self._stopped = False
                self._handle(typed)
            except EOFError:
                if self._editor.interactive:
                    print(file=sys.stderr)
                break
            except KeyboardInterrupt:
                if self._stopped or not self._editor.interactive:
                    return 130
                self._stop("\n")
            except LlorchError as error:
                self._report(error)
            if self._stopped and not self._editor.interactive:
                return 130
        return 1 if self._failed and not self._editor.interactive else 0

    def say(self, text: str, style: str = "dim") -> None:
        """Something that is no answer."""
        self._console.print(text, style=style, soft_wrap=True)

    def ask(self, text: str) -> None:
        """Sends a message and streams the answer. Raises LlorchError; the conversation is then as it was."""
        from llorch.core.requests import Request

        with Interrupt() as interrupt:
            prompt = self.conversation.prompt(text)
            request = Request(
                job_id=next_job_id(),
                prompt=prompt,
                max_tokens=self.settings.max_tokens or self.llm.context,
                sampling=self.settings.sampling(),
                stop=tuple(self.settings.stop),
            )
            self.conversation.unanswered = text
            try:
                answer = generate(self._engine, request, writer(), interrupt)
            except KeyboardInterrupt:
                self._stopped = True  # the second one, of a step that does not end
                raise
            print(flush=True)
        self._keep(text, answer, len(prompt))

    def retry(self) -> None:
        """Answers the last message again. What it was answered before is back where nothing comes of it."""
        text, removed = self.conversation.take_back()
        kept = len(self.conversation.turns)
        try:
            self.ask(text)
        finally:
            if removed and len(self.conversation.turns) == kept:
                self.conversation.turns += removed
                self.conversation.unanswered = None

    def _handle(self, typed: Typed) -> None:
        if not typed.text:
            return
        if typed.literal or not typed.text.startswith("/"):
            self.ask(typed.text)
            return
        name, _, argument = typed.text.partition(" ")
        name = ALIASES.get(name, name)
        if name not in COMMANDS:
            hint = suggest(name, list(COMMANDS)) or "; /help lists them"
            raise SettingsError(f'unknown command {name}{hint}; a message that begins with / goes between """')
        COMMANDS[name].run(self, argument.strip())

    def _keep(self, text: str, answer: Answer, prompt_tokens: int) -> None:
        """The answer into the conversation; what there is to say about it."""
        used = prompt_tokens + answer.tokens
        stopped = answer.reason is None
        if answer.text or not stopped:
            self.conversation.add(text, answer.text, used)
        if self._editor.interactive:
            self.say(f"{answer.figures}; context {self.usage(used)}")
        if stopped:
            self._stop("" if answer.text else "nothing was said: /retry asks again; ")
            return
        self._warn(answer, used)

    def usage(self, used: int) -> str:
        return f"{used} of {self.llm.context} tokens"

    def _warn(self, answer: Answer, used: int) -> None:
        from llorch.core.requests import StopReason

        context = self.llm.context
        if used >= context:
            self.say(f"the answer was cut, the context is full ({self.usage(used)}): /reset starts anew", "yellow")
        elif answer.reason is StopReason.MAX_TOKENS:
            self.say(f"the answer was cut at max_tokens {self.settings.max_tokens}: /set max_tokens N", "yellow")
        if (soon := FULL_SOON * context <= used < context) and not self._warned:
            self.say(f"the context is {used / context:.0%} full ({self.usage(used)}): /reset starts anew", "yellow")
        self._warned = soon

    def _stop(self, what: str) -> None:
        self._stopped = True
        if self._editor.interactive:
            self.say(f"{what}Ctrl-C again or Ctrl-D leaves")

    def _report(self, error: LlorchError) -> None:
        self._failed = True
        self.say(f"error: {error}", "red")
