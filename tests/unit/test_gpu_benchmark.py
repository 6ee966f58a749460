"""The arithmetic of benchmarks/gpu.py, which no card is needed for, and what it says where there is none."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_limits  # noqa: E402
import gpu_models  # noqa: E402
from gpu_limits import SHAPES, Rates  # noqa: E402

LLAMA = SHAPES["llama2-7b"]
H200 = Rates(copy_gb_s=4300, tflop_s=790)


def test_the_products_hold_all_weights_but_embedding_and_norms() -> None:
    assert LLAMA.product_weights == 6_738_415_616 - 32000 * 4096 - 65 * 4096  # Llama 2 7B as published
    grouped = gpu_limits.Shape(4096, 32, 32, 8, 14336, 128256)
    assert grouped.product_weights == 8_030_261_248 - 128256 * 4096 - 65 * 4096  # Llama 3 8B


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4.5), ("Q8_0", 8.5), ("F16", 16), ("bf16", 16), ("Q6_K", 6.5625)])
def test_bytes_of_weights(kind: str, bits: float) -> None:
    assert gpu_limits.weight_bytes(1 << 20, kind) == bits / 8 * (1 << 20)


def test_bytes_of_the_cache() -> None:
    assert gpu_limits.cache_bytes(LLAMA, 1) == 2 * 32 * 4096 * 2  # keys and values, layers, width, bytes of a half
    assert gpu_limits.cache_bytes(gpu_limits.Shape(4096, 32, 32, 8, 14336, 128256), 512) == 512 * 2 * 32 * 1024 * 2


def test_decoding_one_sequence_waits_for_memory() -> None:
    seconds = (2 * LLAMA.product_weights + 512 * 524288) / 4.3e12
    assert gpu_limits.decode_limit(LLAMA, "F16", 512, 1, H200) == pytest.approx(1 / seconds)
    assert gpu_limits.decode_limit(LLAMA, "F16", 512, 1, H200) == pytest.approx(319, abs=1)
    # the cache is read for each sequence, the weights once for all
    together = gpu_limits.decode_limit(LLAMA, "F16", 512, 64, H200)
    assert together == pytest.approx(64 / ((2 * LLAMA.product_weights + 64 * 512 * 524288) / 4.3e12))


def test_a_prompt_waits_for_arithmetic() -> None:
    operations = 2 * (LLAMA.product_weights - 32000 * 4096) * 2048
    operations += 4 * 32 * 4096 * 2048 * 2049 // 2 + 2 * 32000 * 4096
    assert gpu_limits.prefill_limit(LLAMA, "Q4_0", 2048, H200) == pytest.approx(2048 / (operations / 790e12))
    slow = Rates(copy_gb_s=1, tflop_s=790)
    assert gpu_limits.prefill_limit(LLAMA, "Q4_0", 2048, slow) == pytest.approx(
        2048 / (LLAMA.product_weights * 0.5625 / 1e9)
    )


def test_the_plan_for_500_tokens_a_second() -> None:
    planned = gpu_limits.predicted(LLAMA, "Q4_0", H200)
    assert planned["products"] == pytest.approx(1.13e-3, rel=0.01)
    assert planned["launches"] == pytest.approx(0.384e-3)
    assert 1 / sum(planned.values()) == pytest.approx(520, abs=5)


def test_the_limits_of_the_steps_add_up_to_that_of_the_whole() -> None:
    layers = dict.fromkeys(LLAMA.matrices, 32) | {"attention": 32, "output": 1}
    found = sum(n * (gpu_limits.step_limit(LLAMA, label, "Q8_0", 512, H200) or 0) for label, n in layers.items())
    assert 1 / found == pytest.approx(gpu_limits.decode_limit(LLAMA, "Q8_0", 512, 1, H200))
    assert gpu_limits.step_limit(LLAMA, "ffn_norm", "Q8_0", 512, H200) is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
def test_a_model_of_random_weights_has_the_shape_and_type(kind: str, tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    path = gpu_models.write(tmp_path / "model.gguf", shape, kind, 64)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    matrices = [t for t in tensors.values() if len(t.shape) == 2 and t.name != "token_embd.weight"]
    assert {t.tensor_type.name for t in matrices} == {kind}
    assert sum(int(np.prod(t.shape)) for t in matrices) == shape.product_weights
    assert sum(int(t.n_bytes) for t in matrices) == gpu_limits.weight_bytes(shape.product_weights, kind)


def test_the_hosts_part_of_a_step_is_measured_without_a_card() -> None:
    pytest.importorskip("llorch_provider_cupy")
    command = [sys.executable, str(BENCHMARKS / "gpu_host.py"), "--sequences", "3", "--tokens", "12", "--rounds", "2"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = [re.fullmatch(r" +(\d+) sequences: (\d+) us a step \(\d+ to \d+\)", line) for line in said.splitlines()]
    assert [match[1] for match in found if match] == ["1", "3"]
    assert all(int(match[2]) > 0 for match in found if match)


def test_without_a_card_it_says_so_in_one_line() -> None:
    from llorch.errors import ProviderError
    from llorch.providers import registry

    try:
        registry.choose("cupy-cuda")[0].devices()
    except ProviderError:
        done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("benchmarks/gpu.py needs a card: ")
    else:
        pytest.skip("there is a card: benchmarks/gpu.py would run")
