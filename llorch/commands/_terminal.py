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
    """A console on `file`, standard output by default. Colours follow NO_COLOR and what the file is."""
    file = file or sys.stdout
    found = Console(file=file, highlight=False, markup=False, emoji=False)
    if not found.is_terminal:
        found.width = max(found.width, PIPE_WIDTH)
    return found


@contextmanager
def loading() -> Iterator[Callable[[float, str], None]]:
    """Shows a bar on standard error while a model loads; what it yields is `progress` of llorch.load.

    Silent where standard error is no terminal.
    """
    terminal = console(sys.stderr)
    columns = [BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}")]
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("reading the model file", total=1.0)

        def show(fraction: float, text: str) -> None:
            bar.update(task, completed=fraction, description=text)

        yield show


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Shows on standard error what is being done; what it yields changes the text. Silent where that is no terminal."""
    terminal = console(sys.stderr)
    if not terminal.is_terminal:
        yield lambda _text: None
        return
    with terminal.status(text) as spinner:
        yield lambda text: spinner.update(text)
