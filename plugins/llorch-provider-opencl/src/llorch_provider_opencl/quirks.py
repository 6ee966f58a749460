"""How kernels are cut for a device: settings from what the device says of itself, and one table of exceptions."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Traits:
    """What a device says of itself."""

    is_cpu: bool
    platform: str
    name: str
    vendor: str
    vector_width: int  # native, in floats
    compute_units: int
    local_bytes: int
    max_group: int  # work-items


@dataclass(frozen=True)
class Settings:
    """The shapes of launches. Sizes of groups are powers of two."""

    width: int  # lanes of a work-item: 1, 4, 8 or 16
    decode_groups: int  # groups of rows that a work-item of a product takes, for up to 4 tokens
    prefill_groups: int  # the same, for more
    prefill_tokens: int  # tokens of a tile
    product_items: int  # work-items of a product's work-group that take rows (times the splits)
    max_splits: int  # work-items that may share the columns of a row
    row_items: int  # work-items that share a row: norms, argmax
    attention_items: int  # work-items that share a query
    vectors_per_item: int  # of an elementwise operation
    segments_per_item: int  # of preparing x
    rope_heads: int  # heads that a work-item rotates
    unroll: int = 1  # the most segments of a unit that a product's loop takes in one body
    huge_pages: bool = False  # weights in host memory with huge pages, which the device uses in place
    options: str = ""  # of the compiler


@dataclass(frozen=True)
class Quirk:
    """An exception: devices whose `field` matches get `changes`, because of `reason`."""

    field: str
    pattern: str
    changes: dict[str, Any]
    reason: str
    cpu: bool | None = None  # None: devices of either kind

    def applies(self, traits: Traits) -> bool:
        right_kind = self.cpu is None or self.cpu == traits.is_cpu
        return right_kind and re.search(self.pattern, str(getattr(traits, self.field)), re.IGNORECASE) is not None


QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        "platform",
        "portable computing language|intel",
        {"huge_pages": True},
        "CPU runtimes compute in host memory and allocate it in pages of 4 KiB: reading it once a token then waits for "
        "address translation. The same memory in huge pages reads half as fast again.",
        cpu=True,
    ),
    Quirk(
        "platform",
        "portable computing language",
        {"unroll": 2},
        "Products of Q4_0 and Q8_0 are a tenth faster with both blocks of a unit in one body. Elsewhere that is not "
        "worth its compile time: Intel's CPU compiler takes five times as long for twice the body.",
        cpu=True,
    ),
)


def settings_for(traits: Traits, quirks: tuple[Quirk, ...] = QUIRKS) -> Settings:
    """What the device's own figures suggest, with the exceptions of the table."""
    settings = _cpu(traits) if traits.is_cpu else _gpu(traits)
    for quirk in quirks:
        if quirk.applies(traits):
            settings = replace(settings, **quirk.changes)
    return settings


def _power_of_two(value: int) -> int:
    """The largest that is not above value."""
    return 1 << (max(1, value).bit_length() - 1)


def _cpu(traits: Traits) -> Settings:
    """One work-item fills the vector unit; work-groups of one, because every item of a larger one is a loop's turn."""
    width = min(16, max(4, _power_of_two(traits.vector_width)))
    return Settings(
        width=width,
        decode_groups=4,  # four sums at once hide the latency of an addition that waits for the one before
        prefill_groups=1,
        prefill_tokens=8,
        product_items=1,
        max_splits=1,
        row_items=1,
        attention_items=1,
        vectors_per_item=64,
        segments_per_item=16,
        rope_heads=1 << 16,
    )


def _gpu(traits: Traits) -> Settings:
    """One lane a work-item; neighbours take neighbouring rows. Groups of up to 256 items where the device allows."""
    largest = _power_of_two(traits.max_group)
    product_items = min(32, largest)
    splits = min(8, largest // product_items)
    tokens, groups = 8, 2  # the most results that a work-item adds up across splits in local memory
    while splits > 1 and splits * product_items * tokens * groups * 4 > traits.local_bytes // 2:
        splits //= 2
    return Settings(
        width=1,
        decode_groups=1,
        prefill_groups=1,
        prefill_tokens=tokens,
        product_items=product_items,
        max_splits=splits,
        row_items=min(256, largest),
        attention_items=min(64, largest),
        vectors_per_item=1,
        segments_per_item=1,
        rope_heads=4,
    )
