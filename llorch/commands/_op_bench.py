"""`llorch bench --ops`: times a device's operations one by one, as a plan calls them.

Beside each stands the least time that the device's own rates allow: the bytes that the operation has to move over the
bandwidth, or its arithmetic over the float rate, whichever takes longer (the roofline model of Williams, Waterman and
Patterson, 2009). Both rates are measured on the device through its own operations, so that a provider is compared with
what it has shown there, not with a data sheet.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.box import SIMPLE_HEAD
from rich.table import Table

from llorch.commands._terminal import console, log_plainly, status
from llorch.errors import SettingsError
from llorch.setting_sources import suggest
from llorch.settings import ReportSettings, StringList, parse

if TYPE_CHECKING:
    from llorch.commands._op_cases import Shapes
    from llorch.commands._op_timing import Timing
    from llorch.providers.device import Device, Provider

COMMON_TYPES = ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "F16", "F32")


class OpBenchSettings(ReportSettings):
    """Time each operation of a compute provider against the limits of its device."""

    model_config = SettingsConfigDict(cli_shortcuts={"n-prompt": "p", "repetitions": "r"})

    ops: bool = Field(True, description="time operations instead of a model")
    provider: str = Field("auto", description="compute providers, separated by commas")
    device: str | None = Field(None, description="one of the provider's devices, its best by default")
    threads: int | None = Field(None, ge=1, description="CPU threads, the provider's choice by default")
    only: str = Field("", description="operations to time, separated by commas, all by default")
    weight_types: StringList = Field(
        [], description="weight types of the products, by default the common ones it takes"
    )
    dim: int = Field(2048, ge=256, description="width of the model, in blocks of 256")
    ffn: int = Field(5632, ge=256, description="width of the feed-forward layer, in blocks of 256")
    heads: int = Field(32, ge=1, description="query heads; they divide the width")
    kv_heads: int = Field(4, ge=1, description="key heads; they divide the query heads")
    vocab: int = Field(32000, ge=1, description="tokens of the vocabulary")
    context: int = Field(1024, ge=2, description="tokens that a decoded one attends to")
    n_prompt: int = Field(256, ge=2, description="tokens of a prefill")
    repetitions: int = Field(5, ge=1, description="samples of each time")

    def shapes(self) -> Shapes:
        """Raises SettingsError for widths and heads that do not divide."""
        for option, width in (("--dim", self.dim), ("--ffn", self.ffn)):
            if width % 256:
                raise SettingsError(
                    f"{option}: expected a multiple of 256, the block of many weight types, not {width}"
                )
        if self.dim % (2 * self.heads) or self.heads % self.kv_heads:
            raise SettingsError(
                f"{self.heads} heads and {self.kv_heads} key heads of a width of {self.dim}: the width must be a "
                "multiple of twice the heads, and the heads of the key heads"
            )
        from llorch.commands._op_cases import Shapes

        return Shapes(
            dim=self.dim,
            ffn=self.ffn,
            heads=self.heads,
            kv_heads=self.kv_heads,
            vocab=self.vocab,
            context=self.context,
            prompt=self.n_prompt,
        )


def main(argv: Sequence[str]) -> int:
    settings = parse(OpBenchSettings, argv, "llorch bench --ops")
    shapes = settings.shapes()
    providers = _names(settings.provider)
    if not providers:
        raise SettingsError(f"--provider: expected names separated by commas, not {settings.provider!r}")
    only = _operations(_names(settings.only))
    from llorch.core.opening import open_device  # after parsing: --help and a mistake need no NumPy
    from llorch.providers import registry
    from llorch.providers.device import DeviceOptions

    log_plainly()
    for name in providers:
        provider, _ = registry.choose(name)
        device = open_device(provider, settings.device, DeviceOptions(threads=settings.threads))
        try:
            found = []
            for timing in _measure(provider, device, shapes, settings, only):
                found.append(timing)
                if settings.as_json:
                    print(json.dumps(dataclasses.asdict(timing)), flush=True)
        finally:
            device.close()
        if not settings.as_json and found:
            _show(found)
        if not found:
            raise SettingsError(f"--only: provider {name} does not offer {settings.only}, which the host does for it")
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _operations(wanted: Sequence[str]) -> Sequence[str]:
    """The operations to time, all where none is named. Raises SettingsError for one that there is not."""
    from llorch.providers.spec import OPTIONAL, REQUIRED

    for name in wanted:
        if name not in REQUIRED + OPTIONAL:
            hint = suggest(name, REQUIRED + OPTIONAL)
            raise SettingsError(f"--only: no operation {name!r}{hint}; there are {', '.join(REQUIRED + OPTIONAL)}")
    return wanted or REQUIRED + OPTIONAL


def _measure(
    provider: Provider, device: Device, shapes: Shapes, settings: OpBenchSettings, only: Sequence[str]
) -> Iterator[Timing]:
    from llorch.commands._op_timing import OpBench

    types = _types(settings.weight_types, device, provider.name)
    bench = OpBench(provider, device, shapes, settings.repetitions)
    with status(f"{provider.name}: measuring the device") as say:
        rates = bench.rates()
        for phase, tokens in (("decode", 1), ("prefill", shapes.prompt)):
            for case in bench.cases.every(tokens, types, only):
                say(f"{provider.name}: {phase}, {case.operation}")
                yield bench.timing(case, phase, tokens, rates)


def _types(wanted: Sequence[str], device: Device, name: str) -> list[str]:
    """The weight types to time. Raises SettingsError for one that the device does not take."""
    taken = device.weight_types["matmul"]
    for kind in wanted:
        if kind not in taken:
            known = ", ".join(sorted(taken))
            raise SettingsError(f"--weight-types: provider {name} does not take {kind} for products; it takes {known}")
    return list(wanted) or [kind for kind in COMMON_TYPES if kind in taken]


# ---- for people ----


def _show(found: Sequence[Timing]) -> None:
    first, out = found[0], console()
    table = Table(box=SIMPLE_HEAD)
    for heading in ("", "operation", "by", "weights", "shape"):
        table.add_column(heading, no_wrap=True)
    for heading in ("µs", "±", "GB/s", "GFLOP/s", "limit µs", "of limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, t in enumerate(found):
        phase = f"{t.phase}, {t.tokens} token{'s' * (t.tokens > 1)}"
        table.add_row(
            phase if i == 0 or found[i - 1].phase != t.phase else "",
            *(t.operation, t.by, t.weight_type or "", t.shape),
            *(_micro(t.seconds), _micro(t.stdev), f"{t.gb_s:.1f}"),
            *(f"{t.gflop_s:.1f}" if t.flops else "", _micro(t.limit_seconds)),
            "" if t.share_of_limit is None else f"{t.share_of_limit:.0%}",
            end_section=i + 1 < len(found) and found[i + 1].phase != t.phase,
        )
    out.print(
        f"{first.provider} on {first.device}: memory {first.bandwidth_gb_s:.1f} GB/s (add {first.copy_gb_s:.1f}, "
        f"matrix-vector product {first.matvec_gb_s:.1f}), float32 products {first.float_gflop_s:.1f} GFLOP/s"
    )
    out.print(table)
    out.print("no share of the limit: the operation fits the caches, where memory's speed says nothing")


def _micro(seconds: float) -> str:
    """Microseconds, to three digits below a thousand."""
    value = seconds * 1e6
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
