"""`llorch providers`: what is installed, what works here, what does not and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from llorch.commands._terminal import console
from llorch.settings import ReportSettings, parse

if TYPE_CHECKING:
    from llorch.providers.registry import ProviderStatus

_STYLES = {"ok": "green", "absent": "yellow", "broken": "red"}


class ProvidersSettings(ReportSettings):
    """List compute providers: what works here, what does not and why."""


def main(argv: Sequence[str]) -> int:
    settings = parse(ProvidersSettings, argv, "llorch providers")
    from llorch.providers import registry  # after parsing: --help and a mistake need no NumPy

    found = registry.status()
    if settings.as_json:
        print(json.dumps([dataclasses.asdict(status) for status in found], indent=2))
    else:
        console().print(_table(found))
    return 0


def _table(found: Sequence[ProviderStatus]) -> Table:
    table = Table(
        box=SIMPLE_HEAD, caption="`--provider auto` takes the highest priority that is ok", caption_justify="left"
    )
    for heading in ("provider", "state", "priority", "API", "distribution"):
        table.add_column(heading, no_wrap=True)
    table.add_column("devices, or what is wrong", overflow="fold")
    for status in found:
        table.add_row(
            status.name,
            Text(status.state, style=_STYLES[status.state]),
            "" if status.priority is None else str(status.priority),
            "" if status.api_version is None else str(status.api_version),
            "\n".join(map(" ".join, zip(status.distribution.split(", "), status.version.split(", "), strict=True))),
            Text("\n".join([*([status.summary] if status.summary else []), *_lines(status)])),
        )
    return table


def _lines(status: ProviderStatus) -> list[str]:
    return [f"{device.name}: {device.description}" for device in status.devices] + (
        [status.reason] if status.reason else []
    )
