"""The device itself: views, transfers, capture, memory, opening and closing."""

from __future__ import annotations

import gc

import numpy as np
import psutil
import pytest

from llorch.providers.conformance.rig import Rig
from llorch.providers.conformance.trial import empty
from llorch.providers.conformance.weights import random_weight
from llorch.providers.device import CacheSpec, Provider
from llorch.providers.spec import AddSpec, MatmulSpec

MEBIBYTE = 1 << 20


def test_what_is_written_is_read_back(rig: Rig, rng: np.random.Generator) -> None:
    for values in (rng.standard_normal((5, 33), dtype=np.float32), rng.integers(-9, 9, (4,), dtype=np.int32)):
        tensor, found = rig.tensor(values), np.empty_like(values)
        assert tuple(tensor.shape) == values.shape
        rig.device.read(tensor, found)
        np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_empty_is_of_the_dtype_that_was_asked_for(rig: Rig, dtype: str) -> None:
    tensor = empty(rig.device, (2, 3), dtype)
    assert tuple(tensor.shape) == (2, 3)


def test_rows_are_a_view(rig: Rig) -> None:
    whole, some = np.arange(12, dtype=np.float32).reshape(4, 3), np.zeros((2, 3), np.float32)
    tensor = rig.tensor(whole)
    view = rig.device.rows(tensor, 2)
    assert tuple(view.shape) == (2, 3)
    rig.device.read(view, some)
    np.testing.assert_array_equal(some, whole[:2])
    rig.device.write(view, -some)
    found = np.empty_like(whole)
    rig.device.read(tensor, found)
    np.testing.assert_array_equal(found, np.concatenate([-whole[:2], whole[2:]]))


def test_inputs_arrive_in_one_upload(rig: Rig) -> None:
    inputs = rig.device.inputs({"a": (5,), "b": (2, 3)})
    for turn in range(3):
        inputs.host["a"][...] = np.arange(5) + turn
        inputs.host["b"][...] = -turn
        inputs.upload()
        for name, shape in (("a", (5,)), ("b", (2, 3))):
            found = np.empty(shape, np.int32)
            rig.device.read(inputs.device[name], found)
            np.testing.assert_array_equal(found, inputs.host[name])


def test_a_captured_run_equals_a_plain_one_and_reads_live_tensors(rig: Rig, rng: np.random.Generator) -> None:
    if not rig.device.capture_sizes:
        pytest.skip("the device declares no capture sizes")
    kernel = rig.bind("add", AddSpec(max_tokens=4, dim=64))
    x, y, out = rig.tensor(np.zeros((4, 64), np.float32)), rig.tensor(np.ones((4, 64), np.float32)), rig.output(4, 64)
    out.fill(0)
    kernel(out.tensor, x, y)
    replay = rig.device.capture(lambda: kernel(out.tensor, x, y))
    assert replay is not None
    for _ in range(3):
        values = rng.standard_normal((4, 64), dtype=np.float32)
        rig.device.write(x, values)
        replay()
        np.testing.assert_array_equal(out.read(), values + 1)


def test_kernels_allocate_nothing_after_warm_up(rig: Rig, rng: np.random.Generator) -> None:
    spec = MatmulSpec(max_tokens=64, rows=512, cols=512, type="F32")
    weight = rig.device.weight(random_weight(rng, "F32", 512, 512, frozenset({"matmul"})))
    kernel, x, out = rig.bind("matmul", spec), rig.tensor(np.ones((64, 512), np.float32)), rig.output(64, 512)
    host = np.empty((64, 512), np.float32)

    def run(times: int) -> None:
        for _ in range(times):
            kernel(out.tensor, x, weight, None)
        rig.device.read(out.tensor, host)

    run(20)
    gc.collect()
    process, device = psutil.Process().memory_info().rss, rig.device.memory().free
    run(400)
    assert psutil.Process().memory_info().rss - process < 16 * MEBIBYTE, "the process grows with every call"
    if rig.device.info.memory_architecture != "cpu":  # a CPU's free memory is everybody's
        assert device - rig.device.memory().free < 16 * MEBIBYTE, "the device's memory shrinks with every call"


def test_opening_and_closing_50_times_leaves_no_growth(provider: Provider, rng: np.random.Generator) -> None:
    host = random_weight(rng, "F32", 1024, 1024, frozenset({"matmul"}))  # 4 MiB
    spec = CacheSpec(layers=2, kv_heads=4, head_dim=64, block_size=16, blocks=64, dtype="f32")

    def once() -> None:
        device = provider.open()
        if spec.dtype in device.cache_dtypes:
            device.kv_cache(spec)
        device.weight(host)
        tensor = device.empty((256, 1024), "float32")
        device.write(tensor, np.ones((256, 1024), np.float32))
        device.close()

    for _ in range(5):
        once()
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(50):
        once()
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 40 * MEBIBYTE, "50 openings leak"
