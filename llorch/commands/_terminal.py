"""What the commands share to write to a terminal, a pipe or a file."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.cells import cell_len, get_character_cell_size
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

PIPE_WIDTH = 160  # rich assumes 80 columns where there is no terminal, and would fold what a program may grep


def console(file: TextIO | None = None) -> Console:
    """A console on `file`, standard output by default. Colours follow NO_COLOR, FORCE_COLOR, TERM and what it is."""
    file = file or sys.stdout
    found = Console(file=file, highlight=False, markup=False, emoji=False)
    if not file.isatty():
        found.width = max(found.width, PIPE_WIDTH)
    return found


def printable(text: str) -> str:
    """The text with control characters spelt out, line ends and tabs but for: they could take the terminal over."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def writer() -> Callable[[str], None]:
    """What writes one text of a model to standard output, piece by piece: as it is into a pipe, fit for a terminal."""
    if not sys.stdout.isatty():
        return lambda text: print(text, end="", flush=True)
    if console().is_dumb_terminal:
        return lambda text: print(printable(text), end="", flush=True)
    wrapped = WordWrap(lambda: os.get_terminal_size(sys.stdout.fileno()).columns)
    return lambda text: print(wrapped.push(printable(text)), end="", flush=True)


class WordWrap:
    """Breaks a text between words while it is streamed: a word that reaches the edge moves to the next line."""

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._column = 0
        self._word = ""  # what of the current word stands on this line

    def push(self, text: str) -> str:
        """What to write for the next piece of the text, which begins in the first column."""
        last = max(self._width() - 1, 1)  # a terminal treats the last column differently, each kind in its way
        return "".join(self._character(c, last) for c in text)

    def _character(self, character: str, last: int) -> str:
        if character == "\n":
            self._column, self._word = 0, ""
            return character
        width = 8 - self._column % 8 if character == "\t" else get_character_cell_size(character)
        before = ""
        if self._column + width > last:
            if character.isspace():
                self._column, self._word = 0, ""
                return "\n"
            before = self._next_line()
        self._column += width
        self._word = "" if character.isspace() else self._word + character
        return before + character

    def _next_line(self) -> str:
        columns = cell_len(self._word)
        if columns >= self._column:  # it is longer than a line
            self._column, self._word = 0, ""
            return "\n"
        self._column = columns
        return "\b" * columns + "\x1b[K\n" + self._word


def animated() -> Console | None:
    """Standard error where things may move on it: FORCE_COLOR makes a pipe colourful, not a terminal."""
    terminal = console(sys.stderr)
    return terminal if terminal.is_interactive and sys.stderr.isatty() else None


def log_plainly() -> None:
    """Shows on standard error, as it is, what llorch and its providers log: that a first start compiles, say."""
    logging.getLogger("llorch").setLevel(logging.INFO)
    if logging.lastResort is not None:  # unlike any other handler it finds the bar of `loading` before it
        logging.lastResort.setLevel(logging.INFO)


@contextmanager
def loading() -> Iterator[Callable[[float, str], None]]:
    """Shows a bar on standard error while a model loads; what it yields is `progress` of llorch.load.

    Silent where standard error is no terminal, or a dumb one.
    """
    terminal = animated()
    columns = [BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}")]
    with Progress(*columns, console=terminal, transient=True, disable=terminal is None) as bar:
        task = bar.add_task("reading the model file", total=1.0)

        def show(fraction: float, text: str) -> None:
            bar.update(task, completed=fraction, description=text)

        yield show


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Shows on standard error what is being done; what it yields changes the text. Silent where `loading` is."""
    terminal = animated()
    if terminal is None:
        yield lambda _text: None
        return
    with terminal.status(text) as spinner:
        yield lambda text: spinner.update(text)
