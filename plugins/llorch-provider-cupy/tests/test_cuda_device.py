"""What the conformance suite cannot see: captured steps against plain ones, memory that runs out, which kernels run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulator.provider import INFO, OTHER, EmulatedProvider
from emulator.runtime import HostRuntime
from llorch_provider_cupy.device import CudaDevice
from llorch_provider_cupy.formats import FORMATS
from llorch_provider_cupy.pipeline import Pipeline

import llorch
from llorch.core.config import ModelConfig
from llorch.core.forecast import Forecaster
from llorch.core.llm import limits_of
from llorch.core.model_files import open_model
from llorch.core.plan import expand
from llorch.core.runner import Chunk
from llorch.errors import DeviceMemoryError, ProviderUnavailableError
from llorch.providers import AttentionSpec, MatmulSpec, RMSNormSpec, Step, registry
from llorch.providers.conformance import oracle
from llorch.providers.conformance.models import TinyModel, write_model
from llorch.providers.conformance.paged import PagedSequences
from llorch.providers.conformance.rig import ROUNDED, Rig, compare
from llorch.providers.conformance.weights import random_weight, values_of, vector


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


def test_weights_that_do_not_fit_are_refused_before_they_are_uploaded(device: CudaDevice) -> None:
    small = CudaDevice(HostRuntime(1 << 20), INFO)
    weight = random_weight(np.random.default_rng(0), "Q8_0", 2048, 1024, frozenset({"matmul"}))
    with pytest.raises(DeviceMemoryError, match=r"weights take 2\.1 MiB on an emulated card, 1\.0 MiB are free"):
        small.expect([weight])
    with pytest.raises(
        DeviceMemoryError, match=r"activations needs 4\.0 MiB more on emulated card, 1\.0 MiB of 1\.0 MiB"
    ):
        small.empty((1 << 20,), "float32")


@pytest.fixture(scope="module")
def q4_0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(TinyModel(type="Q4_0", seed=25), tmp_path_factory.mktemp("models") / "model.gguf")


@pytest.fixture
def load(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> Callable[..., llorch.LLM]:
    def load(path: Path, **settings: Any) -> llorch.LLM:
        monkeypatch.setattr(registry, "choose", lambda _name: (EmulatedProvider(), "the emulated card"))
        return llorch.load(path, **settings)

    return load


def free(llm: llorch.LLM) -> int:
    found: int = llm._bound.device.memory().free  # type: ignore[attr-defined]
    return found


def test_the_cache_takes_what_the_limit_leaves(load: Any, q4_0: Path) -> None:
    with load(q4_0, parallel=64) as llm:
        expected, whole = llm.generate_ids([1, 50, 100, 200, 7], max_tokens=8), llm._bound.cache_spec
        without_cache = HostRuntime().total - free(llm) - whole.nbytes
    limit = without_cache + whole.nbytes // 2
    with load(q4_0, parallel=64, gpu_memory=f"{limit / 2**20:.3f}MiB") as llm:
        spec = llm._bound.cache_spec
        assert whole.blocks // 2 - 1 <= spec.blocks <= whole.blocks // 2
        assert any(f"{(spec.blocks - 1) * 32} tokens in" in line for line in llm.start_lines)
        assert free(llm) >= 0
        assert llm.generate_ids([1, 50, 100, 200, 7], max_tokens=8) == expected


def test_a_context_that_does_not_fit_the_limit_is_refused_with_the_one_that_does(load: Any, q4_0: Path) -> None:
    with load(q4_0, parallel=1) as llm:
        used, context = HostRuntime().total - free(llm), llm.context
    message = rf"context of {context} tokens needs .* on \S+ emulated:0 .*: start with --context (\d+)"
    with pytest.raises(DeviceMemoryError, match=message) as error:
        load(q4_0, parallel=1, gpu_memory=f"{(used - (1 << 14)) / 2**20:.3f}MiB")
    fits = re.search(r"--context (\d+)", str(error.value))
    assert fits is not None
    with load(q4_0, parallel=1, context=int(fits[1]), gpu_memory=f"{(used - (1 << 14)) / 2**20:.3f}MiB") as llm:
        assert llm.context == int(fits[1]) < context


def test_a_limit_below_the_weights_is_refused(load: Any, q4_0: Path) -> None:
    with pytest.raises(DeviceMemoryError, match=r"0.1 MiB of 0.1 MiB are free: no context fits"):
        load(q4_0, gpu_memory="0.1MiB")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q6_K"])
def test_halves_beside_the_weights_give_the_same_products(device: CudaDevice, kind: str) -> None:
    both = CudaDevice(HostRuntime(), INFO, halves=True)
    rng, results = np.random.default_rng(5), []
    host, x = random_weight(rng, kind, 257, 256, frozenset({"matmul"})), rng.standard_normal((9, 256), np.float32)
    for opened in (device, both):
        rig = Rig(EmulatedProvider(), opened)
        spec = MatmulSpec(max_tokens=16, rows=257, cols=256, type=kind)
        kernel, out, weight, device_x = rig.bind("matmul", spec), rig.output(9, 257), opened.weight(host), rig.input(x)
        opened.runtime.launched.clear()
        results += rig.call(kernel, spec, out=out, x=device_x, w=weight, bias=None)
        ran = [name.split()[0] for name in opened.runtime.launched]
        assert ("to_half_values" in ran) == (opened is device)
    np.testing.assert_array_equal(*results)


def test_halves_that_do_not_fit_are_refused_with_both_numbers(device: CudaDevice) -> None:
    weight = random_weight(np.random.default_rng(0), "Q4_0", 2048, 1024, frozenset({"matmul"}))
    need = 2048 * 1024 * 18 // 32
    tight = CudaDevice(HostRuntime(need + (1 << 20)), INFO, halves=True)
    with pytest.raises(
        DeviceMemoryError, match=r"halves 4\.0 MiB on .* are free: start without --prefill-weights half"
    ):
        tight.expect([weight])
    assert "halves" not in CudaDevice(HostRuntime(need + (1 << 20)), INFO).expect([weight])
    assert "halves beside" in CudaDevice(HostRuntime(need + (5 << 20)), INFO, halves=True).expect([weight])


def test_a_model_with_halves_beside_its_weights_gives_its_tokens(load: Any, q4_0: Path) -> None:
    prompt = [1, *range(20, 50)]
    with load(q4_0, parallel=1) as llm:
        expected, before, reported = llm.logits(prompt), free(llm), llm.device_bytes
    with load(q4_0, parallel=1, prefill_weights="half") as llm:
        np.testing.assert_array_equal(llm.logits(prompt), expected)
        # each product's weight once more in halves, where a weight of Q4_0 takes 18 bytes for 32
        assert llm.device_bytes - reported == llm.weight_bytes_per_token * 64 // 18
        assert before - free(llm) == llm.device_bytes - reported
        assert any("halves beside" in line for line in llm.start_lines)


@pytest.mark.parametrize("tokens", [1, 3])
def test_norms_round_for_the_product_behind_them(
    load: Any, q4_0: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, launches = [], []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(CudaDevice, "fuse", lambda _self, entries: entries)
        with load(q4_0, parallel=1) as llm:
            chunk = Chunk([5, 6, 7][:tokens], 0, [1], outputs=tokens)
            llm.runner.logits([chunk])
            llm.device.runtime.launched.clear()
            logits.append(llm.runner.logits([chunk]).copy())
            launches.append([name.split()[0] for name in llm.device.runtime.launched])
    np.testing.assert_array_equal(*logits)
    layers = TinyModel().layers
    counts = [{name: found.count(name) for name in ("round_rows", "rope")} for found in launches]
    # a prompt's attention leaves both to their own kernels
    alone = layers if tokens > 1 else 0
    assert counts[0] == {"round_rows": layers + alone, "rope": alone}  # before ffn_down
    assert counts[1] == {"round_rows": 4 * layers + 1, "rope": layers}


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("context", [3, 200])
def test_attention_of_decodes_rotates_and_rounds(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], context: int
) -> None:
    """Bit for bit what the kernels of their own give, with one split of the context and with several."""
    model = TinyModel(type="Q8_0", dim=128, heads=heads[0], kv_heads=heads[1], rope_factors=True, seed=3)
    path, prompt = write_model(model, tmp_path / "model.gguf"), [1 + i % 250 for i in range(context)]
    logits, launches = [], []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(CudaDevice, "fuse", lambda _self, entries: entries)
        with load(path, parallel=2, cache_type="f16") as llm:
            blocks = [list(range(1, 9)), list(range(9, 17))]
            for at in range(0, context, 64):
                part = prompt[at : at + 64]
                llm.runner.logits([Chunk(part, at, tables, outputs=0) for tables in blocks])
            llm.device.runtime.launched.clear()
            steps = [[Chunk([5 + n + i], context + n, tables) for i, tables in enumerate(blocks)] for n in range(3)]
            logits.append(np.stack([llm.runner.logits(step).copy() for step in steps]))
            launches.append([name.split()[0] for name in llm.device.runtime.launched])
    np.testing.assert_array_equal(*logits)
    assert [("rope" in found, "combine" in found) for found in launches] == [
        (False, context > 64),
        (True, context > 64),
    ]
    # of each layer the rotation and three roundings (all but the one before ffn_down), and the rounding for the logits
    assert len(launches[1]) - len(launches[0]) == len(steps) * (4 * model.layers + 1)


@pytest.mark.parametrize(("kind", "cards"), [("Q4_0", 1), ("Q4_0", 2), ("Q6_K", 1), ("F16", 1)])
def test_norms_within_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, cards: int) -> None:
    """Of steps of one token: the same values but for rounding, in six launches a layer, none of them with a race."""
    model = TinyModel(type=kind, biases=True, ffn=256, seed=3)
    path, logits = write_model(model, tmp_path / "model.gguf"), []
    for joins in (True, False):
        opened = [CudaDevice(HostRuntime(races=True), info, joins_norms=joins) for info in (INFO, OTHER)[:cards]]
        monkeypatch.setattr(registry, "choose", lambda _name: (EmulatedProvider(), "the emulated card"))
        device = opened[0] if cards == 1 else Pipeline(opened, INFO)
        monkeypatch.setattr(EmulatedProvider, "open", lambda *_args, device=device: device)
        with llorch.load(path, parallel=1) as llm:
            runner = llm._bound.runner  # type: ignore[attr-defined]
            runner.logits([Chunk([1 + i % 250 for i in range(80)], 0, [1, 2, 3], outputs=0)])
            for card in opened:
                card.runtime.launched.clear()  # type: ignore[attr-defined]
            logits.append(np.stack([runner.logits([Chunk([5 + n], 80 + n, [1, 2, 3])]).copy() for n in range(3)]))
            launched = [name.split()[0] for card in opened for name in card.runtime.launched]  # type: ignore[attr-defined]
            if joins and cards == 1:
                layer = ["product_1", "attend_2", "combine", "product_norm", "gate_up_round", "product_norm"]
                if kind == "F16":  # nothing is rounded
                    layer[4] = "gate_up_1"
                at = launched.index("product_norm") - 3
                assert launched[at : at + 6] == layer
    assert oracle.nmse(logits[0], logits[1]) < (1e-9 if kind == "F16" else 1e-4)
    assert not np.array_equal(*logits)


def test_only_neighbours_that_share_a_tensor_are_fused(device: CudaDevice) -> None:
    rig, rng = Rig(EmulatedProvider(), device), np.random.default_rng(5)
    norm_spec, spec = (
        RMSNormSpec(max_tokens=2, dim=64, eps=1e-5),
        MatmulSpec(max_tokens=2, rows=8, cols=64, type="Q8_0"),
    )
    weight = device.weight(random_weight(rng, "Q8_0", 8, 64, frozenset({"matmul"})))
    gain = device.weight(vector("norm", np.ones(64, np.float32)))
    norm, product = rig.bind("rmsnorm", norm_spec), rig.bind("matmul", spec)
    x, h, other, out = (device.empty((2, n), "float32") for n in (64, 64, 64, 8))
    first, again = Step(norm, (h, x, gain), norm_spec), Step(norm, (other, x, gain), norm_spec)
    matmul = Step(product, (out, h, weight, None), spec)

    def rounded(*steps: Step) -> list[bool]:
        plan = [entry for step in steps for entry in expand(step)]
        return [fused.kernel is not entry.kernel for fused, entry in zip(device.fuse(plan), plan, strict=True)]

    assert rounded(first, matmul) == [True, True]
    assert rounded(first, again, matmul) == [False, False, False]  # `again` could have written over the rounded h
    assert rounded(again, matmul) == [False, False]
    assert rounded(matmul, first) == [False, False]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tokens", [3, 9])
def test_few_tokens_take_the_kernels_and_many_cublas(device: CudaDevice, kind: str, tokens: int) -> None:
    rig, rng = Rig(EmulatedProvider(), device), np.random.default_rng(5)
    host, x = random_weight(rng, kind, 33, 256, frozenset({"matmul"})), rng.standard_normal((tokens, 256), np.float32)
    spec = MatmulSpec(max_tokens=16, rows=33, cols=256, type=kind)
    kernel, out, weight, device_x = rig.bind("matmul", spec), rig.output(tokens, 33), device.weight(host), rig.input(x)
    device.runtime.launched.clear()  # type: ignore[attr-defined]
    (found,) = rig.call(kernel, spec, out=out, x=device_x, w=weight, bias=None)
    compare(found, oracle.matmul(x.astype(np.float64), values_of(host)), ROUNDED, spec)
    ran = device.runtime.launched  # type: ignore[attr-defined]
    assert ("gemm" in ran) == (tokens > 8)
    assert any(name.startswith("product_4 ") for name in ran) == (tokens == 3)


@pytest.mark.parametrize(
    ("capability", "cache_dtype", "head_dim", "wanted", "ran"),
    [
        ((9, 0), "f16", 64, True, "attend_prompt"),
        ((9, 0), "f16", 64, False, "attend_rows"),
        ((7, 5), "f16", 64, True, "attend_rows"),
        ((9, 0), "f32", 64, True, "attend_rows"),
        ((9, 0), "f16", 256, True, "attend_rows"),
    ],
)
def test_prompts_go_to_tensor_cores_where_they_can(
    device: CudaDevice, capability: tuple[int, int], cache_dtype: str, head_dim: int, wanted: bool, ran: str
) -> None:
    card = CudaDevice(HostRuntime(), INFO, prompts_on_tensor_cores=wanted)
    card.properties = replace(card.properties, compute_capability=capability)
    spec = AttentionSpec(
        max_tokens=8, heads=2, kv_heads=1, head_dim=head_dim, scale=0.1, block_size=32, max_blocks=2, max_sequences=1,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    sequences = PagedSequences(Rig(EmulatedProvider(), card), spec, np.random.default_rng(5), [[1, 2]])
    found, expected = sequences.step({0: 7})
    compare(found, expected, 1e-6, spec)
    assert ran in {name.split()[0] for name in card.runtime.launched}


@pytest.mark.parametrize("magnitude", [1e-6, 1e6])
def test_queries_of_any_size_keep_their_precision_on_tensor_cores(device: CudaDevice, magnitude: float) -> None:
    card = CudaDevice(HostRuntime(), INFO, prompts_on_tensor_cores=True)
    spec = AttentionSpec(
        max_tokens=8, heads=2, kv_heads=1, head_dim=64, scale=0.125 / magnitude, block_size=32, max_blocks=2,
        max_sequences=1, cache_dtype="f16",
    )  # fmt: skip

    class Scaled(PagedSequences):
        def _normal(self, rows: int, width: int) -> Any:
            drawn = super()._normal(rows, width)
            drawn[:, : spec.heads * spec.head_dim] *= magnitude
            return drawn

    sequences = Scaled(Rig(EmulatedProvider(), card), spec, np.random.default_rng(5), [[1, 2]])
    found, expected = sequences.step({0: 7})
    compare(found, expected, 1e-6, spec)


def test_values_beyond_halves_are_multiplied_as_float32(device: CudaDevice) -> None:
    rig, rng = Rig(EmulatedProvider(), device), np.random.default_rng(5)
    host = random_weight(rng, "Q8_0", 16, 64, frozenset({"matmul"}))
    blocks = host.data.copy().reshape(-1, 34)
    blocks[0, :2] = np.array([60000], np.float16).view(np.uint8)
    large = type(host)(**{**vars(host), "data": blocks.reshape(-1)})
    weight, x = device.weight(large), rng.standard_normal((12, 64), np.float32)
    assert (weight.kind, device.weight(host).kind) == ("f32", "f16")
    spec = MatmulSpec(max_tokens=16, rows=16, cols=64, type="Q8_0")
    kernel = rig.bind("matmul", spec)
    (found,) = rig.call(kernel, spec, out=rig.output(12, 16), x=rig.input(x), w=weight, bias=None)
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
