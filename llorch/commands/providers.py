"""`llorch providers`: what is installed, what works here, what does not and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from llorch.commands._terminal import console, status
from llorch.settings import ReportSettings, parse

if TYPE_CHECKING:
    from llorch.providers.registry import ProviderStatus

_STYLES = {"ok": "green", "absent": "yellow", "broken": "red"}


class ProvidersSettings(ReportSettings):
    """List compute providers: what works here, what does not and why."""


def main(argv: Sequence[str]) -> int:
    settings = parse(ProvidersSettings, argv, "llorch providers")
    from llorch.providers import registry  # after parsing: --help and a mistake need no NumPy

    with status("looking for devices"):
        found = registry.status()
    if settings.as_json:
        print(json.dumps([dataclasses.asdict(provider) for provider in found], indent=2))
    else:
        out = console()
        out.print(_table(found))
        out.print("`--provider auto` takes the highest priority that is ok", style="dim")
    return 0


def _table(found: Sequence[ProviderStatus]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, leading=1)
    for heading in ("provider", "state", "priority"):
        table.add_column(heading, no_wrap=True)
    table.add_column("devices, or what is wrong", overflow="fold")
    for provider in found:
        table.add_row(
            Text(provider.name, style="bold"),
            Text(provider.state, style=_STYLES[provider.state]),
            "" if provider.priority is None else str(provider.priority),
            _details(provider),
        )
    return table


def _details(provider: ProviderStatus) -> Text:
    """What it is, its devices or what is wrong, and where it comes from: one below the other, for narrow terminals."""
    lines = [provider.summary] if provider.summary else []
    lines += [f"{device.name}: {device.description}" for device in provider.devices]
    lines += [provider.reason] if provider.reason else []
    names, versions = provider.distribution.split(", "), provider.version.split(", ")
    origin = ", ".join(map(" ".join, zip(names, versions, strict=True)))
    version = "" if provider.api_version is None else f", API {provider.api_version}"
    return Text("\n".join(lines)).append(f"\n{origin}{version}", style="dim")
