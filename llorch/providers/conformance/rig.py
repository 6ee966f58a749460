"""A device under test: binds one operation, runs it between guards, and compares it with the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llorch.core.binder import Binder
from llorch.providers.conformance.oracle import nmse
from llorch.providers.conformance.trial import Input, Output, WrongKernelError, empty, run_twice
from llorch.providers.decompose import Decomposed
from llorch.providers.device import Device, Provider
from llorch.providers.spec import OPTIONAL, GateUpSwigluSpec, Kernel, MatmulSpec, OpSpec, Tensor

# Limits of ../CHECKPOINTS: activations stay float32, or are rounded to int8 before a product
EXACT, ROUNDED = 1e-10, 5e-4


class Rig:
    """One opened device and the operations of its provider."""

    def __init__(self, provider: Provider, device: Device) -> None:
        self.provider, self.device = provider, device
        self.product_limit = ROUNDED if getattr(provider, "rounds_activations", False) else EXACT

    def bind(self, operation: str, spec: OpSpec, *, fused: bool = True) -> Kernel:
        """The kernel of one site. Skips the test where an optional one is wanted (`fused`) that the provider declines.

        Otherwise core's decomposition would be tested in its name.
        """
        operations = self.provider.operations()
        binder = Binder(self.device, operations, self.provider.name, fused=fused)
        kernel = binder.bind(operation, spec)
        binder.finish()
        if fused and operation in OPTIONAL and isinstance(kernel, Decomposed):
            pytest.skip(_declined(operations, operation))
        return kernel

    def bind_offered(self, operation: str, spec: OpSpec) -> Kernel:
        """For an optional operation that core cannot decompose: skips the test where it is declined."""
        operations = self.provider.operations()
        kernel = Binder(self.device, operations, self.provider.name).bind_if_offered(operation, spec)
        if kernel is None:
            pytest.skip(_declined(operations, operation))
        return kernel

    def tensor(self, values: npt.NDArray[Any]) -> Tensor:
        """A device tensor that holds a copy of a host array."""
        tensor = empty(self.device, values.shape, str(values.dtype))
        self.device.write(tensor, np.ascontiguousarray(values))
        return tensor

    def input(self, values: npt.NDArray[Any]) -> Input:
        """What `call` gives to a kernel, and looks at again afterwards."""
        return Input(self.device, values, self.tensor(values))

    def output(self, *shape: int, dtype: str = "float32") -> Output:
        """What a kernel writes, whatever it held."""
        return Output(self.device, shape, dtype)

    def in_place(self, values: npt.NDArray[Any]) -> Output:
        """What a kernel reads and writes."""
        return Output(self.device, values.shape, str(values.dtype), values)

    def call(self, kernel: Kernel, spec: OpSpec, padded: int = 0, /, **arguments: Any) -> list[npt.NDArray[Any]]:
        """Runs a kernel twice, over different leftovers in what it writes. Returns the contents of its outputs.

        `arguments` are the kernel's by the names of the contract, in its order: of `output`, `in_place` and `input`,
        weights, and whatever else it takes. Raises AssertionError, which says what is wrong, where an output was not
        written or depends on the leftovers, or something else was. The last `padded` rows of outputs are the kernel's
        own affair.
        """
        try:
            return run_twice(kernel, arguments, padded)
        except WrongKernelError as error:
            raise AssertionError(f"{describe(spec)}: {error}") from None


def _declined(operations: object, operation: str) -> str:
    if getattr(operations, operation, None) is None:
        return f"the provider offers no {operation}"
    return f"the provider offers no {operation} here: its factory returned None (to decline, or a `return` is missing)"


def describe(spec: OpSpec) -> str:
    fields = {k: v for k, v in vars(spec).items() if k not in ("label", "layer", "frequencies")}
    return f"{type(spec).__name__.removesuffix('Spec')}({', '.join(f'{k}={v}' for k, v in fields.items())})"


def compare(
    found: npt.NDArray[Any], expected: npt.NDArray[Any], limit: float, spec: OpSpec, energy: float = 0.0
) -> None:
    """Raises AssertionError with operation, shape, weight type, the worst element and the NMSE.

    `energy`: the least sum of squares that the error is measured against, where expected values may nearly cancel out.
    """
    if found.shape != expected.shape:
        raise AssertionError(f"{describe(spec)}: shape {found.shape}, expected {expected.shape}")
    error = np.abs(found.astype(np.float64) - expected)
    worst = np.unravel_index(int(np.nanargmax(np.where(np.isnan(error), np.inf, error))), error.shape)
    at = tuple(int(i) for i in worst)
    value = nmse(found, expected)
    if energy:
        value = min(value, float((error**2).sum() / energy))
    if not value <= limit:  # NaN is no pass
        raise AssertionError(
            f"{describe(spec)}, {found.shape}: NMSE {value:.2e}, at most {limit:.0e}; the worst element is {at}: "
            f"{found[at]!r}, expected {expected[at]!r}{_rounding_hint(value, limit, spec)}"
        )


def compare_bits(found: npt.NDArray[Any], expected: npt.NDArray[Any], spec: OpSpec) -> None:
    """For operations that leave nothing to rounding."""
    compare(found, expected, 0.0, spec)


def _rounding_hint(value: float, limit: float, spec: OpSpec) -> str:
    """Where a product is as far off as rounded activations put it, and the provider does not say that it rounds."""
    is_product = isinstance(spec, MatmulSpec | GateUpSwigluSpec)
    if is_product and limit < ROUNDED and value <= limit / EXACT * ROUNDED:
        return "; if it rounds activations (to int8 or half), declare rounds_activations = True"
    return ""
