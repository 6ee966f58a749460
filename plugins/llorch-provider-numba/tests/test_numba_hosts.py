"""Instruction sets: which one is taken, what their kernels are made of, and that every runnable one is right."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import llvmlite.binding as llvm
import numpy as np
import pytest
from llorch_provider_numba import emitter, hosts, provider
from llorch_provider_numba.compiler import optimised, softmax_kernels
from llorch_provider_numba.formats import FORMATS, SEGMENT
from llorch_provider_numba.operations import NumbaOps

from llorch.errors import ProviderUnavailableError
from llorch.providers import MatmulSpec
from llorch.providers.conformance.weights import random_weight, values_of


@pytest.mark.parametrize("isa", hosts.usable())
@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_products_of_every_host_path_here(isa: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hosts.VARIABLE, isa)
    rng = np.random.default_rng(1)
    host = random_weight(rng, kind, 40, 512, frozenset({"matmul"}))
    x = rng.standard_normal((7, 512), dtype=np.float32)
    expected = x.astype(np.float64) @ values_of(host).T
    device = provider.open()
    try:
        out, kernel = (
            device.empty((7, 40), "float32"),
            NumbaOps().matmul(device=device, spec=MatmulSpec(max_tokens=8, rows=40, cols=512, type=kind)),
        )
        kernel(out, x, device.weight(host), None)
    finally:
        device.close()
    error = ((out - expected) ** 2).sum() / (expected**2).sum()
    exact = kind in ("F32", "F16", "BF16") or not hosts.HOSTS[isa].rounds
    assert error < (1e-10 if exact else 5e-4)
    assert error > 1e-9 or exact, "activations were not rounded: another path ran"


@pytest.mark.parametrize("isa", hosts.usable())
def test_the_softmax_of_every_host_path_here(isa: str) -> None:
    """Rows that see different columns, none, and -inf beyond float32's smallest exponential."""
    kernels = softmax_kernels(hosts.HOSTS[isa])
    for rows, address in kernels.items():
        rng = np.random.default_rng(rows)
        scores = (10 * rng.standard_normal((rows, SEGMENT))).astype(np.float32)
        scores[0, 5] = -np.inf
        low = np.array([3 * r for r in range(rows)], np.int32)
        high = np.array([200 - 5 * r if r != 3 else low[r] for r in range(rows)], np.int32)
        largest, sums, weights = low.copy(), high.copy(), np.full((SEGMENT, rows), 7, np.float32)
        kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)(address)
        kernel(scores.ctypes.data, 0, 13, weights.ctypes.data, largest.ctypes.data, sums.ctypes.data)
        for r in range(rows):
            seen = scores[r, low[r] : high[r]].astype(np.float64)
            expected = np.zeros(208)
            expected[low[r] : high[r]] = np.exp(seen - seen.max(initial=-np.inf)) if len(seen) else 0
            np.testing.assert_allclose(weights[:208, r], expected, rtol=5e-6, atol=1e-30)
            assert sums.view(np.float32)[r] == pytest.approx(expected.sum(), rel=1e-6)
            assert largest.view(np.float32)[r] == seen.max(initial=-np.inf)
        assert (weights[208:] == 7).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q6_K", "IQ4_XS"])
def test_neon_kernels_use_sdot(kind: str) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = "aarch64-unknown-linux-gnu"
    text = str(emitter.product_module(FORMATS[kind], hosts.HOSTS["neon"], triple))
    assert "llvm.aarch64.neon.sdot.v4i32.v16i8" in text
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu="", features="+dotprod", opt=2)
    assembly = machine.emit_assembly(optimised(text, machine))
    assert assembly.count("sdot") >= 32
    assert ("neon.tbl1" in text) == (kind == "IQ4_XS")


def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hosts.VARIABLE, "mmx")
    with pytest.raises(ProviderUnavailableError, match=r"LLORCH_NUMBA_ISA=mmx: there is no such path.*float"):
        provider.devices()


def test_listing_the_provider_imports_no_numba() -> None:
    code = "import sys; from llorch_provider_numba import provider; assert not {'numba', 'llvmlite'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, timeout=60)
