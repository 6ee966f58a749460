"""`llorch compare`: a model on two providers, value by value, down to the first that differs."""

from __future__ import annotations

import json
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llorch
from llorch import cli
from llorch.commands._values import Run, compared
from llorch.providers import registry
from llorch.providers.array import ArrayDevice
from llorch.providers.conformance.models import TinyModel, write_model
from tests.unit.plugins import install

# A provider whose operations are `{body}` on top of right ones.
SOURCE = """
import dataclasses

import numpy as np

from llorch.providers import hookimpl
from llorch.providers.array import ArrayOps, ArrayProvider


class Operations(ArrayOps):
    {body}


class Provider(ArrayProvider):
    name, summary, requires, api_version, priority = "{name}", "of the tests", "nothing", 1, -1
    operations_type = Operations
    rounds_activations = {rounds}


provider = Provider()
"""
OTHER_PAIRING = """
    @hookimpl
    def rope(self, device, spec):
        return super().rope(device, dataclasses.replace(spec, pairing="half"))
"""
NAN_IN_THE_SECOND_LAYER = """
    @hookimpl
    def swiglu(self, device, spec):
        right = super().swiglu(device, spec)

        def kernel(out, gate, up):
            right(out, gate, up)
            out[1, 3] = np.nan

        return right if spec.layer == 0 else kernel
"""
SLIGHTLY_OFF = """
    @hookimpl
    def embed(self, device, spec):
        right = super().embed(device, spec)

        def kernel(out, tokens, table):
            right(out, tokens, table)
            out *= 1 + 1e-3

        return kernel
"""
RAISES = """
    @hookimpl
    def rmsnorm(self, device, spec):
        return (lambda out, x: None) if spec.label == "blk.1.ffn_norm" else super().rmsnorm(device, spec)
"""
Compare = Callable[..., tuple[int, str]]


@pytest.fixture
def provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a provider with these operations."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def add(name: str, body: str = "pass", *, rounds: bool = False) -> None:
        install(tmp_path, name, SOURCE.format(name=name, body=body, rounds=rounds))

    yield add
    for module in set(sys.modules) - before:
        if module.startswith("llorch_provider_"):
            del sys.modules[module]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(TinyModel(), tmp_path / "model.gguf")


@pytest.fixture
def compare(model: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    """The command's exit status, and what it prints."""

    def run(*argv: str) -> tuple[int, str]:
        status = cli.main(["compare", str(model), *argv])
        captured = capsys.readouterr()
        return status, captured.out or captured.err

    return run


def test_two_right_providers_agree_on_every_value(compare, provider) -> None:
    provider("mine")
    status, printed = compare("--provider", "mine")
    assert status == 0
    assert printed.startswith("all 34 values agree within 1e-9: the largest NMSE is ")
    assert printed.count("\n") == 1


def test_the_first_value_that_differs_is_that_of_the_wrong_operation(compare, provider) -> None:
    provider("wrong", OTHER_PAIRING)
    status, printed = compare("--provider", "wrong")
    assert status == 1
    *table, first, count = printed.rstrip().splitlines()
    assert first.startswith("the first that differs is blk.0.q_rope (rope): NMSE ")
    assert ", numpy-cpu has " in first
    assert count.split()[1:3] == ["of", "34"]
    assert count.split("; ")[0].endswith("values do not agree within 1e-9")
    assert next(line for line in table if "blk." in line).split()[:2] == ["blk.0.q_rope", "rope"]
    assert not any("attn_q" in line.split() for line in table)


def test_a_value_that_is_not_a_number_is_found_with_its_place(compare, provider) -> None:
    provider("broken", NAN_IN_THE_SECOND_LAYER)
    status, printed = compare("--provider", "broken", "--limit", "1e6")
    assert status == 1
    assert re.search(
        r"blk.1.ffn_swiglu \(swiglu\): NMSE nan, 1 of \d+ elements not finite, the first, \[1, 3\], is nan", printed
    )


def test_json_has_a_line_for_each_value_in_the_order_of_the_plan(compare, provider, model) -> None:
    provider("broken", NAN_IN_THE_SECOND_LAYER)
    status, printed = compare("--provider", "broken", "--json", "--tokens", "7")
    assert status == 1
    lines = [json.loads(line, parse_constant=pytest.fail) for line in printed.splitlines()]
    with llorch.load(model, provider="numpy-cpu") as llm:
        assert {line["label"]: line["operation"] for line in lines} == llm.labels()
        assert [line["label"] for line in lines] == list(llm.labels())
    assert lines[0] == {
        "provider": "broken", "against": "numpy-cpu", "label": "token_embd", "operation": "embed", "shape": [7, 256],
        "agrees": True, "nmse": 0.0, "limit": 1e-9, "not_finite": 0, "worst": [0, 0],
        "found": lines[0]["expected"], "expected": lines[0]["expected"],
    }  # fmt: skip
    wrong = next(line for line in lines if not line["agrees"])
    assert (wrong["label"], wrong["nmse"], wrong["found"], wrong["worst"]) == ("blk.1.ffn_swiglu", None, None, [1, 3])


def test_the_limit_is_wider_for_a_provider_that_rounds_and_can_be_set(compare, provider) -> None:
    provider("off", SLIGHTLY_OFF)
    provider("rounding", SLIGHTLY_OFF, rounds=True)
    assert compare("--provider", "off")[0] == 1
    assert compare("--provider", "off", "--limit", "1e-4")[1].startswith("all 34 values agree within 0.0001")
    status, printed = compare("--provider", "rounding")
    assert (status, printed.partition(":")[0]) == (0, "all 34 values agree within 0.005")


def test_nothing_of_the_first_device_is_left_when_the_second_is_opened(compare, provider, monkeypatch) -> None:
    provider("one")
    provider("two")
    loaded: list[str] = []
    closed: list[weakref.ref[ArrayDevice]] = []
    load, close = registry.load, ArrayDevice.close

    def loading(name: str) -> Any:
        assert [device() for device in closed] == [None] * len(loaded)
        loaded.append(name)
        return load(name)

    def closing(device: ArrayDevice) -> None:
        closed.append(weakref.ref(device))
        close(device)

    monkeypatch.setattr(registry, "load", loading)
    monkeypatch.setattr(ArrayDevice, "close", closing)
    assert compare("--provider", "one", "--against", "two")[0] == 0
    assert loaded == ["one", "two"]


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--tokens", "65"], 2, "65 tokens are more than the 64 of one step: give --tokens 64"),
        (["--limit", "0"], 2, "--limit: expected a number, above 0, not '0'"),
        (["--against", "nowhere"], 1, "no provider 'nowhere' is installed"),
    ],
)
def test_what_cannot_be_compared_is_an_error(compare, argv, status, message) -> None:
    found, printed = compare("--provider", "numpy-cpu", *argv)
    assert found == status
    assert message in printed


def test_a_kernel_that_raises_is_named(compare, provider) -> None:
    provider("raising", RAISES)
    status, printed = compare("--provider", "raising")
    assert status == 1
    assert "provider raising: its kernel for rmsnorm at blk.1.ffn_norm raised TypeError: " in printed


def test_zeros_agree_with_zeros_and_with_nothing_else() -> None:
    def run(value: float) -> Run:
        return Run("p", {"x": "add"}, {"x": np.full((2, 2), value, np.float32)}, rounds_activations=False)

    assert [v.agrees for v in compared(run(0), run(0), None)] == [True]
    assert [(v.agrees, v.worst) for v in compared(run(1), run(0), 1e9)] == [(False, (0, 0))]
    assert [v.agrees for v in compared(run(np.inf), run(np.inf), None)] == [False]
