"""`llorch serve`."""

from __future__ import annotations

from collections.abc import Sequence

from llorch.commands._terminal import animated, loading
from llorch.http.settings import ServeSettings
from llorch.settings import parse


def main(argv: Sequence[str]) -> int:
    settings = parse(ServeSettings, argv, "llorch serve")
    from llorch.http.server import serve  # after parsing: --help and a mistake need no NumPy

    serve(settings, loading if animated() else None)
    return 0
