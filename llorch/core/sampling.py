"""How the next token is chosen, in llama.cpp's order and semantics.

logit bias -> penalties -> top-k -> top-p -> min-p -> temperature -> draw. Each step is a function of a row of logits;
those that drop tokens return the indices that stay. `Sampler` is one request's chain of them, with a generator of its
own: a token depends on the seed, the tokens so far and the logits, and on nothing that runs beside it.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from llorch.core.requests import SamplingParams, TokenLogprobs
from llorch.errors import EngineError, InvalidRequestError

Floats: TypeAlias = npt.NDArray[np.float32]
Indices: TypeAlias = npt.NDArray[np.intp]

GROUP = 64  # logits that share a maximum in the pre-cut of top_k
BLOCK = 512  # weights that are summed together before a running sum is searched


# ---- the steps ---------------------------------------------------------------------------------------------------


def penalise(
    logits: Floats,
    tokens: npt.NDArray[np.integer[Any]],
    counts: npt.NDArray[np.integer[Any]],
    *,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
) -> Floats:
    """A copy of `logits` [n] with the distinct `tokens` made less likely, which occurred `counts` times.

    `repetition` divides positive logits and multiplies the others (Keskar et al., 2019, with llama.cpp's rule for
    signs); then count * frequency + presence is subtracted.
    """
    penalised = logits.copy()
    values = logits[tokens]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        divided = np.where(values <= 0, values * repetition, values / repetition)
    # a tiny penalty takes a finite logit beyond float32, which says nothing about the model
    values = np.where(np.isfinite(values), np.minimum(divided, np.finfo(np.float32).max), divided)
    penalised[tokens] = values - (counts.astype(np.float32) * frequency + presence)
    return penalised


def top_k(logits: Floats, k: int) -> Indices:
    """Indices of the k > 0 largest, largest first, the first among equals first (Fan et al., 2018)."""
    near = _near_top(logits, k)
    values = logits[near]
    if len(near) > k:
        kth = np.partition(values, len(near) - k)[len(near) - k]
        kept = _reaching(values, kth, k)
        near, values = near[kept], values[kept]
    return near[np.argsort(-values, kind="stable")]


def top_p(logits: Floats, p: float) -> Indices:
    """Indices, in their order, of the smallest set whose probability is at least p < 1 (Holtzman et al., 2020).

    One at least stays; among equals at the border the first.
    """
    p = max(p, 0.0)
    weights = _weights(logits)
    total = float(weights.sum(dtype=np.float64))
    # All n tokens below (1 - p) / n could not make up 1 - p together, so the set lies above; half of it leaves room for
    # float32. Mostly a few thousand tokens of 128k are left to sort.
    near = np.flatnonzero(weights >= 0.5 * (1.0 - p) * total / len(logits))
    values = logits[near]
    ordered = -np.sort(-values)
    count = _crossing(_weights(ordered), p * total, "left") + 1
    return near[_reaching(values, ordered[count - 1], count)]


def min_p(logits: Floats, p: float) -> Indices:
    """Indices, in their order, of the tokens at least p > 0 times as likely as the best (Nguyen et al., 2024).

    As in llama.cpp on logits before temperature: logit >= largest + log(p).
    """
    return np.flatnonzero(logits >= logits.max() + np.float32(math.log(min(p, 1.0))))


def softmax(logits: Floats, temperature: float = 1.0) -> Floats:
    """Probabilities: exp(logits / temperature), scaled to a sum of 1."""
    weights = _weights(logits, temperature)
    probabilities: Floats = weights / np.float32(weights.sum(dtype=np.float64))
    return probabilities


def draw(logits: Floats, temperature: float, uniform: float) -> int:
    """The index that `uniform`, in [0, 1), falls on when the probabilities are laid side by side in [0, 1)."""
    probabilities = softmax(logits, temperature)
    return _crossing(probabilities, uniform * float(probabilities.sum(dtype=np.float64)), "right")


def token_logprobs(logits: Floats, token: int, count: int) -> TokenLogprobs:
    """The natural log of softmax(logits [n]) for one token, and for the `count` most likely ones."""
    shift = float(logits.max())
    total = math.log(np.exp(logits - np.float32(shift)).sum(dtype=np.float64)) + shift
    best = top_k(logits, count) if count else np.arange(0)
    return TokenLogprobs(
        token, float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in best[:count])
    )


def _weights(logits: Floats, temperature: float = 1.0) -> Floats:
    """Probabilities up to a factor; the largest is 1."""
    with np.errstate(over="ignore"):  # a logit masked with the smallest float: -inf is as good
        weights: Floats = np.exp((logits - logits.max()) / np.float32(temperature))
    return weights


def _crossing(weights: Floats, target: float, side: Literal["left", "right"]) -> int:
    """The index at which the running sum of `weights` reaches (left) or exceeds (right) the target.

    In blocks: a running sum in float64 over 128k weights takes a millisecond. Where rounding keeps the sum below the
    target, the last weight that is not 0.
    """
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64))
    block = int(min(np.searchsorted(sums, target, side), np.searchsorted(sums, sums[-1])))
    before = float(sums[block - 1]) if block else 0.0
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    index = int(min(np.searchsorted(inside, target - before, side), np.searchsorted(inside, inside[-1])))
    return block * BLOCK + index


def _near_top(logits: Floats, k: int) -> Indices:
    """Indices, ascending, of a few more than the k largest.

    The k-th largest of the groups' maxima is reached by k logits at least: two passes over the row, where partitioning
    all of it takes 10 times as long on a CPU for which NumPy has no vectorised partition.
    """
    groups = len(logits) // GROUP
    if groups <= k:
        return np.arange(len(logits))
    maxima = logits[: groups * GROUP].reshape(GROUP, groups).max(axis=0)
    return np.flatnonzero(logits >= np.partition(maxima, groups - k)[groups - k])


def _reaching(values: Floats, threshold: np.float32, count: int) -> Indices:
    """Indices, ascending, of the `count` values that are above the threshold, or equal to it and first."""
    reaching = np.flatnonzero(values >= threshold)
    surplus = len(reaching) - count
    if surplus > 0:
        equal = np.flatnonzero(values[reaching] == threshold)
        reaching = np.delete(reaching, equal[-surplus:])
    return reaching


# ---- a request's chain -------------------------------------------------------------------------------------------


class Sampler:
    """Chooses one request's tokens. `seed` is the one in use, drawn from the operating system where none was given."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        """Raises InvalidRequestError for a negative seed, or a bias of a token outside the vocabulary."""
        if strange := [token for token, _ in params.logit_bias if not 0 <= token < vocab_size]:
            raise InvalidRequestError(f"logit_bias names token {strange[0]}, the vocabulary has {vocab_size}")
        if params.seed is not None and params.seed < 0:
            raise InvalidRequestError(f"seed is {params.seed}: it must be 0 or more")
        # 53 bits: a client that reads JSON numbers as doubles can send the seed back unchanged
        self.seed = secrets.randbits(53) if params.seed is None else params.seed
        self._params, self._vocab_size = params, vocab_size
        self._generator = np.random.Generator(np.random.PCG64(self.seed))
        self._recent: deque[int] = deque()  # the last penalty_window tokens
        self._counts: Counter[int] = Counter()  # how often each of them occurs there
        self._top_k = params.top_k if 0 < params.top_k < vocab_size else None
        self._biased = np.array([token for token, _ in params.logit_bias], np.intp)
        self._bias = np.array([bias for _, bias in params.logit_bias], np.float32)
        self._needed = None if params.penalised or params.logit_bias else 1 if params.greedy else self._top_k
        self._filters: list[Callable[[Floats], Indices]] = []
        if params.top_p < 1:
            self._filters.append(partial(top_p, p=params.top_p))
        if params.min_p > 0:
            self._filters.append(partial(min_p, p=params.min_p))

    @property
    def candidates(self) -> int | None:
        """How many of the largest logits give the same token as the whole row; None: all are needed."""
        return self._needed

    def accept(self, token: int) -> None:
        """Records a token of the prompt or the output, for the penalties."""
        window = self._params.penalty_window
        if not self._params.penalised or window < 1:
            return
        if len(self._recent) == window:
            oldest = self._recent.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
        self._recent.append(token)
        self._counts[token] += 1

    def sample(self, logits: Floats) -> int:
        """The next token for `logits` [vocab], which stay as they are.

        Draws once from the generator, or not at all where greedy. Raises EngineError for logits that are NaN or
        infinite, or that leave no token.
        """
        if logits.shape != (self._vocab_size,):
            raise EngineError(f"logits of shape {logits.shape} for a vocabulary of {self._vocab_size}")
        if len(self._biased):
            logits = logits.copy()
            logits[self._biased] += self._bias
        if self._counts:
            logits = self._penalised(logits)
        _check(logits)
        if self._params.greedy:
            return int(logits.argmax())
        kept = None if self._top_k is None else top_k(logits, self._top_k)
        index = self._choose(logits if kept is None else logits[kept])
        return index if kept is None else int(kept[index])

    def sample_candidates(self, ids: npt.NDArray[np.integer[Any]], values: Floats) -> int:
        """The next token from the largest logits and their ids, largest first, the lower id first among equals.

        Chooses what `sample` would choose from the whole row. At least `candidates` of them are needed; raises
        EngineError for fewer, and as `sample` does.
        """
        needed = self._needed
        if needed is None or len(values) < needed:
            raise EngineError(f"{len(values)} candidates, but this request needs {needed or 'whole rows'}")
        _check(values)
        return int(ids[0 if self._params.greedy else self._choose(values[:needed])])

    def _penalised(self, logits: Floats) -> Floats:
        size, params = len(self._counts), self._params
        return penalise(
            logits,
            np.fromiter(self._counts.keys(), np.intp, size),
            np.fromiter(self._counts.values(), np.intp, size),
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
        )

    def _choose(self, logits: Floats) -> int:
        """The index drawn among those that pass the filters behind top-k."""
        kept: Indices | None = None
        for passing in self._filters:
            indices = passing(logits)
            logits = logits[indices]
            kept = indices if kept is None else kept[indices]
        index = draw(logits, self._params.temperature, self._generator.random())
        return index if kept is None else int(kept[index])


def _check(logits: Floats) -> None:
    """Raises EngineError for logits that no token can be drawn from."""
    largest = logits.max()  # NaN where any is
    if np.isfinite(largest):
        return
    if np.isnan(largest):
        what = f"{int(np.isnan(logits).sum())} of {len(logits)} logits are NaN"
    elif largest > 0:
        what = f"{int(np.isposinf(logits).sum())} of {len(logits)} logits are infinite"
    else:
        what = f"all {len(logits)} logits are -inf, so no token is left"
    raise EngineError(
        f"{what}: the model's weights are damaged, or its provider computes something wrong; "
        "`llorch compare MODEL --provider NAME` shows where"
    )
