"""How large the cache becomes on a device that says what room it has for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from llorch.core.plan import Limits
from llorch.errors import DeviceMemoryError
from llorch.providers.spec import CacheSpec, Device


def fitting(wanted: CacheSpec, device: Device, limits: Limits) -> tuple[CacheSpec, list[str]]:
    """`wanted` with as many blocks as the device has room for, and lines for the load log where they are fewer.

    Raises DeviceMemoryError where a sequence of the whole context does not fit, with the context that would.
    """
    ask: Callable[[CacheSpec], int] | None = getattr(device, "cache_blocks", None)
    found = wanted if ask is None else replace(wanted, blocks=min(ask(wanted), wanted.blocks))
    if found.blocks == wanted.blocks:
        return wanted, []
    where, context = f"{device.info.name} ({device.info.description})", limits.max_context
    tokens = max(found.blocks - 1, 0) * wanted.block_size
    if tokens < context:
        least = replace(wanted, blocks=-(-context // wanted.block_size) + 1)
        advice = f"start with --context {tokens}, which would fit, or use" if tokens > 1 else "no context fits: use"
        raise DeviceMemoryError(
            f"a context of {context} tokens needs {_size(least)} of cache on {where}, {_size(found)} are left for it: "
            f"{advice} a more strongly quantised model"
        )
    return found, [
        f"cache: {tokens} tokens in {_size(found)}, all the room that {where} has; {limits.max_sequences} sequences of "
        f"{context} tokens would take {_size(wanted)}: requests wait where they would need more at once"
    ]


def _size(spec: CacheSpec) -> str:
    return f"{spec.nbytes / 2**30:.2f} GiB" if spec.nbytes >= 1 << 30 else f"{spec.nbytes / 2**20:.2f} MiB"
