"""Opens malformed files in a process of its own and measures it: python -m tests.malformed.run FOLDER.

Writes a JSON object per case: the error's class and message, the seconds, and the most memory over what was before.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llorch
from llorch.errors import LlorchError
from llorch.machine import peak_memory, reset_peak_memory
from tests.malformed.case import Case
from tests.malformed.containers import containers
from tests.malformed.layout import tiny
from tests.malformed.models import models
from tests.malformed.vocabularies import vocabularies

NOBODY = 65534
MOST_MORE = 1 << 30  # address space over what the imports took: a larger allocation fails at once


def all_cases() -> list[Case]:
    return [*containers(), *models(), *vocabularies()]


def open_as_a_user(path: Path, tokenizer: bool) -> None:
    """The public way in."""
    if tokenizer:
        llorch.Tokenizer.from_gguf(path)
    else:
        llorch.load(path, provider="numpy-cpu", parallel=1).close()


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def measure(case: Case, path: Path) -> dict[str, Any]:
    case.put(path)
    gc.collect()
    reset_peak_memory()
    before, start = peak_memory() or 0, time.perf_counter()
    try:
        with unprivileged():
            open_as_a_user(path, case.tokenizer)
        error, message = "none", ""
    except LlorchError as found:
        error, message = type(found).__name__, str(found)
    except Exception as found:  # noqa: BLE001  what escapes is what the test is about
        error, message = f"untyped {type(found).__name__}", str(found)
    seconds = time.perf_counter() - start
    return {"error": error, "message": message, "seconds": seconds, "memory": (peak_memory() or 0) - before}


def main() -> None:
    folder = Path(sys.argv[1])
    path = folder / "valid.gguf"
    path.write_bytes(tiny().bytes())
    open_as_a_user(path, tokenizer=False)  # what is imported and started on first use is not a case's
    open_as_a_user(path, tokenizer=True)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MORE, used + MOST_MORE))
    for number, case in enumerate(all_cases()):
        print(json.dumps({"name": case.name, **measure(case, folder / f"{number}.gguf")}), flush=True)


if __name__ == "__main__":
    main()
