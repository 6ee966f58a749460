"""How large the KV cache becomes: what the limits ask for, and what the device has room for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from llorch.core.config import ModelConfig
from llorch.core.plan import Limits
from llorch.errors import DeviceMemoryError, SettingsError
from llorch.providers.device import CacheSpec, Device
from llorch.providers.memory_limit import amount


def wanted_cache(
    config: ModelConfig, limits: Limits, device: Device, cache_type: str | None, name: str, tokens: int | None = None
) -> CacheSpec:
    """A cache of `tokens` tokens, of one whole context for each sequence where None, on provider `name`'s device.

    Raises SettingsError for a type that the device has not, and for fewer tokens than one context.
    """
    dtype = cache_type or device.cache_dtypes[0]
    if dtype not in device.cache_dtypes:
        raise SettingsError(
            f"cache type {dtype!r} is not offered by provider {name}; it offers {', '.join(device.cache_dtypes)}"
        )
    if tokens is not None and tokens < limits.max_context:
        raise SettingsError(
            f"a cache of {tokens} tokens is smaller than one context of {limits.max_context}: start with "
            f"--cache-tokens {limits.max_context} or more, or with --context {tokens}"
        )
    size = device.block_sizes[0]
    blocks = limits.max_sequences * -(-limits.max_context // size) if tokens is None else -(-tokens // size)
    return CacheSpec(
        layers=config.n_layers,
        kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        block_size=size,
        blocks=blocks + 1,  # block 0 takes what padding writes
        dtype=dtype,
    )


def fitting_cache(wanted: CacheSpec, device: Device, limits: Limits, tokens: int | None = None) -> CacheSpec:
    """`wanted` with as many blocks as there is room for: more sequences than fit whole at once take turns.

    Raises DeviceMemoryError where a sequence of the whole context does not fit, with the context that would, or where
    the number of tokens was asked for and does not.
    """
    found = replace(wanted, blocks=min(_room(wanted, device, limits, tokens), wanted.blocks))
    context = limits.max_context
    least = context if tokens is None else tokens
    if (held := max(found.blocks - 1, 0) * wanted.block_size) >= least:
        return found
    where = f"{device.info.name} ({device.info.description})"
    need = amount(replace(wanted, blocks=-(-least // wanted.block_size) + 1).nbytes)
    advice = f"start with --context {held}, which would fit, or use" if held > 1 else "no context fits: use"
    if held >= context:
        advice = f"start with --cache-tokens {held}, which would fit, or use"
    raise DeviceMemoryError(
        f"a cache of {least} tokens needs {need} on {where}, {amount(found.nbytes)} are left for it: {advice} a more "
        "strongly quantised model"
    )


def _room(wanted: CacheSpec, device: Device, limits: Limits, tokens: int | None) -> int:
    """Blocks that the device says it has room for; else half of its free memory, and at least one context."""
    ask: Callable[[CacheSpec], int] | None = getattr(device, "cache_blocks", None)
    if ask is not None:
        return ask(wanted)
    if tokens is not None:
        return wanted.blocks
    block = replace(wanted, blocks=1).nbytes
    return max(-(-limits.max_context // wanted.block_size) + 1, device.memory().free // 2 // block)
