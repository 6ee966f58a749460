"""What the conformance suite cannot see: captured steps against plain ones, memory that runs out, which kernels run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from emulator.provider import INFO, EmulatedProvider
from emulator.runtime import HostRuntime
from llorch_provider_cupy.device import CudaDevice
from llorch_provider_cupy.formats import FORMATS

import llorch
from llorch.core.config import ModelConfig
from llorch.core.forecast import Forecaster
from llorch.core.llm import limits_of
from llorch.core.model_files import open_model
from llorch.core.runner import Chunk
from llorch.errors import DeviceMemoryError, ProviderUnavailableError
from llorch.providers import CacheSpec, MatmulSpec, registry
from llorch.providers.conformance import oracle
from llorch.providers.conformance.models import TinyModel, write_model
from llorch.providers.conformance.rig import ROUNDED, Rig, compare
from llorch.providers.conformance.weights import random_weight, values_of


def test_a_captured_decode_step_equals_the_plain_one(
    device: CudaDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(TinyModel(type="Q4_K", seed=37), tmp_path / "model.gguf")
    logits = []
    for sizes in ((1, 2, 4), ()):
        provider = EmulatedProvider()
        monkeypatch.setattr(registry, "choose", lambda _name, p=provider: (p, "the emulated card"))
        monkeypatch.setattr(CudaDevice, "capture_sizes", sizes)
        with llorch.load(path, parallel=1) as llm:
            runner, found = llm._bound.runner, []  # type: ignore[attr-defined]
            for at, token in enumerate([1, 50, 100, 200, 7]):
                found.append(runner.logits([Chunk([token], at, [1])]).copy())
            logits.append(np.concatenate(found))
            assert bool(runner._captured) == bool(sizes)
    np.testing.assert_array_equal(*logits)


def test_a_cache_that_does_not_fit_says_which_context_would(device: CudaDevice) -> None:
    small = CudaDevice(HostRuntime(1 << 20), INFO)
    spec = CacheSpec(layers=4, kv_heads=2, head_dim=64, block_size=32, blocks=1000, dtype="f16")
    with pytest.raises(DeviceMemoryError, match=r"31968 tokens needs .* are free .*: 480 tokens would fit"):
        small.kv_cache(spec)
    blocks = 480 // 32 + 1
    small.kv_cache(CacheSpec(layers=4, kv_heads=2, head_dim=64, block_size=32, blocks=blocks, dtype="f16"))


def test_weights_that_do_not_fit_are_refused_before_they_are_uploaded(device: CudaDevice) -> None:
    small = CudaDevice(HostRuntime(1 << 20), INFO)
    weight = random_weight(np.random.default_rng(0), "Q8_0", 2048, 1024, frozenset({"matmul"}))
    with pytest.raises(DeviceMemoryError, match=r"weights take .* GiB are free"):
        small.expect([weight])
    with pytest.raises(DeviceMemoryError, match=r"activations needs 4\.0 MiB more on emulated card, 1\.0 of 1\.0 MiB"):
        small.empty((1 << 20,), "float32")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tokens", [3, 9])
def test_few_tokens_take_the_kernels_and_many_cublas(device: CudaDevice, kind: str, tokens: int) -> None:
    rig, rng = Rig(EmulatedProvider(), device), np.random.default_rng(5)
    host, x = random_weight(rng, kind, 33, 256, frozenset({"matmul"})), rng.standard_normal((tokens, 256), np.float32)
    spec = MatmulSpec(max_tokens=16, rows=33, cols=256, type=kind)
    kernel, out, weight, device_x = rig.bind("matmul", spec), rig.output(tokens, 33), device.weight(host), rig.tensor(x)
    device.runtime.launched.clear()  # type: ignore[attr-defined]
    (found,) = rig.call(kernel, [out], lambda: kernel(out.tensor, device_x, weight, None))
    compare(found, oracle.matmul(x.astype(np.float64), values_of(host)), ROUNDED, spec)
    ran = device.runtime.launched  # type: ignore[attr-defined]
    assert ("gemm" in ran) == (tokens > 8)
    assert any(name.startswith("product_4 ") for name in ran) == (tokens == 3)


def test_values_beyond_halves_are_multiplied_as_float32(device: CudaDevice) -> None:
    rig, rng = Rig(EmulatedProvider(), device), np.random.default_rng(5)
    host = random_weight(rng, "Q8_0", 16, 64, frozenset({"matmul"}))
    blocks = host.data.copy().reshape(-1, 34)
    blocks[0, :2] = np.array([60000], np.float16).view(np.uint8)
    large = type(host)(**{**vars(host), "data": blocks.reshape(-1)})
    weight, x = device.weight(large), rng.standard_normal((12, 64), np.float32)
    assert (weight.kind, device.weight(host).kind) == ("f32", "f16")
    spec = MatmulSpec(max_tokens=16, rows=16, cols=64, type="Q8_0")
    kernel, out, device_x = rig.bind("matmul", spec), rig.output(12, 16), rig.tensor(x)
    (found,) = rig.call(kernel, [out], lambda: kernel(out.tensor, device_x, weight, None))
    assert np.isfinite(found).all()
    compare(found, oracle.matmul(x.astype(np.float64), values_of(large)), ROUNDED, spec)


def test_without_a_card_opening_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from llorch_provider_cupy import probe, provider

    monkeypatch.setattr(probe, "DRIVER_LIBRARY", "libcuda-that-is-not-there.so.1")
    probe.probe_devices.cache_clear()
    with pytest.raises(ProviderUnavailableError, match="no NVIDIA driver"):
        provider.open("cuda:0")
    probe.probe_devices.cache_clear()


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K"])
def test_the_memory_that_was_forecast_is_what_is_allocated(
    device: CudaDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = write_model(TinyModel(type=kind, vocab=4096), tmp_path / "model.gguf")
    provider, opened = EmulatedProvider(), CudaDevice(HostRuntime(), INFO)
    with open_model(path) as file:
        config = ModelConfig.from_gguf(file)
        said = Forecaster(file, config, provider, opened).forecast(limits_of(config, None, 3, 512))
    monkeypatch.setattr(registry, "choose", lambda _name: (provider, "the emulated card"))
    monkeypatch.setattr(EmulatedProvider, "open", lambda *_args: opened)
    with llorch.load(path, parallel=3) as llm:
        assert said.weights + said.cache == llm.device_bytes
        total, free = opened.runtime.memory()
        host_logits = llm.limits.max_outputs * llm.config.vocab_size * 4
        assert abs(said.total - host_logits - (total - free)) < 0.02 * (total - free)
