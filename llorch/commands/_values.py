"""What a provider computes on the way through a model, beside what another computes: for `llorch compare`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llorch.providers.conformance.oracle import nmse

if TYPE_CHECKING:
    from llorch import LLM

Floats = npt.NDArray[np.float32]
# NMSE where activations stay float32, and where a provider rounds them: more than the suite allows one operation, as
# errors add up from layer to layer
EXACT, ROUNDED = 1e-9, 5e-3


@dataclass(frozen=True)
class Run:
    """One forward pass on one provider: each value of the graph by its label, in the order of the plan."""

    provider: str
    operations: dict[str, str]  # by label
    values: dict[str, Floats]  # by label, [tokens, width]
    rounds_activations: bool

    @classmethod
    def of(cls, llm: LLM, tokens: Sequence[int]) -> Run:
        """Runs the graph without fused operations, so that every label exists."""
        operations = llm.labels()
        values = llm.checkpoints(tokens, list(operations))
        return cls(llm.provider_name, operations, values, llm.rounds_activations)


@dataclass(frozen=True, kw_only=True)
class Value:
    """One value of the graph on both providers."""

    provider: str
    against: str
    label: str
    operation: str
    shape: tuple[int, ...]
    agrees: bool
    nmse: float  # sum of squared differences over the sum of squares of `against`; NaN where any element is not finite
    limit: float
    not_finite: int  # elements that are NaN or infinite on either
    worst: tuple[int, ...]  # index of the first element that is not finite, else of the largest difference
    found: float  # there, on `provider`
    expected: float  # and on `against`

    def as_json(self) -> dict[str, Any]:
        """A line of --json: numbers that are not finite, which JSON has not, are null."""
        fields = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def compared(run: Run, against: Run, limit: float | None) -> Iterator[Value]:
    """Every value that both computed, in the order of the plan; `limit` is the largest NMSE that counts as equal."""
    rounded = run.rounds_activations or against.rounds_activations
    limit = limit or (ROUNDED if rounded else EXACT)
    for label, operation in run.operations.items():
        if label in against.values:
            found, expected = run.values[label], against.values[label]
            finite = np.isfinite(found) & np.isfinite(expected)
            error = _nmse(found, expected) if finite.all() else math.nan
            at = _worst(found, expected, finite)
            yield Value(
                provider=run.provider,
                against=against.provider,
                label=label,
                operation=operation,
                shape=found.shape,
                agrees=error <= limit,
                nmse=error,
                limit=limit,
                not_finite=int((~finite).sum()),
                worst=at,
                found=float(found[at]),
                expected=float(expected[at]),
            )


def _nmse(found: Floats, expected: Floats) -> float:
    if np.array_equal(found, expected):  # zeros, too
        return 0.0
    return nmse(found, expected) if expected.any() else math.inf


def _worst(found: Floats, expected: Floats, finite: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    measure = np.abs(found.astype(np.float64) - expected) if finite.all() else ~finite
    return tuple(int(i) for i in np.unravel_index(int(measure.argmax()), measure.shape))
