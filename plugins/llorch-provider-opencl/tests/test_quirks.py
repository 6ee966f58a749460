"""Settings follow from what a device says, and from the table."""

from __future__ import annotations

from dataclasses import replace

import pytest
from llorch_provider_opencl.quirks import QUIRKS, Quirk, Settings, Traits, settings_for

CPU = Traits(
    is_cpu=True, platform="Portable Computing Language", name="cpu", vendor="GenuineIntel", vector_width=16,
    compute_units=8, local_bytes=2 << 20, max_group=4096,
)  # fmt: skip
GPU = Traits(
    is_cpu=False, platform="NVIDIA CUDA", name="GPU", vendor="NVIDIA Corporation", vector_width=1,
    compute_units=80, local_bytes=48 << 10, max_group=1024,
)  # fmt: skip
SMALL = replace(GPU, platform="other", local_bytes=1 << 10, max_group=64)


def test_a_cpu_fills_its_vectors_and_a_gpu_its_groups() -> None:
    cpu, gpu = settings_for(CPU), settings_for(GPU)
    assert (cpu.width, cpu.product_items, cpu.max_splits) == (16, 1, 1)
    assert gpu.width == 1
    assert gpu.product_items * gpu.max_splits == 256


@pytest.mark.parametrize(("native", "width"), [(0, 4), (1, 4), (4, 4), (8, 8), (12, 8), (16, 16), (32, 16)])
def test_the_width_is_a_power_of_two_that_divides_a_group(native: int, width: int) -> None:
    assert settings_for(replace(CPU, vector_width=native)).width == width


@pytest.mark.parametrize("traits", [GPU, SMALL, replace(SMALL, max_group=1)])
def test_groups_and_local_memory_stay_within_the_device(traits: Traits) -> None:
    s = settings_for(traits)
    assert s.product_items * s.max_splits <= traits.max_group
    assert max(s.row_items, s.attention_items) <= traits.max_group
    assert s.max_splits == 1 or s.max_splits * s.product_items * s.prefill_tokens * 2 * 4 <= traits.local_bytes


def test_huge_pages_are_for_runtimes_that_compute_in_host_memory() -> None:
    assert settings_for(CPU).huge_pages
    assert not settings_for(GPU).huge_pages
    assert not settings_for(replace(GPU, platform="Intel(R) OpenCL Graphics")).huge_pages


def test_a_quirk_changes_matching_devices_alone() -> None:
    quirk = Quirk("name", "^card", {"row_items": 64}, "its driver says 256 and means 64")
    assert settings_for(replace(GPU, name="Card 5"), (quirk,)).row_items == 64
    assert settings_for(replace(GPU, name="other card"), (quirk,)).row_items == 256


def test_every_quirk_has_a_reason_and_changes_settings_that_exist() -> None:
    for quirk in QUIRKS:
        assert len(quirk.reason) > 20
        assert quirk.changes.keys() <= vars(settings_for(CPU)).keys()
        assert hasattr(CPU, quirk.field)
        assert isinstance(replace(settings_for(CPU), **quirk.changes), Settings)
