"""What a model will take of memory, said before it is loaded: against what a loaded one holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

import llorch
from llorch.cli import main
from llorch.core.config import ModelConfig
from llorch.core.forecast import Forecast, Forecaster
from llorch.core.llm import limits_of
from llorch.core.model_files import open_model
from llorch.errors import DeviceMemoryError, SettingsError
from llorch.providers import CacheSpec, DeviceInfo, DeviceOptions, HostWeight, registry
from llorch.providers.array import ArrayDevice
from llorch.providers.conformance.models import TinyModel, write_model
from llorch.providers.conformance.weights import random_weight
from llorch.providers.host_memory import host_memory
from llorch.providers.numpy_cpu import NumpyDevice
from tests.malformed.layout import DIM, TensorPart, tiny
from tests.support import ROOT

NEAR = 0.02
PROVIDERS = list(registry.installed())
TYPES = ("F32", "F16", "Q8_0", "Q4_K", "IQ4_NL", "TQ2_0")


def opened(name: str) -> str:
    """The name, where the provider works here."""
    try:
        registry.choose(name)
    except llorch.errors.ProviderUnavailableError as error:
        pytest.skip(str(error).splitlines()[0])
    return name


@contextmanager
def forecaster(path: Path, provider: str) -> Iterator[Forecaster]:
    chosen, _ = registry.choose(provider)
    device = chosen.open()
    try:
        with open_model(path) as file:
            yield Forecaster(file, ModelConfig.from_gguf(file), chosen, device)
    finally:
        device.close()


def forecast(
    path: Path, provider: str, context: int | None = None, parallel: int = 8, cache_type: str | None = None
) -> Forecast:
    with forecaster(path, provider) as found, open_model(path) as file:
        return found.forecast(limits_of(ModelConfig.from_gguf(file), context, parallel, 512), cache_type)


def near(found: int, expected: int) -> bool:
    return abs(found - expected) <= NEAR * expected


# ---- against a loaded model ----


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_weights_and_cache_are_what_a_loaded_model_reports(tmp_path: Path, provider: str, kind: str) -> None:
    path = write_model(TinyModel(type=kind, layers=1, biases=True), tmp_path / "tiny.gguf")
    said = forecast(path, opened(provider))
    with llorch.load(path, provider=provider) as llm:
        assert near(said.weights + said.cache, llm.device_bytes), said
        assert said.exact


@pytest.mark.parametrize(
    ("context", "parallel", "cache_type"), [(2, 1, None), (33, 3, None), (None, 1, "f32"), (256, 16, "f16")]
)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_so_are_they_for_other_contexts_and_sequences(
    tmp_path: Path, provider: str, context: int | None, parallel: int, cache_type: str | None
) -> None:
    path = write_model(TinyModel(type="Q8_0", layers=1, tied=True), tmp_path / "tiny.gguf")
    said = forecast(path, opened(provider), context, parallel, cache_type)
    options = {"context": context, "parallel": parallel, "cache_type": cache_type}
    with llorch.load(path, provider=provider, **options) as llm:  # type: ignore[arg-type]
        assert near(said.weights + said.cache, llm.device_bytes), said


def test_a_forecast_for_other_sequences_fails(tmp_path: Path) -> None:
    """The assertion itself can fail."""
    path = write_model(TinyModel(type="Q8_0", layers=1), tmp_path / "tiny.gguf")
    said = forecast(path, "numpy-cpu", None, 2)
    with llorch.load(path, provider="numpy-cpu", parallel=1) as llm:
        assert not near(said.weights + said.cache, llm.device_bytes)


def test_a_cache_that_a_provider_pads_is_counted_as_it_lies(tmp_path: Path) -> None:
    path = write_model(TinyModel(dim=160, heads=16, kv_heads=16, layers=1), tmp_path / "tiny.gguf")  # heads of 10
    said = forecast(path, opened("numba-cpu"))
    with llorch.load(path, provider="numba-cpu") as llm:
        layers = llm._bound._cache.layers  # type: ignore[attr-defined]
        assert said.cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        assert said.cache > llm._bound.cache_spec.nbytes


def test_activations_are_what_the_graph_allocates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(TinyModel(layers=2), tmp_path / "tiny.gguf")
    taken = []
    empty = NumpyDevice.empty

    def counted(self: NumpyDevice, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        taken.append(empty(self, shape, dtype))
        return taken[-1]

    monkeypatch.setattr(NumpyDevice, "empty", counted)
    monkeypatch.setattr(NumpyDevice, "memory_need", None)
    said = forecast(path, "numpy-cpu")
    assert not taken
    assert not said.exact
    with llorch.load(path, provider="numpy-cpu") as llm:
        held = llm._bound
        inputs = sum(array.nbytes for array in held._inputs.host.values())
        assert said.working == sum(array.nbytes for array in taken) + inputs + held._logits.nbytes


def test_weights_that_a_subclass_takes_otherwise_count_as_in_the_file() -> None:
    class Quantised(ArrayDevice):
        def weight(self, host_weight: HostWeight) -> HostWeight:
            return host_weight

    weights = [random_weight(np.random.default_rng(0), "Q8_0", 64, 64, frozenset({"matmul"}))]
    cache = CacheSpec(layers=1, kv_heads=1, head_dim=4, block_size=32, blocks=2, dtype="f32")
    expected = {ArrayDevice: 4 * 64 * 64, Quantised: 34 * 2 * 64}
    for kind, nbytes in expected.items():
        device = kind(np, DeviceInfo("cpu", "NumPy", "cpu"), DeviceOptions())
        assert device.memory_need(weights, cache, []).weights == nbytes


RESIDENT = """
import sys, psutil, llorch

def held():  # but for the file's own pages, which the system takes back when it needs them
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared

with llorch.load(sys.argv[1], provider=sys.argv[2], context=2, parallel=1) as llm:
    llm.generate_ids([1], max_tokens=1)  # what is imported and compiled is no model's
before = held()
llm = llorch.load(sys.argv[3], provider=sys.argv[2], parallel=4)
llm.bench_prefill(512)
for cache in llm._bound._cache.layers:
    cache.keys[...] = 1
    cache.values[...] = 1
print(held() - before)
"""


@pytest.mark.parametrize("provider", ["numpy-cpu", "numba-cpu"])
def test_the_process_grows_by_what_was_said(tmp_path: Path, provider: str) -> None:
    """All of the cache written; to within a fifth, as libraries keep some of what they free."""
    small = write_model(TinyModel(type="Q8_0", layers=1), tmp_path / "small.gguf")
    large = TinyModel(type="Q8_0", dim=1024, heads=8, kv_heads=8, ffn=2048, layers=3, vocab=512, context=2048)
    path = write_model(large, tmp_path / "large.gguf")
    said = forecast(path, opened(provider), None, 4)
    assert said.total > 80 << 20
    command = [sys.executable, "-c", RESIDENT, str(small), provider, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=ROOT)
    assert 0.8 < int(done.stdout) / said.total < 1.2, (said, int(done.stdout))


# ---- refusals ----


def test_a_context_that_cannot_fit_is_refused_with_both_numbers_and_the_one_that_would(tmp_path: Path) -> None:
    path = write_model(TinyModel(context=1 << 30), tmp_path / "tiny.gguf")
    with pytest.raises(DeviceMemoryError) as caught:
        llorch.load(path, provider="numpy-cpu", parallel=1)
    message = str(caught.value)
    assert "conformance with a context of 1073741824 tokens needs " in message
    assert "KV cache of one sequence 2048.00 GiB" in message
    assert " GiB are free: start with --context " in message
    context = int(message.rpartition("--context ")[2].split(",")[0])
    room = host_memory().free
    assert forecast(path, "numpy-cpu", context, 1).total < 1.2 * room  # others take and give memory meanwhile
    assert forecast(path, "numpy-cpu", 2 * context, 1).total > room


def huge(path: Path) -> Path:
    """A file whose embedding table is a hole of twice the machine's memory."""
    rows = 2 * psutil.virtual_memory().total // (4 * DIM)
    table = TensorPart("token_embd.weight", (DIM, rows))  # behind all others, without its bytes
    file = tiny().without_tensor("token_embd.weight").without_tensor("output.weight")
    data = file.but(tensors=(*file.tensors, table)).bytes()
    path.write_bytes(data)
    os.truncate(path, len(data) + 4 * DIM * rows)
    return path


def test_weights_that_cannot_fit_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = huge(tmp_path / "huge.gguf")
    with forecaster(path, "numpy-cpu") as found, open_model(path) as file:
        limits = limits_of(ModelConfig.from_gguf(file), None, 1, 512)
        with pytest.raises(DeviceMemoryError, match=r"needs .* are free: no context fits, as all but the cache takes"):
            found.check(limits, None)


def test_the_longest_context_is_the_one_that_still_fits(tmp_path: Path) -> None:
    path = write_model(TinyModel(type="TQ2_0", layers=1), tmp_path / "tiny.gguf")
    with forecaster(path, "numpy-cpu") as found, open_model(path) as file:
        limits = limits_of(ModelConfig.from_gguf(file), None, 1, 512)
        assert found.longest_context(limits, None, 1000) == 0
        need = found.forecast(limits).total
        assert found.longest_context(limits, None, need) == 256
        assert found.longest_context(limits, None, need - 1) == 224
        less = found.longest_context(limits, None, need * 9 // 10)
        assert 0 < less < 224
        assert less % 32 == 0


def test_a_cache_type_that_a_provider_has_not_is_refused(tmp_path: Path) -> None:
    path = write_model(TinyModel(layers=1), tmp_path / "tiny.gguf")
    with pytest.raises(SettingsError, match="cache type 'f8' is not offered by provider numpy-cpu; it offers f32, f16"):
        forecast(path, "numpy-cpu", None, 1, "f8")


def test_serve_refuses_what_cannot_fit(tmp_path: Path) -> None:
    path = write_model(TinyModel(context=1 << 30), tmp_path / "tiny.gguf")
    options = ["--model", str(path), "--provider", "numpy-cpu", "--port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "llorch", "serve", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "needs 30" in done.stderr
    assert "start with --context " in done.stderr


# ---- inspect ----


def test_inspect_says_what_each_provider_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(TinyModel(type="Q8_0", context=1 << 20), tmp_path / "tiny.gguf")
    command = ["inspect", str(path), "--context", "4096", "--parallel", "2", "--cache-type", "f16"]
    assert main([*command, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert (memory["context"], memory["parallel"]) == (4096, 2)
    assert {row["provider"] for row in memory["providers"]} == set(PROVIDERS)
    row = next(row for row in memory["providers"] if row["provider"] == "numpy-cpu")
    said = forecast(path, "numpy-cpu", 4096, 2, "f16")
    assert (row["weights"], row["kv_cache"], row["working"]) == (said.weights, said.cache, said.working)
    assert row["total"] == said.total <= row["free"]
    assert (row["fits"], row["cache_type"], row["exact"]) == (True, "f16", True)
    assert row["longest_context"] >= 4096
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "for 2 sequences of 4,096 tokens (--parallel, --context)" in text
    assert "numpy-cpu cpu, f16" in text


def test_inspect_says_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(TinyModel(context=1 << 30), tmp_path / "tiny.gguf")
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "numpy-cpu: 17.0 TiB needed, " in text
    assert "free: give a smaller --context or --parallel" in text
    assert main(["inspect", str(path), "--context", str(1 << 31)]) == 2
    assert "context 2147483648 is outside 2 to 1073741824" in capsys.readouterr().err


# ---- the machine's memory ----


def group(folder: Path, **values: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in values.items():
        (folder / name.replace("__", ".")).write_text(text)


STAT = "anon 5\n{0}inactive_file 100\n{0}active_file 20\nunevictable 0\n"


@pytest.mark.parametrize("own", ["0::/a/b\n", "0::/\n", "3:cpu,cpuacct:/other\n0::/a/b/c/not-mounted-here\n"])
def test_a_containers_limit_is_the_memory_that_there_is(tmp_path: Path, own: str) -> None:
    (tmp_path / "own").write_text(own)
    mounted = tmp_path / "cgroup"
    group(mounted, memory__max="max\n", memory__current="9999\n", memory__stat=STAT.format(""))
    limits = {"memory__max": "1000000\n", "memory__current": "400120\n", "memory__stat": STAT.format("")}
    group(mounted / "a", **limits) if "/a" in own else group(mounted, **limits)
    group(mounted / "a" / "b", memory__max="max\n", memory__current="1\n", memory__stat=STAT.format(""))
    found = host_memory(mounted, tmp_path / "own")
    assert (found.total, found.free) == (1000000, 600000)  # the file cache makes room


def test_so_is_one_of_the_first_version(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("4:memory:/docker/1234\n3:cpuset:/\n0::/\n")
    limit = {"memory__limit_in_bytes": "5000", "memory__usage_in_bytes": "4120"}
    group(tmp_path / "cgroup" / "memory", **limit, memory__stat=STAT.format("total_"))
    found = host_memory(tmp_path / "cgroup", tmp_path / "own")
    assert (found.total, found.free) == (5000, 1000)


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/\n")
    assert host_memory(tmp_path, tmp_path / "own").total == psutil.virtual_memory().total
    assert host_memory(tmp_path, tmp_path / "absent").total == psutil.virtual_memory().total
