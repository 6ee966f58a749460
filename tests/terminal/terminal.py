"""Commands on a pseudo-terminal, typed at and read as a user would, and through pipes."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path

from tests.support import shared

CTRL_C, CTRL_D, UP, TAB = "\x03", "\x04", "\x1b[A", "\t"
SECONDS = 30.0
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\r")


class Terminal:
    """A process whose input, output and errors are one terminal; a context manager that ends it."""

    def __init__(
        self, folder: Path, *command: str, env: Mapping[str, str] | None = None, columns: int = 80, lines: int = 24
    ) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
        for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "INPUTRC"):
            inherited.pop(name, None)
        self._terminal, child = os.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={
                **inherited,
                "TERM": "xterm-256color",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                **(env or {}),
            },
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=_take_terminal,  # so that Ctrl-C typed at it is a signal
        )
        os.close(child)
        self.raw = ""
        self._seen = 0  # of `shown`: what `expect` has passed

    @property
    def shown(self) -> str:
        """All that was written, without colours and cursor movements."""
        return _CONTROL.sub("", self.raw)

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def interrupt_prompt(self) -> None:
        """Ctrl-C while the prompt waits. Python's readline sees a signal only once it waits for a key, which it does a
        moment after the prompt is shown: one that comes in between is held until the next key."""
        time.sleep(0.5)
        self.type(CTRL_C)

    def expect(self, text: str) -> None:
        """Waits until the text is shown, after what was expected before."""
        deadline = time.monotonic() + SECONDS
        while (at := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < deadline, f"{text!r} was not shown; shown was {self.shown[self._seen :]!r}"
            assert self._read(0.1), f"ended before {text!r} was shown; shown was {self.shown[self._seen :]!r}"
        self._seen = at + len(text)

    def wait(self) -> int:
        """Its exit status."""
        deadline = time.monotonic() + SECONDS
        while self._read(0.1):
            assert time.monotonic() < deadline, f"it has not ended; shown was {self.shown[self._seen :]!r}"
        return self.process.wait(SECONDS)

    def _read(self, seconds: float) -> bool:
        """What there is within a time; False where the terminal was left."""
        if not select.select([self._terminal], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._terminal, 1 << 16)
        except OSError:  # Linux: nobody has the other end any more
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # tests that a script started in the background inherit that it is ignored


def llorch(folder: Path, *arguments: str, env: Mapping[str, str] | None = None, columns: int = 80) -> Terminal:
    return Terminal(folder, sys.executable, "-m", "llorch", *arguments, env=env, columns=columns)


def screen(raw: str) -> list[str]:
    """The lines that a terminal shows of what was written to it, by \\b, \\n, \\t and erasing to the end of a line."""
    lines, column = [""], 0
    for c in _CONTROL.sub("", raw.replace("\x1b[K", "\x00")):
        if c == "\n":
            lines.append("")
            column = 0
        elif c == "\b":
            column -= 1
        elif c == "\x00":
            lines[-1] = lines[-1][:column]
        else:
            written = " " * (8 - column % 8) if c == "\t" else c
            lines[-1] = lines[-1][:column] + written
            column += len(written)
    return lines


def finished(*arguments: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """The same through pipes, once it has ended."""
    command = [sys.executable, "-m", "llorch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **kwargs)  # type: ignore[call-overload,no-any-return]


def model() -> str:
    """A small trained model without a chat template."""
    return str(shared("models", "stories260K.gguf"))
