"""`llorch compare`: one forward pass of a model on two providers, value by value, to the first that differs."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.box import SIMPLE_HEAD
from rich.table import Table

from llorch.commands._model import load_model
from llorch.commands._terminal import console, loading
from llorch.errors import SettingsError
from llorch.settings import ModelSettings, ReportSettings, parse

if TYPE_CHECKING:
    from llorch.commands._values import Run, Value


class CompareSettings(ModelSettings, ReportSettings):
    """Find the first value of a model that a provider computes differently from another; exit status 1 where one is."""

    model: CliPositionalArg[Path] = Field(
        description="GGUF file, or hf:OWNER/REPO[:FILE or QUANT] to download", examples=["model.gguf"]
    )
    against: str = Field("numpy-cpu", description="the provider that is taken to be right")
    prompt: str = Field("Once upon a time", description="text whose tokens go through the model, in one step")
    tokens: int | None = Field(None, ge=1, description="length of that step: the prompt is cut or repeated to it")
    limit: float | None = Field(
        None, gt=0, description="largest NMSE that counts as equal: 1e-9, or 5e-3 where a provider rounds activations"
    )
    cache_type: Literal["f32", "f16"] | None = Field("f32", description="KV cache type of both")
    parallel: int = Field(1, ge=1, le=4096, description="sequences to keep room for")


def main(argv: Sequence[str]) -> int:
    settings = parse(CompareSettings, argv, "llorch compare")
    tokens = _tokens(settings)
    run = _run(settings, tokens, provider=settings.provider)
    gc.collect()  # a bound graph holds itself: its memory is to be free before another model of the size comes
    first_only = dict.fromkeys(("device", "gpu_memory", "prefill_weights"))
    against = _run(settings, tokens, provider=settings.against, **first_only)
    from llorch.commands._values import compared

    values = list(compared(run, against, settings.limit))
    if settings.as_json:
        for value in values:
            print(json.dumps(value.as_json()))
    else:
        _show(values)
    return 0 if all(value.agrees for value in values) else 1


def _tokens(settings: CompareSettings) -> list[int]:
    """The ids of the step. Raises SettingsError for none, and for more than one step gives."""
    from llorch.core.llm import OUTPUT_ROWS
    from llorch.core.model_files import open_model
    from llorch.core.tokenizer import Tokenizer

    with loading() as progress:
        file = open_model(settings.model, progress)
    with file:
        ids = Tokenizer.from_gguf(file).encode(settings.prompt)
    if not ids:
        raise SettingsError(f"--prompt: expected text that has tokens, not {settings.prompt!r}")
    count = settings.tokens or len(ids)
    if count > OUTPUT_ROWS:
        raise SettingsError(f"{count} tokens are more than the {OUTPUT_ROWS} of one step: give --tokens {OUTPUT_ROWS}")
    return [ids[i % len(ids)] for i in range(count)]


def _run(settings: CompareSettings, tokens: Sequence[int], **changes: Any) -> Run:
    from llorch.commands._values import Run

    with load_model(settings, context=settings.context or max(len(tokens), 2), **changes) as llm:
        return Run.of(llm, tokens)


# ---- for people ----


def _show(values: Sequence[Value]) -> None:
    out, wrong, limit = console(), [value for value in values if not value.agrees], _short(values[0].limit)
    out.soft_wrap = True
    if not wrong:
        most = max(values, key=lambda value: value.nmse)
        out.print(
            f"all {len(values)} values agree within {limit}: the largest NMSE is {most.nmse:.1e}, of {most.label}"
        )
        return
    first = wrong[0]
    out.print(_table(wrong))
    what = "the worst element"
    if first.not_finite:
        what = f"{first.not_finite} of {math.prod(first.shape)} elements not finite, the first"
    out.print(
        f"the first that differs is {first.label} ({first.operation}): NMSE {first.nmse:.1e}, {what}, "
        f"{list(first.worst)}, is {first.found:.6g}, {first.against} has {first.expected:.6g}\n"
        f"{len(wrong)} of {len(values)} values do not agree within {limit}; those behind the first may follow from it"
    )


def _table(wrong: Sequence[Value]) -> Table:
    first, table = wrong[0], Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("label", "operation"):
        table.add_column(heading, no_wrap=True)
    for heading in ("NMSE", "not finite", "worst element", first.provider, first.against):
        table.add_column(heading, justify="right", no_wrap=True)
    for value in wrong:
        table.add_row(
            *(value.label, value.operation, f"{value.nmse:.1e}", str(value.not_finite or ""), str(list(value.worst))),
            *(f"{value.found:.6g}", f"{value.expected:.6g}"),
            style="bold" if value is first else None,
        )
    return table


def _short(limit: float) -> str:
    """1e-9, which Python would write 1e-09."""
    return f"{limit:g}".replace("e-0", "e-")
