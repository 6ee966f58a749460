"""A kernel run twice, over different leftovers and between guards, and what it did wrong in its author's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from llorch.providers.device import Device
from llorch.providers.spec import Kernel, Tensor

Array = npt.NDArray[Any]

GUARD_ROWS = 3
GUARD = np.float32(-12345.0)
LEFTOVERS: dict[str, tuple[float, float]] = {"float32": (np.nan, 7.0), "int32": (-7, 7)}  # of the first and second run


class WrongKernelError(AssertionError):
    """What a kernel did that it must not."""


def empty(device: Device, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Device memory. Raises AssertionError where it is of another dtype than was asked for."""
    tensor = device.empty(shape, dtype)
    if dtype_name(tensor) != dtype:
        raise AssertionError(f"the device's empty({shape}, {dtype!r}) gives a tensor of dtype {tensor.dtype}")
    return tensor


def dtype_name(tensor: Tensor) -> str:
    """ "float32" of NumPy's dtype as of another library's ("torch.float32")."""
    try:
        return str(np.dtype(tensor.dtype))
    except TypeError:
        return str(tensor.dtype).rpartition(".")[2]


class Input:
    """A tensor that a kernel reads, and the host's copy of it."""

    def __init__(self, device: Device, values: Array, tensor: Tensor) -> None:
        self._device, self._values, self.tensor = device, values, tensor

    def is_changed(self) -> bool:
        now = np.empty_like(self._values)
        self._device.read(self.tensor, now)
        return not np.array_equal(now, self._values, equal_nan=True)


class Output:
    """A tensor that a kernel writes, with rows behind it that it must leave alone.

    `start`: what it holds before, of a kernel that works in place.
    """

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: str, start: Array | None = None) -> None:
        self._device, self._shape, self._dtype, self.start = device, shape, dtype, start
        self._whole = empty(device, (shape[0] + GUARD_ROWS, *shape[1:]), dtype)
        self.tensor = device.rows(self._whole, shape[0])

    def before(self, run: int) -> Array:
        """What the kernel finds in the first and in the second run."""
        return np.full(self._shape, LEFTOVERS[self._dtype][run], self._dtype) if self.start is None else self.start

    def fill(self, values: npt.ArrayLike) -> None:
        """Sets what the kernel finds, and the guards."""
        whole = np.full((self._shape[0] + GUARD_ROWS, *self._shape[1:]), GUARD).astype(self._dtype)
        whole[: self._shape[0]] = values
        self._device.write(self._whole, whole)

    def read(self) -> Array:
        """Raises WrongKernelError where the guards are overwritten."""
        whole = np.empty((self._shape[0] + GUARD_ROWS, *self._shape[1:]), self._dtype)
        self._device.read(self._whole, whole)
        if not np.all(whole[self._shape[0] :] == GUARD.astype(self._dtype)):
            raise WrongKernelError(f"it wrote behind the {self._shape[0]} rows of its output")
        return whole[: self._shape[0]]


def run_twice(kernel: Kernel, arguments: dict[str, Any], padded: int) -> list[Array]:
    """What the first of two runs left in the outputs among the arguments.

    Raises WrongKernelError where the second run, over other leftovers, gives something else, or the kernel did what it
    must not. The last `padded` rows of an output may hold anything.
    """
    outputs = {value: name for name, value in arguments.items() if isinstance(value, Output)}
    runs = []
    for turn in (0, 1):
        returned = _run(kernel, arguments, turn)
        runs.append([output.read() for output in outputs])
        _check_inputs(arguments)
    for (output, name), first, second in zip(outputs.items(), *runs, strict=True):
        rows = len(first) - padded
        untouched = _same(first, output.before(0)) & _same(second, output.before(1))
        if returned is not None and untouched[:rows].all():
            raise WrongKernelError(f"it returned {_a(returned)}, which is ignored: write into the first argument")
        if output.start is None:
            _check_all_written(untouched[:rows], f" of its argument {name}" if len(outputs) > 1 else "")
        if len(different := np.argwhere(~_same(first, second)[:rows])):
            raise WrongKernelError(
                f"two runs differ at {_place(different[0])}: it depends on what the output held before, or on chance"
            )
    return runs[0]


def _run(kernel: Kernel, arguments: dict[str, Any], turn: int) -> Any:
    for value in arguments.values():
        if isinstance(value, Output):
            value.fill(value.before(turn))
    run: Callable[..., Any] = kernel  # it should return nothing
    return run(*(value.tensor if isinstance(value, Input | Output) else value for value in arguments.values()))


def _check_inputs(arguments: dict[str, Any]) -> None:
    for number, (name, value) in enumerate(arguments.items(), start=1):
        if isinstance(value, Input) and value.is_changed():
            raise WrongKernelError(f"it changed its argument {number} ({name})")


def _check_all_written(untouched: npt.NDArray[np.bool_], where: str) -> None:
    if untouched.all():
        raise WrongKernelError(f"it wrote nothing{where}: a kernel writes into its first argument")
    if len(places := np.argwhere(untouched)):
        raise WrongKernelError(
            f"it did not write {len(places)} of {untouched.size} elements{where}, first at {_place(places[0])}"
        )


def _same(one: Array, other: Array) -> npt.NDArray[np.bool_]:
    same: npt.NDArray[np.bool_] = (one == other) | ((one != one) & (other != other))  # NaN is the same as NaN
    return same


def _place(index: npt.NDArray[np.intp]) -> tuple[int, ...]:
    return tuple(int(i) for i in index)


def _a(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' or name == 'ndarray' else 'a'} {name}"
