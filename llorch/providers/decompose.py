"""What core does where a provider declines an optional operation: the same result from required ones.

These factories are registered beside the provider's own, behind them (`trylast`), and get their parts through core's
binder, so that a part that is declined too is found and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llorch.providers.device import Device
from llorch.providers.spec import (
    AddRMSNormSpec,
    GateUpSwigluSpec,
    Kernel,
    MatmulGroupSpec,
    OpSpec,
    RopePairSpec,
    Step,
    SwigluSpec,
    Tensor,
    hookimpl,
)


class Parts(Protocol):
    """What a decomposition needs of core's binder."""

    def bind(self, operation: str, spec: OpSpec) -> Kernel: ...
    def scratch(self, name: str, rows: int, cols: int) -> Tensor:
        """Float32 memory [rows, cols] shared by all sites that ask for the name: valid within one operation."""


class Decomposed:
    """A kernel made of others. A plan takes its `steps`, which keep their own labels, instead of calling it."""

    def __init__(self, steps: Callable[..., Sequence[Step]]) -> None:
        self.steps = steps

    def __call__(self, *args: Any) -> None:
        for step in self.steps(*args):
            step.kernel(*step.args)


class Decompositions:
    """Each optional operation from required ones; but for `topk`, in whose place the host reads whole rows."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @hookimpl(trylast=True)
    def add_rmsnorm(self, spec: AddRMSNormSpec) -> Kernel:
        add, norm = self._parts.bind("add", spec.add), self._parts.bind("rmsnorm", spec.norm)
        return Decomposed(
            lambda out, x, y, weight: (Step(add, (x, x, y), spec.add), Step(norm, (out, x, weight), spec.norm))
        )

    @hookimpl(trylast=True)
    def matmul_group(self, spec: MatmulGroupSpec) -> Kernel:
        n = len(spec.parts)
        kernels = [self._parts.bind("matmul", part) for part in spec.parts]

        def steps(*args: Any) -> Sequence[Step]:
            outs, x, weights, biases = args[:n], args[n], args[n + 1 : 2 * n + 1], args[2 * n + 1 :]
            each = zip(kernels, outs, weights, biases, spec.parts, strict=True)
            return [Step(kernel, (out, x, w, bias), part) for kernel, out, w, bias, part in each]

        return Decomposed(steps)

    @hookimpl(trylast=True)
    def rope_pair(self, spec: RopePairSpec) -> Kernel:
        q_rope, k_rope = self._parts.bind("rope", spec.q), self._parts.bind("rope", spec.k)
        return Decomposed(
            lambda q, k, positions: (Step(q_rope, (q, positions), spec.q), Step(k_rope, (k, positions), spec.k))
        )

    @hookimpl(trylast=True)
    def gate_up_swiglu(self, device: Device, spec: GateUpSwigluSpec) -> Kernel:
        matmul_gate, matmul_up = self._parts.bind("matmul", spec.gate), self._parts.bind("matmul", spec.up)
        activation = SwigluSpec(max_tokens=spec.max_tokens, label=spec.label, layer=spec.layer, dim=spec.gate.rows)
        swiglu = self._parts.bind("swiglu", activation)
        gate_scratch = self._parts.scratch("gate", spec.max_tokens, spec.gate.rows)
        up_scratch = self._parts.scratch("up", spec.max_tokens, spec.up.rows)

        def steps(out: Tensor, x: Tensor, w_gate: Any, w_up: Any, b_gate: Any, b_up: Any) -> Sequence[Step]:
            gate, up = device.rows(gate_scratch, out.shape[0]), device.rows(up_scratch, out.shape[0])
            return (
                Step(matmul_gate, (gate, x, w_gate, b_gate), spec.gate),
                Step(matmul_up, (up, x, w_up, b_up), spec.up),
                Step(swiglu, (out, gate, up), activation),
            )

        return Decomposed(steps)
