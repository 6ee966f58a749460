"""Measures a device's operations, and beside each the least time that the device's own rates allow."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import numpy as np

from llorch.commands._op_cases import Case, Cases, Shapes, naming
from llorch.core.binder import Binder
from llorch.core.plan import expand
from llorch.providers.decompose import Decomposed
from llorch.providers.device import Device, Provider
from llorch.providers.spec import Kernel, Step

SHORTEST = 0.02  # seconds of calls that a sample is the mean of
RATE_TOKENS = 512
COPY_ROWS, COPY_WIDTH = 4096, 4096  # of each of three float32 tensors: 64 MiB


@dataclass(frozen=True)
class Rates:
    """The best that the device has shown. GB are 10^9 bytes; a multiplication and an addition are two FLOP."""

    copy_gb_s: float  # `add` over large tensors, two read and one written
    matvec_gb_s: float  # `matmul` of one token with unquantised weights
    gflop_s: float  # `matmul` of 512 tokens with unquantised weights

    @property
    def bandwidth_gb_s(self) -> float:
        """The better of the two: where a line is fetched before it is written, a copy looks slow."""
        return max(self.copy_gb_s, self.matvec_gb_s)


@dataclass(frozen=True)
class Timing:
    """One operation at one shape: a line of --json. Times are medians of the repetitions."""

    provider: str
    device: str
    operation: str
    by: str  # "provider": its own kernel; "core": decomposed into required operations
    phase: str  # "decode" or "prefill"
    tokens: int
    shape: str
    weight_type: str | None
    seconds: float  # of a call
    stdev: float
    repetitions: int
    bytes: int  # that it has to move
    flops: int
    gb_s: float
    gflop_s: float
    limit_seconds: float
    share_of_limit: float | None  # None: it works in the caches, of which the memory's bandwidth says nothing
    bandwidth_gb_s: float  # this and the next three: the device's rates
    copy_gb_s: float
    matvec_gb_s: float
    float_gflop_s: float


class OpBench:
    """Times the operations of one opened device."""

    def __init__(self, provider: Provider, device: Device, shapes: Shapes, repetitions: int) -> None:
        self._provider, self._device, self._shapes, self._repetitions = provider, device, shapes, repetitions
        self._binder = Binder(device, provider.operations(), provider.name)
        self.cases = Cases(device, self._binder, shapes)

    def rates(self) -> Rates:
        plain, s = self.cases.plain_type("matmul"), self._shapes
        copy = self.cases.add(COPY_ROWS, COPY_WIDTH)
        matvec = self.cases.matmul(1, s.ffn, s.dim, plain)
        products = self.cases.matmul(RATE_TOKENS, s.ffn, s.dim, plain)
        # the best sample, not the middle one: others may use the machine, and nothing makes it faster than it is
        times = [min(self._samples(case, self._bind(case))) for case in (copy, matvec, products)]
        return Rates(copy.nbytes / times[0] / 1e9, matvec.nbytes / times[1] / 1e9, products.flops / times[2] / 1e9)

    def timing(self, case: Case, phase: str, tokens: int, rates: Rates) -> Timing:
        kernel = self._bind(case)
        samples = self._samples(case, kernel)
        seconds = statistics.median(samples)
        moving, computing = case.nbytes / rates.bandwidth_gb_s / 1e9, case.flops / rates.gflop_s / 1e9
        limit = max(moving, computing)
        return Timing(
            provider=self._provider.name,
            device=self._device.info.name,
            operation=case.operation,
            by="core" if isinstance(kernel, Decomposed) else "provider",
            phase=phase,
            tokens=tokens,
            shape=case.shape,
            weight_type=case.weight_type,
            seconds=seconds,
            stdev=statistics.stdev(samples) if len(samples) > 1 else 0.0,
            repetitions=len(samples),
            bytes=case.nbytes,
            flops=case.flops,
            gb_s=case.nbytes / seconds / 1e9,
            gflop_s=case.flops / seconds / 1e9,
            limit_seconds=limit,
            share_of_limit=limit / seconds if case.streams or computing > moving else None,
            bandwidth_gb_s=rates.bandwidth_gb_s,
            copy_gb_s=rates.copy_gb_s,
            matvec_gb_s=rates.matvec_gb_s,
            float_gflop_s=rates.gflop_s,
        )

    def _bind(self, case: Case) -> Kernel:
        kernel = self._binder.bind(case.operation, case.spec)
        self._binder.finish()
        return kernel

    def _samples(self, case: Case, kernel: Kernel) -> list[float]:
        """Seconds a call, of each repetition. Only `read` waits for the device, so each sample ends with one."""
        plans = [list(expand(Step(kernel, args, case.spec))) for args in case.calls]
        written = case.calls[0][case.spec.outputs[0][1]]
        last, host = self._device.rows(written, 1), np.empty((1, written.shape[1]), np.float32)

        def run(calls: int) -> float:
            start = time.perf_counter()
            for i in range(calls):
                for entry in plans[i % len(plans)]:
                    entry.kernel(*entry.args)
            self._device.read(last, host)
            return time.perf_counter() - start

        with naming(self._provider.name, f"{case.operation}, {case.shape}"):
            run(len(plans))  # compiles, and touches every page
        reading = min(run(0) for _ in range(5))
        few = min(len(plans), 4)
        calls = max(1, math.ceil(SHORTEST * few / run(few)))
        return [max(run(calls) - reading, 1e-9) / calls for _ in range(self._repetitions)]
