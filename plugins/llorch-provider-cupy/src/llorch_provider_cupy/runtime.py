"""The seam between this provider and a card: all that it asks of CUDA.

`cupy_runtime.py` has it on a card. The tests have it on the host, where the same kernels run compiled by g++. Work is
enqueued on one stream, in order; addresses are plain integers. One thread at a time calls a runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from llorch_provider_cupy.programs import Program

Plain: TypeAlias = Literal["f32", "f16", "bf16"]  # types that a product on tensor cores takes
PLAIN_BYTES: dict[Plain, int] = {"f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True)
class Properties:
    """What a card says of itself."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    piece: int  # bytes: memory is allocated in multiples of it


class Allocation(Protocol):
    """Device memory. It is given back when nothing refers to it, or by `release`."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def release(self) -> None: ...


class Gemm(NamedTuple):
    """out[tokens, rows] = x[tokens, cols] @ w[rows, cols].T, sums and results in float32. Strides are in elements."""

    kind: Plain  # of x and w
    out: int
    out_stride: int
    x: int
    x_stride: int
    w: int
    w_stride: int
    tokens: int
    rows: int
    cols: int


class Runtime(Protocol):
    @property
    def properties(self) -> Properties: ...
    def allocate(self, nbytes: int) -> Allocation:
        """Raises MemoryError where the card or the limit it was opened with has no room."""

    def upload(self, address: int, host: npt.NDArray[Any]) -> None:
        """Copies a contiguous array to the device; returns when it may be changed."""

    def send(self, address: int, host: npt.NDArray[Any]) -> None:
        """The same for a few kilobytes each step: from a staging copy, without waiting for the device."""

    def download(self, host: npt.NDArray[Any], address: int) -> None:
        """Copies from the device to a contiguous array, when all that is enqueued is done."""

    def copy(self, target: int, source: int, nbytes: int) -> None: ...
    def transfer(self, other: Any, target: int, source: int, nbytes: int) -> None:
        """Copies to the card of `other`, a runtime of the same kind: behind all that is enqueued on either of the two,
        before all that will be. Not to be recorded."""

    def function(self, program: Program, name: str) -> Any:
        """A kernel of a program, compiled where it was not yet. Raises ProviderError with the compiler's lines."""

    def launch(self, function: Any, grid: tuple[int, int, int], threads: int, arguments: Sequence[np.generic]) -> None:
        """Enqueues a kernel. An address is an np.uint64."""

    def gemm(self, product: Gemm) -> None: ...
    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Records what `run` enqueues, without doing it; returns what enqueues all of it at once."""

    def mark(self) -> Any:
        """A point behind all that is enqueued, for `seconds`."""

    def seconds(self, first: Any, second: Any) -> float:
        """The time between two marks, once the second is reached."""

    def memory(self) -> tuple[int, int]:
        """(total, free) bytes; what a limit keeps from this runtime is not free."""

    def close(self) -> None:
        """Waits for what is enqueued, then gives all memory back."""
