"""A device under test: binds one operation, runs it between guards, and compares it with the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llorch.core.binder import Binder
from llorch.providers.conformance.oracle import nmse
from llorch.providers.device import Device, Provider
from llorch.providers.spec import Kernel, OpSpec, Tensor

GUARD_ROWS = 3
GUARD = np.float32(-12345.0)

# Limits of ../CHECKPOINTS: activations stay float32, or are rounded to int8 before a product
EXACT, ROUNDED = 1e-10, 5e-4


class Output:
    """A tensor that a kernel writes, with rows behind it that it must leave alone."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: str = "float32") -> None:
        self._device, self._shape, self._dtype = device, shape, dtype
        self._whole = device.empty((shape[0] + GUARD_ROWS, *shape[1:]), dtype)
        self.tensor = device.rows(self._whole, shape[0])

    def fill(self, values: npt.ArrayLike) -> None:
        """Sets what the kernel finds, and the guards."""
        whole = np.full((self._shape[0] + GUARD_ROWS, *self._shape[1:]), GUARD).astype(self._dtype)
        whole[: self._shape[0]] = values
        self._device.write(self._whole, whole)

    def read(self) -> npt.NDArray[Any]:
        whole = np.empty((self._shape[0] + GUARD_ROWS, *self._shape[1:]), self._dtype)
        self._device.read(self._whole, whole)
        guards = whole[self._shape[0] :]
        assert np.all(guards == GUARD.astype(self._dtype)), f"it wrote behind the {self._shape[0]} rows of its output"
        return whole[: self._shape[0]]


class Rig:
    """One opened device and the operations of its provider."""

    def __init__(self, provider: Provider, device: Device) -> None:
        self.provider, self.device = provider, device
        self.product_limit = ROUNDED if getattr(provider, "rounds_activations", False) else EXACT

    def bind(self, operation: str, spec: OpSpec, *, fused: bool = True) -> Kernel:
        binder = Binder(self.device, self.provider.operations(), self.provider.name, fused=fused)
        kernel = binder.bind(operation, spec)
        binder.finish()
        return kernel

    def tensor(self, values: npt.NDArray[Any]) -> Tensor:
        """A device tensor that holds a copy of a host array."""
        tensor = self.device.empty(values.shape, str(values.dtype))
        self.device.write(tensor, np.ascontiguousarray(values))
        return tensor

    def output(self, *shape: int, dtype: str = "float32") -> Output:
        return Output(self.device, shape, dtype)

    def bind_if_offered(self, operation: str, spec: OpSpec) -> Kernel | None:
        """For an optional operation that core cannot decompose."""
        return Binder(self.device, self.provider.operations(), self.provider.name).bind_if_offered(operation, spec)

    def call(
        self, kernel: Kernel, outputs: Sequence[Output], run: Callable[[], None], padded: int = 0
    ) -> list[npt.NDArray[Any]]:
        """Runs twice over different leftovers in the outputs; the results must not depend on them, to the bit.

        What a kernel writes to the last `padded` rows is its own affair.
        """
        results = []
        for leftover in (np.nan, 7.0):
            for output in outputs:
                output.fill(leftover if output._dtype == "float32" else 7)
            run()
            results.append([output.read() for output in outputs])
        for first, second in zip(*results, strict=True):
            rows = len(first) - padded
            assert np.array_equal(first[:rows], second[:rows], equal_nan=True), (
                "the result depends on what the output held before"
            )
        return results[0]


def describe(spec: OpSpec) -> str:
    fields = {k: v for k, v in vars(spec).items() if k not in ("label", "layer", "frequencies")}
    return f"{type(spec).__name__.removesuffix('Spec')}({', '.join(f'{k}={v}' for k, v in fields.items())})"


def compare(
    found: npt.NDArray[Any], expected: npt.NDArray[Any], limit: float, spec: OpSpec, energy: float = 0.0
) -> None:
    """Fails with operation, shape, weight type, the worst element and the NMSE.

    `energy`: the least sum of squares that the error is measured against, where expected values may nearly cancel out.
    """
    assert found.shape == expected.shape, f"{describe(spec)}: shape {found.shape}, expected {expected.shape}"
    error = np.abs(found.astype(np.float64) - expected)
    worst = np.unravel_index(int(np.nanargmax(np.where(np.isnan(error), np.inf, error))), error.shape)
    at = tuple(int(i) for i in worst)
    value = nmse(found, expected)
    if energy:
        value = min(value, float((error**2).sum() / energy))
    assert value <= limit, (
        f"{describe(spec)}, {found.shape}: NMSE {value:.2e}, at most {limit:.0e}; the worst element is {at}: "
        f"{found[at]!r}, expected {expected[at]!r}"
    )
