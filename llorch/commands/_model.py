"""Loads the model of a command's settings."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from llorch.commands._terminal import console, loading, log_plainly
from llorch.demo import DEMO_NOTICE
from llorch.settings import ModelSettings

if TYPE_CHECKING:
    from llorch import LLM


def load_model(settings: ModelSettings, **changes: Any) -> LLM:
    """llorch.load with these settings, `changes` instead of some; progress and the start lines on standard error."""
    import llorch  # here, so that --help and a mistake need no NumPy

    log_plainly()
    with settings.explaining(), loading() as progress:
        llm = llorch.load(settings.model, **settings.load_options() | changes, progress=progress)
    if settings.is_demo:
        print(DEMO_NOTICE, file=sys.stderr)
    for line in llm.start_lines:
        console(sys.stderr).print(line, style="dim", soft_wrap=True)
    return llm
