"""What a model file needs of each installed provider's memory, for `llorch inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llorch.errors import LlorchError

if TYPE_CHECKING:
    from llorch.core.config import ModelConfig
    from llorch.core.gguf import GGUFFile
    from llorch.providers.registry import ProviderStatus


@dataclass(frozen=True, kw_only=True)
class Need:
    """One provider's row. Bytes; None where `problem` says why they are not known."""

    provider: str
    device: str | None = None
    cache_type: str | None = None
    weights: int | None = None  # as the provider holds them
    kv_cache: int | None = None
    working: int | None = None  # activations, logits, scratch memory
    total: int | None = None
    free: int | None = None  # of the device's memory, the container's where that is less
    fits: bool | None = None
    longest_context: int | None = None  # that would fit, for as many sequences
    exact: bool | None = None  # False: the provider does not say what it adds
    problem: str | None = None


def needs(
    file: GGUFFile, config: ModelConfig, context: int | None, parallel: int, chunk: int, cache_type: str | None
) -> list[Need]:
    """Of every installed provider. Raises SettingsError for a context that the model has not."""
    from llorch.core.llm import limits_of
    from llorch.providers import registry

    limits_of(config, context, parallel, chunk)
    return [_need(status, file, config, (context, parallel, chunk), cache_type) for status in registry.status()]


def _need(
    status: ProviderStatus,
    file: GGUFFile,
    config: ModelConfig,
    sizes: tuple[int | None, int, int],
    cache_type: str | None,
) -> Need:
    from llorch.core.forecast import Forecaster
    from llorch.core.llm import limits_of
    from llorch.core.opening import open_device
    from llorch.providers import registry

    if status.state != "ok":
        return Need(provider=status.name, problem=status.reason)
    try:
        provider = registry.load(status.name)
        device = open_device(provider)
        try:
            forecaster, room = Forecaster(file, config, provider, device), device.memory()
            found = forecaster.forecast(limits_of(config, *sizes), cache_type)
            _, parallel, chunk = sizes
            longest = forecaster.longest_context(limits_of(config, None, parallel, chunk), cache_type, room.free)
            return Need(
                provider=status.name,
                device=device.info.name,
                cache_type=cache_type or device.cache_dtypes[0],
                weights=found.weights,
                kv_cache=found.cache,
                working=found.working,
                total=found.total,
                free=room.free,
                fits=found.total <= room.free,
                longest_context=longest,
                exact=found.exact,
            )
        finally:
            device.close()
    except LlorchError as error:
        return Need(provider=status.name, problem=str(error))


def rows_of(found: list[Need]) -> Iterator[tuple[str, ...]]:
    """The table for people, heading first."""
    yield "provider", "weights", "KV cache", "working", "in all", "free", "longest context"
    for need in found:
        if need.total is None or need.longest_context is None:
            continue
        sizes = (need.weights, need.kv_cache, need.working, need.total, need.free)
        named = f"{need.provider} {need.device}, {need.cache_type}" + ("" if need.exact else ", at least")
        longest = f"{need.longest_context:,}" if need.longest_context > 1 else "none fits"
        yield named, *(size(count or 0) for count in sizes), longest


def size(count: int) -> str:
    """Bytes for people."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"
