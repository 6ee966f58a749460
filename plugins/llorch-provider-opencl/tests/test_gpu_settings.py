"""The kernels as a GPU runs them (one lane a work-item, shared columns, work-groups), on whatever device is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from llorch_provider_opencl import provider
from llorch_provider_opencl.device import OpenCLDevice
from llorch_provider_opencl.formats import FORMATS
from llorch_provider_opencl.products import Product
from llorch_provider_opencl.quirks import settings_for

from llorch.providers import AddRMSNormSpec, AddSpec, AttentionSpec, MatmulSpec, RMSNormSpec, TopkSpec
from llorch.providers.conformance import oracle
from llorch.providers.conformance.paged import PagedSequences
from llorch.providers.conformance.rig import EXACT, Rig, compare
from llorch.providers.conformance.weights import random_weight, values_of, vector


@pytest.fixture(scope="module")
def gpu_rig(device: Any) -> Iterator[Rig]:
    settings = settings_for(replace(device.traits, is_cpu=False, platform="a GPU's", max_group=64))
    assert (settings.width, settings.max_splits) == (1, 2)
    opened = OpenCLDevice(device._device, device.info, settings)
    yield Rig(provider, opened)
    opened.close()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("kind", FORMATS)
def test_products_with_shared_columns(gpu_rig: Rig, rng: np.random.Generator, kind: str, tokens: int) -> None:
    spec = MatmulSpec(max_tokens=16, rows=50, cols=768, type=kind)
    assert Product(gpu_rig.device, spec).variant(tokens).splits == 2  # type: ignore[arg-type]
    host, x = random_weight(rng, kind, 50, 768, frozenset({"matmul"})), rng.standard_normal((tokens, 768), np.float32)
    kernel, weight = gpu_rig.bind("matmul", spec), gpu_rig.device.weight(host)
    (found,) = gpu_rig.call(kernel, spec, out=gpu_rig.output(tokens, 50), x=gpu_rig.input(x), w=weight, bias=None)
    compare(found, oracle.matmul(x.astype(np.float64), values_of(host)), EXACT, spec)


def test_a_row_is_the_same_alone_and_among_others(gpu_rig: Rig, rng: np.random.Generator) -> None:
    spec = MatmulSpec(max_tokens=16, rows=50, cols=768, type="Q4_K")
    weight = gpu_rig.device.weight(random_weight(rng, "Q4_K", 50, 768, frozenset({"matmul"})))
    x, kernel, rows = rng.standard_normal((11, 768), np.float32), gpu_rig.bind("matmul", spec), []
    for count in (1, 2, 3, 11):
        out, device_x = gpu_rig.output(count, 50), gpu_rig.input(x[:count])
        (found,) = gpu_rig.call(kernel, spec, out=out, x=device_x, w=weight, bias=None)
        rows.append(found[0])
    for row in rows[1:]:
        np.testing.assert_array_equal(row, rows[0])


def test_attention_in_work_groups(gpu_rig: Rig, rng: np.random.Generator) -> None:
    spec = AttentionSpec(
        max_tokens=128, heads=4, kv_heads=2, head_dim=80, scale=80**-0.5, block_size=16, max_blocks=10,
        max_sequences=4, cache_dtype="f32", window=50,
    )  # fmt: skip
    sequences = PagedSequences(gpu_rig, spec, rng, [[3, 1, 9, 2, 7], [4, 5, 6, 8, 10]])
    for counts in ({0: 70, 1: 3}, {0: 1, 1: 1}):
        compare(*sequences.step(counts), EXACT, spec)


def test_norms_and_the_largest_in_work_groups(gpu_rig: Rig, rng: np.random.Generator) -> None:
    add, norm = AddSpec(max_tokens=4, dim=333), RMSNormSpec(max_tokens=4, dim=333, eps=1e-5)
    spec = AddRMSNormSpec(max_tokens=4, add=add, norm=norm)
    x, y, w = (rng.standard_normal(shape, np.float32) for shape in ((3, 333), (3, 333), 333))
    kernel, weight = gpu_rig.bind("add_rmsnorm", spec), gpu_rig.device.weight(vector("v", w))
    found, _ = gpu_rig.call(
        kernel, spec, out=gpu_rig.output(3, 333), x=gpu_rig.in_place(x), y=gpu_rig.input(y), weight=weight
    )
    compare(found, oracle.rmsnorm(x.astype(np.float64) + y, w, 1e-5), EXACT, spec)

    logits = np.round(rng.standard_normal((3, 5000), np.float32) * 4)  # many equals
    topk = TopkSpec(max_tokens=4, vocab=5000, k=1)
    values, ids = gpu_rig.output(3, 1), gpu_rig.output(3, 1, dtype="int32")
    found = gpu_rig.call(gpu_rig.bind("topk", topk), topk, values=values, ids=ids, logits=gpu_rig.input(logits))
    np.testing.assert_array_equal(found[1][:, 0], logits.argmax(axis=1))
    np.testing.assert_array_equal(found[0][:, 0], logits.max(axis=1))
