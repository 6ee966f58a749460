"""`llorch bench --ops`: each operation at decode and prefill shapes beside what the device allows."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from llorch import cli
from llorch.commands import _op_cases, _op_timing
from llorch.commands._op_cases import Shapes
from llorch.commands._op_timing import OpBench, Rates
from llorch.core.binder import Binder
from llorch.providers import OPTIONAL, REQUIRED, AddSpec, AttentionSpec, Kernel, hookimpl, registry
from llorch.providers.array import ArrayDevice, ArrayOps, ArrayProvider

SMALL = ["--dim", "256", "--ffn", "512", "--heads", "4", "--kv-heads", "2", "--vocab", "300", "--context", "70"]
SHAPES = Shapes(dim=256, ffn=512, heads=4, kv_heads=2, vocab=300, context=70, prompt=8)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_op_cases, "CACHES", 2 << 20)
    monkeypatch.setattr(_op_timing, "SHORTEST", 0.0005)
    monkeypatch.setattr(_op_timing, "COPY_ROWS", 64)


def bench(*argv: str) -> int:
    return cli.main(["bench", "--ops", *SMALL, "-p", "8", "-r", "2", *argv])


def lines(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    assert bench("--json", *argv) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_operation_is_timed_at_decode_and_at_prefill(capsys) -> None:
    found = lines(capsys, "--provider", "numpy-cpu", "--weight-types", "Q4_0")
    for phase, tokens in (("decode", 1), ("prefill", 8)):
        here = [timing for timing in found if timing["phase"] == phase]
        expected = {*REQUIRED, *OPTIONAL} - ({"topk"} if phase == "prefill" else set())
        assert {timing["operation"] for timing in here} == expected
        assert {timing["tokens"] for timing in here} == {tokens}
    for timing in found:
        assert timing["seconds"] > 0
        assert timing["repetitions"] == 2
        assert timing["gb_s"] == pytest.approx(timing["bytes"] / timing["seconds"] / 1e9)
        floor = max(timing["bytes"] / timing["bandwidth_gb_s"], timing["flops"] / timing["float_gflop_s"]) / 1e9
        assert timing["limit_seconds"] == pytest.approx(floor)
        assert timing["bandwidth_gb_s"] == max(timing["copy_gb_s"], timing["matvec_gb_s"])


def test_who_computes_an_operation_is_told(capsys) -> None:
    found = lines(capsys, "--provider", "numpy-cpu", "--weight-types", "F32")
    by = {timing["operation"]: timing["by"] for timing in found}
    assert by["matmul"] == by["topk"] == "provider"
    assert by["add_rmsnorm"] == by["gate_up_swiglu"] == "core"


def test_products_are_timed_for_each_weight_type(capsys) -> None:
    found = lines(capsys, "--provider", "numpy-cpu", "--weight-types", "Q8_0", "--weight-types", "Q6_K")
    products = [(t["shape"], t["weight_type"]) for t in found if t["operation"] == "matmul" and t["phase"] == "decode"]
    shapes = ("512 x 256", "256 x 512")
    assert products == [(shape, kind) for kind in ("Q8_0", "Q6_K") for shape in shapes]


def test_the_table_says_what_the_device_has_shown(capsys) -> None:
    assert bench("--provider", "numpy-cpu", "--weight-types", "Q4_0") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("numpy-cpu on cpu: memory ")
    assert "decode, 1 token " in printed
    assert "prefill, 8 tokens" in printed
    for operation in (*REQUIRED, *OPTIONAL):
        assert operation in printed


def test_only_some_operations_are_timed(capsys) -> None:
    found = lines(capsys, "--provider", "numpy-cpu", "--only", "matmul, attention,topk", "--weight-types", "F32")
    assert [t["operation"] for t in found] == ["attention", "matmul", "matmul", "topk", "attention", "matmul", "matmul"]


def test_every_shape_between_the_products_has_the_tokens(capsys) -> None:
    found = lines(capsys, "--provider", "numpy-cpu", "--only", "rope,rope_pair,add")
    shapes = [(t["operation"], t["shape"]) for t in found if t["phase"] == "prefill"]
    assert shapes == [("add", "8 x 256"), ("rope", "8 x 4 x 64"), ("rope_pair", "8 x (4 + 2) x 64")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "matmull"], "--only: no operation 'matmull'; did you mean matmul?; there are embed, rmsnorm,"),
        (["--provider", "numpy-cpu", "--weight-types", "Q9_X"], "provider numpy-cpu does not take Q9_X for products"),
        (["--dim", "300"], "--dim: expected a multiple of 256, the block of many weight types, not 300"),
        (["--heads", "3"], "3 heads and 2 key heads of a width of 256"),
        (["--provider", ","], "--provider: expected names separated by commas, not ','"),
        (["--model", "x.gguf"], "unknown option --model"),
    ],
)
def test_what_cannot_be_timed_is_an_error(capsys, argv, message) -> None:
    assert bench(*argv) == 2
    assert message in capsys.readouterr().err


class RaisingOps(ArrayOps):
    @hookimpl
    def attention(self, device: ArrayDevice, spec: AttentionSpec) -> Kernel:
        return lambda out, q, k, v, cache: None

    @hookimpl
    def add(self, device: ArrayDevice, spec: AddSpec) -> Kernel:
        def kernel(out: Any, x: Any, y: Any) -> None:
            if len(x) == 8:
                raise ZeroDivisionError("eight")

        return kernel


class RaisingProvider(ArrayProvider):
    name, summary, requires, api_version, priority = "raising", "raises", "nothing", 1, 0
    operations_type = RaisingOps


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ("attention", r"its kernel for attention, 4 / 2 x 64, 70 keys raised TypeError: .* takes 5 positional"),
        ("add", "its kernel for add, 8 x 256 raised ZeroDivisionError: eight"),
    ],
)
def test_a_kernel_that_raises_is_named_with_its_shape(capsys, monkeypatch, operation, message) -> None:
    monkeypatch.setattr(registry, "choose", lambda _name: (RaisingProvider(), "of the test"))
    assert bench("--provider", "raising", "--only", operation) == 1
    assert re.search(f"provider raising: {message}", capsys.readouterr().err)


def test_an_operation_that_the_host_does_in_its_place_cannot_be_timed(capsys, monkeypatch) -> None:
    monkeypatch.setattr(registry, "choose", lambda _name: (SlowProvider(), "of the test"))
    assert bench("--provider", "slow", "--only", "topk") == 2
    assert "--only: provider slow does not offer topk, which the host does for it" in capsys.readouterr().err


# ---- the measurement itself ----


class SlowOps(ArrayOps):
    @hookimpl
    def add(self, device: ArrayDevice, spec: AddSpec) -> Kernel:
        return lambda out, x, y: time.sleep(0.004)


class SlowProvider(ArrayProvider):
    name, summary, requires, api_version, priority = "slow", "sleeps", "patience", 1, 0
    operations_type = SlowOps


def cases(tokens: int) -> dict[str, _op_cases.Case]:
    provider = SlowProvider()
    device = provider.open()
    found = _op_cases.Cases(device, Binder(device, provider.operations(), "slow"), SHAPES).every(tokens, ["F32"])
    return {case.operation: case for case in found}


def test_a_call_is_timed_and_not_the_reading_behind_it() -> None:
    provider = SlowProvider()
    device = provider.open()
    reading = device.read

    def slow_read(*args: Any) -> None:
        time.sleep(0.02)
        reading(*args)

    device.read = slow_read  # type: ignore[method-assign]
    timing = OpBench(provider, device, SHAPES, 3).timing(cases(1)["add"], "decode", 1, Rates(1.0, 2.0, 4.0))
    assert 0.004 <= timing.seconds < 0.012
    assert timing.limit_seconds == timing.bytes / 2e9


def test_the_share_is_of_the_limit_and_missing_where_caches_serve() -> None:
    provider, rates = SlowProvider(), Rates(1.0, 2.0, 4.0)  # given: those of a busy machine may make `add` arithmetic
    bench = OpBench(provider, provider.open(), SHAPES, 2)
    add, matmul = (bench.timing(cases(1)[name], "decode", 1, rates) for name in ("add", "matmul"))
    assert add.share_of_limit is None
    assert matmul.share_of_limit == pytest.approx(matmul.limit_seconds / matmul.seconds)


def test_bytes_and_arithmetic_are_what_the_shapes_say() -> None:
    decode, prefill = cases(1), cases(8)
    assert decode["matmul"].nbytes == 4 * (256 * 512 + 256 + 512)
    assert prefill["matmul"].flops == 2 * 8 * 256 * 512
    assert decode["add"].nbytes == 3 * 4 * 256
    keys_and_values = 2 * 70 * 2 * 64 * 4
    assert decode["attention"].nbytes == keys_and_values + 2 * 256 * 4 + 2 * 128 * 4
    assert decode["attention"].flops == 2 * 2 * 256 * 70  # every head with every key, and every value
    assert prefill["attention"].flops == 2 * 2 * 256 * sum(range(1, 9))
    assert "topk" not in decode  # this provider leaves it to the host


def test_weights_are_more_than_caches_hold_and_all_different_memory() -> None:
    case = cases(1)["matmul"]
    weights = [call[2] for call in case.calls]
    assert sum(weight.nbytes for weight in weights) >= _op_cases.CACHES
    assert len({id(weight) for weight in weights}) == len(weights) > 1
