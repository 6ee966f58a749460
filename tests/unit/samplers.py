"""The samplers' definitions in plain float64 Python, and the rows that tests give them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from llorch.core.requests import SamplingParams

# ties, a masked token, both signs; `width=32` so that float64 sees the same numbers
LOGITS = st.lists(
    st.one_of(st.floats(-30, 30, width=32), st.integers(-3, 3).map(float), st.sampled_from([-math.inf, -0.0, -3.4e38])),
    min_size=1,
    max_size=200,
).filter(lambda logits: max(logits) > -1e38)


def row(logits: Sequence[float]) -> np.ndarray:
    """Logits that nobody may write to."""
    array = np.array(logits, np.float32)
    array.flags.writeable = False
    return array


def random_row(seed: int, size: int, spread: float = 3.0) -> np.ndarray:
    return row(np.random.default_rng(seed).standard_normal(size) * spread)


# ---- the definitions ----


def ranked(logits: Sequence[float]) -> list[int]:
    """Indices, largest first, the lower one first among equals."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def probabilities_of(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    largest = max(logits)
    weights = [math.exp((float(x) - largest) / temperature) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def penalised_by_definition(logits: Sequence[float], history: Sequence[int], params: SamplingParams) -> list[float]:
    result = [float(x) for x in logits]
    for token, count in Counter(history[max(0, len(history) - params.penalty_window) :]).items():
        x = result[token]
        x = x * params.repetition_penalty if x <= 0 else x / params.repetition_penalty
        result[token] = x - count * params.frequency_penalty - params.presence_penalty
    return result


def distribution_by_definition(
    logits: Sequence[float], params: SamplingParams, history: Sequence[int] = ()
) -> dict[int, float]:
    """The probability of every token that may come next."""
    values = row(penalised_by_definition(logits, history, params)).tolist()  # their ties are float32's
    kept = ranked(values)
    if params.top_k:
        kept = kept[: params.top_k]
    if params.top_p < 1:
        mass, enough = 0.0, 0
        for p in probabilities_of([values[i] for i in kept]):
            mass, enough = mass + p, enough + 1
            if mass >= params.top_p:
                break
        kept = kept[:enough]
    if params.min_p > 0:
        kept = [i for i in kept if math.exp(values[i] - values[kept[0]]) >= params.min_p]
    if params.greedy:
        return {kept[0]: 1.0}
    return dict(zip(kept, probabilities_of([values[i] for i in kept], params.temperature), strict=True))
