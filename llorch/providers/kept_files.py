"""What a provider keeps from one start to the next: files that took long to compile."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)


class KeptFiles:
    """Files below a folder of the user's cache. Where none can be written there, a provider works without.

    They are written whole under a name of their own and then renamed: first starts of several processes may coincide.
    """

    def __init__(self, folder: Path, cost: str) -> None:
        """`cost`: what each start without the folder is spent on, for a warning: "compiles for half a minute"."""
        self.folder, self._cost, self._told = folder, cost, False

    @functools.cached_property
    def problem(self) -> str | None:
        """Why nothing can be kept; None where it can."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                return None
        except OSError as error:
            return error.strerror or str(error)

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none that can be read."""
        try:
            return (self.folder / name).read_bytes()
        except OSError:  # not there; or as good as that, where others own it
            return None

    def write(self, name: str, content: bytes) -> None:
        """Keeps a file, where that is possible."""
        if not self._can_keep():
            return
        temporary = self.folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # a cache may be cleared at any time
            temporary.write_bytes(content)
            temporary.replace(self.folder / name)
        except OSError as error:  # the disk is full
            self.problem = error.strerror or str(error)
            self._can_keep()

    def get(self, name: str, make: Callable[[], bytes], notice: str) -> bytes:
        """A file's content, made first where it is not there. What is made takes a while: `notice` is logged before."""
        content = self.read(name)
        if content is None:
            logger.info("%s (%s)", notice, f"once, kept in {self.folder}" if self._can_keep() else "at each start")
            content = make()
            self.write(name, content)
        return content

    def _can_keep(self) -> bool:
        """Where it cannot, this is said once."""
        if self.problem is not None and not self._told:
            self._told = True
            text = "nothing can be kept in %s (%s): each start %s; set XDG_CACHE_HOME to a folder that can be written"
            logger.warning(text, self.folder, self.problem, self._cost)
        return self.problem is None
