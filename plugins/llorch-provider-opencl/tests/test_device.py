"""What the conformance suite cannot see: memory that runs out, wrong arrays, threads, launches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llorch_provider_opencl import provider

from llorch.errors import DeviceMemoryError, ProviderUnavailableError
from llorch.providers import AddSpec, CacheSpec, DeviceOptions


def test_a_cache_that_does_not_fit_is_an_error_with_both_sizes(device: Any) -> None:
    spec = CacheSpec(layers=64, kv_heads=64, head_dim=128, block_size=32, blocks=1 << 20, dtype="f32")
    with pytest.raises(DeviceMemoryError, match=r"needs \d+\.\d+ GiB, \d+\.\d+ GiB are free.*--context"):
        device.kv_cache(spec)


def test_a_buffer_beyond_the_devices_limit_is_an_error(device: Any) -> None:
    rows = device._device.max_mem_alloc_size // 4 + 1
    with pytest.raises(DeviceMemoryError, match="in one piece"):
        device.empty((rows, 1), "float32")


def test_an_array_of_another_shape_is_refused(device: Any) -> None:
    tensor = device.empty((2, 3), "float32")
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 3\)"):
        device.write(tensor, np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="int32"):
        device.read(tensor, np.zeros((2, 3), np.int32))


def test_an_unknown_device_is_an_error_that_names_those_there_are(device: Any) -> None:
    with pytest.raises(ProviderUnavailableError, match=f"no device 'gpu:99'; it has .*{device.info.name}"):
        provider.open("gpu:99")


def test_threads_are_compute_units_of_a_cpu(device: Any) -> None:
    if not device.traits.is_cpu or device.traits.compute_units == 1:
        pytest.skip("the device is no CPU of several threads")
    opened = provider.open(device.info.name, DeviceOptions(threads=1))
    assert opened.traits.compute_units == 1
    tensor, found = opened.empty((4,), "float32"), np.empty(4, np.float32)
    opened.write(tensor, np.arange(4, dtype=np.float32))
    opened.read(tensor, found)
    opened.close()
    assert found.tolist() == [0, 1, 2, 3]
    assert provider.open(device.info.name, DeviceOptions(threads=999)).traits == device.traits


def test_memory_is_counted_and_given_back() -> None:
    opened = provider.open()
    before = opened._memory.allocated
    tensor = opened.empty((1 << 20,), "float32")
    assert opened._memory.allocated - before == 4 << 20
    del tensor
    assert opened._memory.allocated == before
    kept = opened.empty((1 << 20,), "float32")
    opened.close()
    assert kept.buffer.nbytes == opened._memory.allocated == 0


def test_uploads_that_overlap_keep_their_own_contents(device: Any) -> None:
    inputs = device.inputs({"a": (3,), "b": (70_000,)})
    for turn in range(12):  # more than are kept in flight, without a read in between
        inputs.host["a"][...] = turn
        inputs.upload()
    inputs.host["a"][...] = -1  # after the upload: must not travel
    found = np.empty(3, np.int32)
    device.read(inputs.device["a"], found)
    assert found.tolist() == [11, 11, 11]


def test_a_prebound_step_runs_over_the_tensors_it_was_given(device: Any) -> None:
    from llorch_provider_opencl.operations import OpenCLOps

    spec = AddSpec(max_tokens=4, dim=5, label="sum")
    kernel = OpenCLOps().add(device=device, spec=spec)
    x, y, out, other = (device.empty((2, 5), "float32") for _ in range(4))
    for tensor, value in ((x, 1.0), (y, 2.0), (out, 0.0), (other, 0.0)):
        device.write(tensor, np.full((2, 5), value, np.float32))
    (step,) = kernel.steps(out, x, y)
    assert step.spec is spec
    kernel(other, x, x)  # the site's shared kernel object has arguments of its own
    step.kernel(*step.args)
    found = np.empty((2, 5), np.float32)
    for tensor, value in ((out, 3.0), (other, 2.0)):
        device.read(tensor, found)
        np.testing.assert_array_equal(found, value)
