"""`llorch inspect`: what a GGUF file holds and needs, from its header alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llorch.commands._memory import Need, needs, rows_of, size
from llorch.commands._terminal import console, loading, log_plainly
from llorch.errors import ModelError
from llorch.settings import ReportSettings, parse

if TYPE_CHECKING:
    from llorch.core.config import ModelConfig
    from llorch.core.gguf import GGUFFile

SHORTEST_CONTEXT = 512


class InspectSettings(ReportSettings):
    """Show what is in a GGUF file and how much memory it needs. Weights are not read."""

    model: CliPositionalArg[Path] = Field(
        description="GGUF file, or hf:OWNER/REPO[:FILE or QUANT] to download", examples=["model.gguf"]
    )
    context: int | None = Field(
        None, ge=2, description="tokens of a sequence to need memory for, the model's own limit"
    )
    parallel: int = Field(8, ge=1, le=4096, description="sequences to need memory for")
    cache_type: Literal["f32", "f16"] | None = Field(None, description="KV cache type, each provider's by default")
    chunk: int = Field(512, ge=1, description="most prompt tokens of one step")


def main(argv: Sequence[str]) -> int:
    settings = parse(InspectSettings, argv, "llorch inspect")
    from llorch.core.model_files import open_model

    log_plainly()
    with loading() as progress:
        file = open_model(settings.model, progress)
    with file:
        report = _report(file, settings)
    if settings.as_json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0


def _report(file: GGUFFile, settings: InspectSettings) -> dict[str, Any]:
    """What --json prints. `problems` says why llorch would not serve the file; the rest is told all the same."""
    from llorch.core.config import ModelConfig
    from llorch.core.tokenizer import Tokenizer

    problems: list[str] = []
    config: ModelConfig | None = None
    try:
        config = ModelConfig.from_gguf(file)
    except ModelError as error:
        problems.append(str(error))
    try:
        tokenizer: Tokenizer | None = Tokenizer.from_gguf(file)
    except ModelError as error:
        problems.append(str(error))
        tokenizer = None
    if not file.tensors:
        problems.append(f"{file.path}: the file holds no tensors, only a vocabulary")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    return {
        "file": str(file.path),
        "bytes": file.nbytes,
        "gguf_version": file.version,
        "name": _text(file, "general.name"),
        "architecture": _text(file, "general.architecture"),
        "hyperparameters": dataclasses.asdict(config) if config else None,
        "tensors": _tensors(file),
        "tokenizer": {
            "model": _text(file, "tokenizer.ggml.model"),
            "kind": tokenizer.kind if tokenizer else None,
            "pre": tokenizer.pre if tokenizer else _text(file, "tokenizer.ggml.pre"),
            "vocab_size": len(tokens) if isinstance(tokens, list) else 0,
        },
        "memory": _memory(file, config, settings if not problems else None),
        "problems": problems,
    }


def _text(file: GGUFFile, key: str) -> str | None:
    """A string of the metadata, fit for a terminal whatever the file holds."""
    value = file.metadata.get(key)
    if not isinstance(value, str):
        return None
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in value)


def _tensors(file: GGUFFile) -> dict[str, Any]:
    by_type: dict[str, dict[str, Any]] = {}
    for tensor in file.tensors.values():
        row = by_type.setdefault(tensor.type, {"type": tensor.type, "count": 0, "parameters": 0, "bytes": 0})
        row["count"] += 1
        row["parameters"] += prod(tensor.shape)
        row["bytes"] += tensor.nbytes
    rows = sorted(by_type.values(), key=lambda row: -row["bytes"])
    totals = {key: sum(row[key] for row in rows) for key in ("count", "parameters", "bytes")}
    return totals | {"by_type": rows}


def _memory(file: GGUFFile, config: ModelConfig | None, settings: InspectSettings | None) -> dict[str, Any]:
    """Bytes of the weights, in the file's types and as float32, and of one sequence's KV cache by context length; and
    what each provider needs for `settings`, where the file can be served.
    """
    from llorch.providers import CacheSpec

    weights = sum(tensor.nbytes for tensor in file.tensors.values())
    expanded = sum(4 * prod(tensor.shape) for tensor in file.tensors.values())
    cache: list[dict[str, int]] = []
    if config is not None:
        heads = {"layers": config.n_layers, "kv_heads": config.n_kv_heads, "head_dim": config.head_dim}
        for context in _contexts(config.context_length):
            sizes = {t: CacheSpec(**heads, block_size=1, blocks=context, dtype=t).nbytes for t in ("f32", "f16")}
            cache.append({"context": context} | sizes)
    found = {"weights": weights, "weights_f32": expanded, "kv_cache": cache}
    if config is None or settings is None:
        return found | {"context": None, "parallel": None, "providers": []}
    context, parallel = settings.context or config.context_length, settings.parallel
    needed = needs(file, config, settings.context, parallel, settings.chunk, settings.cache_type)
    providers = [dataclasses.asdict(need) for need in needed]
    return found | {"context": context, "parallel": parallel, "providers": providers}


def _contexts(longest: int) -> list[int]:
    """Powers of two up to the model's own context, and that."""
    return [*(c for c in (SHORTEST_CONTEXT << i for i in range(32)) if c < longest), longest]


# ---- for people ----


def _show(report: dict[str, Any]) -> None:
    out, tensors, memory = console(), report["tensors"], report["memory"]
    out.soft_wrap = True
    out.print(f"{report['name'] or Path(report['file']).stem}: {report['architecture']}, {report['file']}")
    out.print(f"{size(report['bytes'])}, GGUF version {report['gguf_version']}")
    for problem in report["problems"]:
        out.print(f"llorch cannot serve it: {problem}", style="yellow")
    if report["hyperparameters"]:
        table = _table("hyperparameter", "value")
        flat = report["hyperparameters"] | {
            f"rope_{k}": v for k, v in report["hyperparameters"]["rope_scaling"].items()
        }
        for name, value in flat.items():
            if name not in ("name", "architecture", "rope_scaling"):
                table.add_row(name, f"{value:g}" if isinstance(value, float) else str(value))
        out.print(table)
    if tensors["count"]:
        table = _table("tensor type", "tensors", "parameters", "size")
        for row in tensors["by_type"]:
            table.add_row(row["type"], str(row["count"]), f"{row['parameters']:,}", size(row["bytes"]))
        out.print(table)
    tokenizer = report["tokenizer"]
    pre = f" ({tokenizer['pre']})" if tokenizer["pre"] else ""
    out.print(f"tokenizer: {tokenizer['kind'] or tokenizer['model']}{pre}, {tokenizer['vocab_size']:,} tokens")
    weights = f"{size(memory['weights'])} as in the file, {size(memory['weights_f32'])} where expanded to float32"
    out.print(f"memory of the weights: {weights}")
    if memory["kv_cache"]:
        table = _table("context", "KV cache f32", "KV cache f16")
        for row in memory["kv_cache"]:
            table.add_row(f"{row['context']:,}", size(row["f32"]), size(row["f16"]))
        out.print(table)
        out.print("KV cache: of one sequence")
    if memory["providers"]:
        _show_providers(out, memory)


def _show_providers(out: Console, memory: dict[str, Any]) -> None:
    heading, *rows = rows_of([Need(**need) for need in memory["providers"]])
    table = _table(*heading)
    for row in rows:
        table.add_row(*row)
    out.print(table)
    many = memory["parallel"]
    out.print(f"for {many} sequence{'s' if many > 1 else ''} of {memory['context']:,} tokens (--parallel, --context)")
    for need in memory["providers"]:
        if need["problem"] is not None:
            out.print(f"{need['provider']}: {need['problem']}", style="yellow")
        elif not need["fits"]:
            short = f"{size(need['total'])} needed, {size(need['free'])} free"
            out.print(f"{need['provider']}: {short}: give a smaller --context or --parallel", style="yellow")


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=SIMPLE_HEAD)
    for heading in others:
        table.add_column(heading, justify="right")
    return table
