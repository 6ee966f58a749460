"""What the conformance suite says of a kernel that is wrong, and that it takes one that is right."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llorch.providers import AddRMSNormSpec, AddSpec, MatmulSpec, RMSNormSpec, SwigluSpec, hookimpl
from llorch.providers.conformance import test_device
from llorch.providers.conformance.rig import EXACT, ROUNDED, Rig, compare
from llorch.providers.conformance.trial import dtype_name
from llorch.providers.numpy_cpu import NumpyDevice, NumpyOps, NumpyProvider, provider

SPEC = SwigluSpec(max_tokens=7, dim=3)
X = np.arange(1, 22, dtype=np.float32).reshape(7, 3)


@pytest.fixture
def rig() -> Rig:
    return Rig(provider, provider.open())


def complaint(rig: Rig, kernel: Callable[..., Any], **arguments: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        rig.call(kernel, SPEC, **(arguments or {"out": rig.output(7, 3), "x": rig.input(X)}))
    said = str(caught.value)
    assert said.startswith("Swiglu(max_tokens=7, dim=3): ")
    assert len(said) < 200, "a message, not a dump of arrays"
    return said.partition(": ")[2]


def copy(out: np.ndarray, x: np.ndarray) -> None:
    out[...] = x


# ---- what a kernel may do ----


def test_a_right_kernel_gives_its_outputs(rig: Rig) -> None:
    (found,) = rig.call(copy, SPEC, out=rig.output(7, 3), x=rig.input(X))
    np.testing.assert_array_equal(found, X)


def test_one_that_works_in_place_starts_from_the_same_twice(rig: Rig) -> None:
    def double(x: np.ndarray) -> None:
        x *= 2

    (found,) = rig.call(double, SPEC, x=rig.in_place(X))
    np.testing.assert_array_equal(found, 2 * X)


def test_padding_rows_may_hold_anything(rig: Rig) -> None:
    def all_but_two(out: np.ndarray, x: np.ndarray) -> None:
        out[:5] = x[:5]

    rig.call(all_but_two, SPEC, 2, out=rig.output(7, 3), x=rig.input(X))
    with pytest.raises(AssertionError):
        rig.call(all_but_two, SPEC, 1, out=rig.output(7, 3), x=rig.input(X))


# ---- what is wrong ----


def test_one_that_returns_its_result_is_told_where_to_write(rig: Rig) -> None:
    said = "it returned an ndarray, which is ignored: write into the first argument"
    assert complaint(rig, lambda out, x: 2 * x) == said
    assert complaint(rig, lambda x: 2 * x, x=rig.in_place(X)) == said


def test_one_that_writes_nothing(rig: Rig) -> None:
    assert complaint(rig, lambda out, x: None) == "it wrote nothing: a kernel writes into its first argument"


def test_one_that_leaves_elements_out_is_told_how_many_and_where(rig: Rig) -> None:
    assert complaint(rig, lambda out, x: copy(out[:6], x[:6])) == "it did not write 3 of 21 elements, first at (6, 0)"


def test_an_output_of_several_is_named(rig: Rig) -> None:
    arguments = {"values": rig.output(7, 3), "ids": rig.output(7, 2, dtype="int32"), "logits": rig.input(X)}

    def first_id(values: np.ndarray, ids: np.ndarray, logits: np.ndarray) -> None:
        values[...], ids[:, 0] = logits, 0

    said = complaint(rig, first_id, **arguments)
    assert said == "it did not write 7 of 14 elements of its argument ids, first at (0, 1)"


def test_one_that_overwrites_an_input(rig: Rig) -> None:
    def overwrite(out: np.ndarray, x: np.ndarray) -> None:
        out[...] = x
        x[2, 1] = 0

    assert complaint(rig, overwrite) == "it changed its argument 2 (x)"


def test_one_that_adds_to_what_was_there(rig: Rig) -> None:
    def accumulate(out: np.ndarray, x: np.ndarray) -> None:
        out += x

    assert complaint(rig, accumulate).startswith("two runs differ at (0, 0): it depends on what the output held before")


def test_one_that_writes_behind_its_output(rig: Rig) -> None:
    def overrun(out: np.ndarray, x: np.ndarray) -> None:
        out.base[...] = 0

    assert complaint(rig, overrun) == "it wrote behind the 7 rows of its output"


# ---- the device's types ----


class DoubleDevice(NumpyDevice):
    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return np.empty(shape)


def test_a_device_whose_memory_is_of_another_type_is_found_by_its_own_test_and_by_every_kernels() -> None:
    opened = provider.open()
    opened.__class__ = DoubleDevice
    wrong = Rig(provider, opened)
    said = r"the device's empty\(.*, 'float32'\) gives a tensor of dtype float64"
    for use in (
        lambda: test_device.test_empty_is_of_the_dtype_that_was_asked_for(wrong, "float32"),
        lambda: wrong.output(2, 3),
        lambda: wrong.input(X),
    ):
        with pytest.raises(AssertionError, match=said):
            use()


def test_dtypes_of_other_libraries_are_known_by_their_names() -> None:
    class TorchDtype:
        def __str__(self) -> str:
            return "torch.float32"

    for dtype in (np.dtype(np.float32), np.float32, "f4", TorchDtype()):
        assert dtype_name(SimpleNamespace(dtype=dtype)) == "float32"


# ---- fused operations ----

ADD_RMSNORM = AddRMSNormSpec(
    max_tokens=4, add=AddSpec(max_tokens=4, dim=8), norm=RMSNormSpec(max_tokens=4, dim=8, eps=1e-5)
)


class Forgetful(NumpyOps):
    @hookimpl
    def add_rmsnorm(self, spec: AddRMSNormSpec) -> Any:
        self.rmsnorm(spec.norm)  # no return


class ForgetfulProvider(NumpyProvider):
    def operations(self) -> Any:
        return Forgetful()


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (provider, "the provider offers no add_rmsnorm$"),
        (ForgetfulProvider(), "the provider offers no add_rmsnorm here: its factory returned None"),
    ],
)
def test_what_is_not_offered_is_skipped_and_not_tested_by_cores_own(chosen: Any, reason: str) -> None:
    rig = Rig(chosen, chosen.open())
    with pytest.raises(pytest.skip.Exception, match=reason):
        rig.bind("add_rmsnorm", ADD_RMSNORM)
    assert callable(rig.bind("add_rmsnorm", ADD_RMSNORM, fused=False))


# ---- comparing ----


@pytest.mark.parametrize(
    ("spec", "error", "limit", "hint"),
    [
        (MatmulSpec(max_tokens=7, rows=3, cols=8, type="Q8_0"), 1e-3, EXACT, True),
        (
            MatmulSpec(max_tokens=7, rows=3, cols=8, type="Q8_0"),
            1e-1,
            EXACT,
            False,
        ),  # as far off as no rounding puts it
        (MatmulSpec(max_tokens=7, rows=3, cols=8, type="Q8_0"), 1e-1, ROUNDED, False),  # it says that it rounds
        (SPEC, 1e-3, EXACT, False),
    ],
)
def test_a_product_that_seems_to_round_is_told_how_to_say_so(spec: Any, error: float, limit: float, hint: bool) -> None:
    with pytest.raises(AssertionError, match="NMSE") as caught:
        compare(X * np.float32(1 + error), X.astype(np.float64), limit, spec)
    declare = "if it rounds activations (to int8 or half), declare rounds_activations = True"
    assert (declare in str(caught.value)) == hint
