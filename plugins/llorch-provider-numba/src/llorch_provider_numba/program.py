"""Records of operations, and the kernels of the contract that run, prebind or record them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llorch.providers import OpSpec, Step
from llorch_provider_numba.pool import Pool, Program
from llorch_provider_numba.protocol import RECORD

Record = npt.NDArray[np.int64]


def record(operation: int, items: int, slots: Sequence[int | float], *, barrier: bool = True) -> Record:
    """An operation of `items` items; floats are stored as the bits of a double."""
    made = np.zeros(RECORD // 8, np.int64)
    made[0], made[1], made[2] = operation, items, barrier
    for i, slot in enumerate(slots, start=3):
        made[i] = np.float64(slot).view(np.int64) if isinstance(slot, float) else slot
    return made


def address(array: Any) -> int:
    """Of an array's memory; 0 for None, a bias that is not there."""
    return 0 if array is None else int(getattr(array, "memory", array).ctypes.data)


class Launcher:
    """Runs records on the pool, or keeps them while a step is captured."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._recorded: list[Program] | None = None

    def run(self, program: Program) -> None:
        if self._recorded is None:
            self._pool.run(program)
        else:
            self._recorded.append(program)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """All that `run` would do, as one program."""
        self._recorded = []
        try:
            run()
            found = self._recorded
        finally:
            self._recorded = None
        whole = Program(np.concatenate([program.records for program in found]), (found, run))
        return lambda: self._pool.run(whole)


class Site:
    """A kernel of the contract: `records` says what is to be done for the tensors of a call, and what it needs kept."""

    def __init__(
        self, launcher: Launcher, spec: OpSpec, records: Callable[..., list[Record]], *, live: bool = False
    ) -> None:
        """`live`: the records depend on host ints of the batch, and are made anew for every call."""
        self._launcher, self._spec, self._records, self._live = launcher, spec, records, live

    def _program(self, args: tuple[Any, ...]) -> Program:
        return Program(np.stack(self._records(*args)), args)

    def __call__(self, *args: Any) -> None:
        self._launcher.run(self._program(args))

    def steps(self, *args: Any) -> Sequence[Step]:
        """For a plan: the program is made once."""
        if self._live:
            return [Step(lambda: self(*args), (), self._spec)]
        program, launcher = self._program(args), self._launcher
        return [Step(lambda: launcher.run(program), (), self._spec)]
