"""The base for providers over an array module, through NumPy; and the example over PyTorch where it is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llorch
from llorch.core.quant import DEQUANTIZABLE, dequantize
from llorch.errors import DeviceMemoryError, ProviderUnavailableError
from llorch.providers import AttentionSpec, CacheSpec, MatmulSpec, MemoryInfo, array, registry
from llorch.providers.array import ArrayDevice, ArrayProvider
from llorch.providers.conformance.models import TinyModel, write_model
from llorch.providers.conformance.paged import PagedSequences
from llorch.providers.conformance.rig import Rig, compare
from llorch.providers.conformance.weights import random_weight
from tests.support import ROOT
from tests.unit.test_new_provider import ONE_THREAD

EXAMPLE = ROOT / "examples" / "llorch-provider-torch"


CACHE = CacheSpec(layers=4, kv_heads=4, head_dim=64, block_size=32, blocks=100, dtype="f32")


class CountingDevice(ArrayDevice):
    """NumPy, counting what moves between host and device."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.to_device, self.from_device, self.reads = 0, 0, 0

    def from_host(self, array: np.ndarray) -> np.ndarray:
        self.to_device += 1
        return super().from_host(array)

    def to_host(self, tensor: np.ndarray) -> np.ndarray:
        self.from_device += 1
        return super().to_host(tensor)

    def read(self, tensor: np.ndarray, host: np.ndarray) -> None:
        self.reads += 1
        super().read(tensor, host)


class CountingProvider(ArrayProvider):
    name, summary, requires, api_version, priority = "counting", "NumPy", "nothing", 1, 0
    device_type = CountingDevice


@pytest.fixture
def device() -> CountingDevice:
    opened = CountingProvider().open()
    assert isinstance(opened, CountingDevice)
    return opened


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("kind", sorted(DEQUANTIZABLE))
def test_weights_of_every_type_become_float32_slab_by_slab(device, rng, kind, monkeypatch) -> None:
    monkeypatch.setattr(array, "SLAB_ELEMENTS", 3 * 512)
    host = random_weight(rng, kind, 10, 512, frozenset({"matmul"}))
    weight = device.weight(host)
    np.testing.assert_array_equal(weight, dequantize(host.data, kind, host.shape))
    assert device.weight_bytes(weight) == 4 * 10 * 512


def test_a_weight_in_the_file_is_copied_to_the_device(device, rng) -> None:
    host = random_weight(rng, "F32", 2, 4, frozenset({"matmul"}))
    assert not np.shares_memory(device.weight(host), host.data)


def test_all_inputs_go_up_in_one_transfer(device) -> None:
    inputs = device.inputs({"a": (5,), "b": (2, 3), "c": (1,)})
    before = device.to_device
    inputs.host["b"][...] = [[1, 2, 3], [4, 5, 6]]
    inputs.host["c"][...] = 9
    assert not inputs.device["b"].any()
    inputs.upload()
    assert device.to_device == before + 1
    assert inputs.device["b"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert (inputs.device["a"].tolist(), inputs.device["c"].tolist()) == ([0] * 5, [9])


def test_an_input_of_the_running_step_is_known_without_reading_the_device(device) -> None:
    first, second = (device.inputs({"lengths": (2,)}) for _ in range(2))
    for inputs, value in ((first, 3), (second, 4)):
        inputs.host["lengths"][...] = value
        inputs.upload()
    before = device.from_device
    assert device.on_host(second.device["lengths"]).tolist() == [4, 4]
    assert device.from_device == before
    assert device.on_host(first.device["lengths"]).tolist() == [3, 3]  # of another step: read
    assert device.from_device == before + 1


def test_only_read_moves_data_to_the_host_while_a_model_runs(tmp_path, monkeypatch) -> None:
    provider = CountingProvider()
    monkeypatch.setattr(registry, "choose", lambda _name: (provider, "of the test"))
    with llorch.load(write_model(TinyModel(), tmp_path / "model.gguf")) as llm:
        device = llm._bound.device
        assert isinstance(device, CountingDevice)
        llm.generate_ids([1, 50, 100], max_tokens=5)
        assert device.reads == device.from_device > 0


def test_a_long_prompts_scores_are_made_in_slices(device, rng, monkeypatch) -> None:
    monkeypatch.setattr(array, "SCORE_ELEMENTS", 4 * 50 * 7)
    spec = AttentionSpec(
        max_tokens=64, heads=4, kv_heads=2, head_dim=16, scale=0.25, block_size=16, max_blocks=8, max_sequences=2,
        cache_dtype="f32", window=20,
    )  # fmt: skip
    sequences = PagedSequences(Rig(CountingProvider(), device), spec, rng, [[2, 1, 5, 6], [4, 3]])
    for counts in ({0: 50}, {0: 3, 1: 20}):
        found, expected = sequences.step(counts)
        compare(found, expected, 1e-10, spec)


def test_what_does_not_fit_is_refused_before_it_is_loaded(device, rng, monkeypatch) -> None:
    monkeypatch.setattr(device, "memory", lambda: MemoryInfo(total=1 << 20, free=1 << 20))
    weight = random_weight(rng, "Q8_0", 2048, 1024, frozenset({"matmul"}))
    with pytest.raises(DeviceMemoryError, match=r"weights as float32 need 8.0 MiB, 1.0 MiB are free on cpu: choose"):
        device.expect([weight])
    with pytest.raises(
        DeviceMemoryError, match=r"KV cache of 3200 tokens needs 25.0 MiB, 1.0 MiB are free.*smaller --context"
    ):
        device.kv_cache(CACHE)


def test_the_load_log_says_what_the_weights_take(device, rng) -> None:
    weight = random_weight(rng, "Q4_0", 1024, 2048, frozenset({"matmul"}))
    assert device.expect([weight, weight, weight]) == "weights: float32 on the device, 24.0 MiB"


def test_weights_that_a_device_keeps_otherwise_are_neither_counted_nor_called_float32(device, rng, monkeypatch) -> None:
    class Quantised(CountingDevice):
        def weight(self, host_weight: Any) -> Any:
            return host_weight.data

    monkeypatch.setattr(Quantised, "memory", lambda _self: MemoryInfo(total=4 << 20, free=4 << 20))
    weight = random_weight(rng, "Q8_0", 2048, 1024, frozenset({"matmul"}))  # 2.1 MiB, of float32 8
    kept = Quantised(np, device.info, device.options)
    assert kept.expect([weight]) == "weights: 2.1 MiB as the device was given them"
    assert kept.memory_need([weight], CACHE, []).weights == weight.nbytes


def test_a_missing_module_says_what_the_provider_needs() -> None:
    class Provider(CountingProvider):
        name, requires, module = "nowhere", "no_such_module: pip install no-such-module", "no_such_module"

    with pytest.raises(ProviderUnavailableError, match=r"No module named 'no_such_module'.*pip install no-such-module"):
        Provider().devices()


def test_an_unknown_device_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ProviderUnavailableError, match="no device 'cuda:7'; it has cpu: leave out --device"):
        CountingProvider().open("cuda:7")


def test_a_product_of_one_token_is_that_of_many(device, rng) -> None:
    host = random_weight(rng, "F32", 40, 64, frozenset({"matmul"}))
    kernel = CountingProvider().operations().matmul(device, MatmulSpec(max_tokens=2, rows=40, cols=64, type="F32"))
    x, out = rng.standard_normal((2, 64), dtype=np.float32), np.zeros((2, 40), np.float32)
    kernel(out, x, device.weight(host), None)
    for t in range(2):
        one = np.zeros((1, 40), np.float32)
        kernel(one, x[t : t + 1], device.weight(host), None)
        np.testing.assert_allclose(one[0], out[t], rtol=1e-4, atol=1e-5)


# ---- the example over PyTorch ----


def test_the_example_is_a_provider_in_at_most_60_lines() -> None:
    modules = list((EXAMPLE / "src").rglob("*.py"))
    assert len(modules) == 1
    assert len(modules[0].read_text().splitlines()) <= 60


def test_the_example_passes_the_conformance_suite(tmp_path) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(_example_on_the_path(tmp_path))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--pyargs", "llorch.providers.conformance", "--provider", "torch"],
        cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def _example_on_the_path(folder: Path) -> list[str]:
    """Folders for PYTHONPATH that make the example an installed distribution; none where it is installed."""
    if "torch" in registry.installed():
        return []
    info = folder / "llorch_provider_torch-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llorch-provider-torch\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[llorch.providers]\ntorch = llorch_provider_torch:provider\n")
    return [str(folder), str(EXAMPLE / "src")]
