"""What a malformed file is, and what must be said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.malformed.layout import File


@dataclass(frozen=True)
class Case:
    """`says`: what the message holds, in any order; it names the file in any case.

    `at`: an offset that it names. `write` puts something at a path that is no file of bytes.
    """

    name: str
    content: bytes = b""
    says: tuple[str, ...] = ()
    at: int | None = None
    tokenizer: bool = False  # read as a vocabulary alone
    write: Callable[[Path], None] | None = None
    error: str = "GGUFError"

    def put(self, path: Path) -> None:
        if self.write is not None:
            self.write(path)
        else:
            path.write_bytes(self.content)


def of(name: str, file: File, *says: str, where: str = "", **more: object) -> Case:
    """A case from a file's parts. `where`: the part whose offset the message names (File.where)."""
    at = file.where()[where] if where else None
    return Case(name, file.bytes(), says, at, **more)  # type: ignore[arg-type]
