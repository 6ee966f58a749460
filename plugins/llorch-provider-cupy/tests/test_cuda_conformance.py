"""The conformance suite over an emulated card: the kernels as they are, every operation, whole models.

A selection, for its time: `pytest --pyargs llorch.providers.conformance --provider cuda-emulated` with the same path
takes all of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulator.runtime import NO_COMPILER, compiler

WIDE = "not test_models and not matmul_shapes and not gate_up and not head_geometries and not real_sizes"
SELECTION = {
    "operations": f"{WIDE} and not test_attention and not test_device",
    "products": "(matmul_shapes and (257-768-7 or 48-512-33 or 1-256-2)) or (gate_up and offered)",
    # without attention over thousands of keys: half a minute here, whose threads run one after another
    "real sizes": "real_sizes and not thousands and (Q4_0 or Q6_K or not (matmul or gate_up))",
    "attention": f"test_attention and (({WIDE}) or (head_geometries and (8-1 or 6-3)))",
    "device": "test_device",
    "models": "(greedy_tokens_equal and (Q4_0 or Q6_K or F16)) or share_steps or (every_position and Q5_K)",
}


PAIR = {
    "operations and device": "test_device or ((test_add or embed or topk or rope or tied) and (Q8_0 or not matmul) "
    "and not test_models and not gate_up and not test_attention and not real_sizes)",
    "models": "test_models and ((greedy_tokens_equal and tied) or share_steps)",
}


@pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)
@pytest.mark.parametrize("part", SELECTION)
def test_the_suite_passes(site: Path, part: str) -> None:
    run_suite(site, "cuda-emulated", SELECTION[part])


@pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)
@pytest.mark.parametrize("part", PAIR)
def test_the_suite_passes_over_two_cards(site: Path, part: str) -> None:
    run_suite(site, "cuda-emulated-pair", PAIR[part])


# scores of a thousand: queries in halves leave them errors that the softmax of near ties shows
TENSOR_CORES = (
    "test_attention and not hundreds and (head_geometries and (8-1 or 6-3) and (64 or 80 or 128) or one_batch"
)
TENSOR_CORES += " or window or soft_cap or padding)"


@pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)
def test_the_suite_passes_with_prompts_on_tensor_cores(site: Path) -> None:
    run_suite(site, "cuda-emulated-tensor-cores", TENSOR_CORES)


# each kernel of attention, norms, products and top-k, and steps whose neighbours are joined: the whole takes long
RACES = (
    "(head_geometries and 8-1-64) or (matmul_group and 33 and Q6_K and offered) or (gate_up and Q4_K and offered "
    "and True) or (test_topk and 300) or (test_rmsnorm and 33) or (test_rope and 3) or test_gather or one_tied "
    "or share_steps"
)


@pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)
def test_no_kernel_races(site: Path) -> None:
    run_suite(site, "cuda-emulated", RACES, LLORCH_EMULATOR_RACES="1")


def run_suite(site: Path, provider: str, selection: str, **settings: str) -> None:
    path = os.pathsep.join([str(site), str(Path(__file__).parent)])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--pyargs", "llorch.providers.conformance", "--provider", provider, "-k", selection]
    environment = {**os.environ, "PYTHONPATH": path, **settings}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
