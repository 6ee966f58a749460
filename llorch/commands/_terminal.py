"""What the commands share to write to a terminal, a pipe or a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

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
    """What writes a model's text to standard output at once: as it is into a pipe, `printable` on a terminal."""
    shown = printable if sys.stdout.isatty() else str
    return lambda text: print(shown(text), end="", flush=True)


def _animated() -> Console | None:
    """Standard error where things may move on it: FORCE_COLOR makes a pipe colourful, not a terminal."""
    terminal = console(sys.stderr)
    return terminal if terminal.is_interactive and sys.stderr.isatty() else None


@contextmanager
def loading() -> Iterator[Callable[[float, str], None]]:
    """Shows a bar on standard error while a model loads; what it yields is `progress` of llorch.load.

    Silent where standard error is no terminal, or a dumb one.
    """
    terminal = _animated()
    columns = [BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}")]
    with Progress(*columns, console=terminal, transient=True, disable=terminal is None) as bar:
        task = bar.add_task("reading the model file", total=1.0)

        def show(fraction: float, text: str) -> None:
            bar.update(task, completed=fraction, description=text)

        yield show


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Shows on standard error what is being done; what it yields changes the text. Silent where `loading` is."""
    terminal = _animated()
    if terminal is None:
        yield lambda _text: None
        return
    with terminal.status(text) as spinner:
        yield lambda text: spinner.update(text)
