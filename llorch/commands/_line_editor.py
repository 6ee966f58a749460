"""Reads what a user types: a line edited with readline, or several."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llorch.errors import InvalidRequestError

PROMPT, MORE = "> ", ". "
BLOCK = '"""'

Complete = Callable[[str], Sequence[str]]  # the line up to the cursor -> what its last word may become


@dataclass(frozen=True)
class Typed:
    text: str
    literal: bool  # from a block: a message, whatever it begins with


class LineEditor:
    """Standard input, message by message. Lines are edited where input and output are terminals."""

    def __init__(self, complete: Complete) -> None:
        self.interactive = sys.stdin.isatty()
        self._editing = self.interactive and sys.stdout.isatty()
        if self._editing:
            _prepare_readline(complete)
        elif not self.interactive:
            sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # the tokenizer refuses them by name

    def read(self) -> Typed:
        """The next message: a line, lines joined by a backslash at their ends, or a block within triple quotes.

        Raises EOFError at the end, and InvalidRequestError where it comes within a block.
        """
        line = self._line(PROMPT)
        if line.lstrip().startswith(BLOCK):
            return Typed(self._block(line.lstrip().removeprefix(BLOCK)), literal=True)
        lines = []
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = self._line(MORE)
        return Typed("\n".join([*lines, line]).strip(), literal=False)

    def _block(self, line: str) -> str:
        lines = []
        while not line.rstrip().endswith(BLOCK):
            lines.append(line)
            try:
                line = self._line(MORE)
            except EOFError:
                raise InvalidRequestError(f"the text behind {BLOCK} has no end: close it with {BLOCK}") from None
        return "\n".join([*lines, line.rstrip().removesuffix(BLOCK)]).strip()

    def _line(self, prompt: str) -> str:
        if self._editing:
            return input(prompt)
        if self.interactive:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")


def _prepare_readline(complete: Complete) -> None:
    try:
        import readline
    except ImportError:  # Windows has none: its console edits lines itself
        return
    found: list[str] = []

    def completer(word: str, state: int) -> str | None:
        if state == 0:
            found[:] = complete(readline.get_line_buffer()[: readline.get_endidx()])
        return found[state] if state < len(found) else None

    readline.set_completer(completer)
    readline.set_completer_delims(" ")
    if "libedit" in (readline.__doc__ or ""):  # macOS
        readline.parse_and_bind("bind ^I rl_complete")
        return
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off; lines pasted are one message
