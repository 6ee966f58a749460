"""Joining neighbours of a plan: a kernel that does a part of the next one's work, or all of it.

Between two launches of a recorded step a card waits some microseconds, and a step has hundreds of them.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llorch.providers import RMSNormSpec, RopeSpec

if TYPE_CHECKING:
    from llorch_provider_cupy.memory import Tensor


class Joinable(ABC):
    """A kernel of a plan, and what it could share with its neighbours. Arguments are those of its entry there."""

    rope: RopeSpec | None = None  # where it rotates q and k, and does no more
    norm: RMSNormSpec | None = None  # where it adds to the residual stream and norms it, and does no more

    def gives(self, *_args: Any) -> Tensor | None:
        """What it writes, where it can round that for a product (`rounds=True`)."""
        return None

    def takes(self, *_args: Any) -> Tensor | None:
        """What it reads and rounds first, which it can leave to the kernel before it (`rounded=True`)."""
        return None

    def adds(self, *_args: Any) -> Tensor | None:
        """What it writes, where it can add that to the residual stream and norm the sum, all but the division
        (`into=(stream, weight, normed)`)."""
        return None

    def divides(self, *_args: Any) -> Tensor | None:
        """What it reads, where it can do a norm's division (`normed=eps`)."""
        return None

    @abstractmethod
    def changed(self, **changes: Any) -> Joinable:
        """Itself with such a change: one that it has offered."""

    def after(self, _rope: Joinable, *_args: Any) -> Joinable | None:
        """Itself, with the rotation right before it, which is then left out. None where it has no use for it."""
        return None


def fuse(steps: Sequence[Any], *, norms: bool) -> dict[int, Any]:
    """The kernels of a plan's entries by their place; those whose work a neighbour does are left out.

    Attention rotates q and k. With `norms`, a product adds what it makes to the residual stream and norms it. What
    writes a tensor that the product right behind it takes rounds it, as nothing comes between the two.
    """
    kernels = {place: step.kernel for place, step in enumerate(steps)}
    for place, (rope, attention) in _neighbours(kernels, 2):
        if rope.rope is not None:
            turning = attention.after(rope, *steps[place + 1].args)
            if turning is not None:
                del kernels[place]
                kernels[place + 1] = turning
    for place, (product, norm, behind) in _neighbours(kernels, 3) if norms else ():
        if norm.norm is not None:
            normed, stream, added, weight = norm.args
            if product.adds() == added and behind.divides() == normed:
                kernels[place] = product.changed(into=(stream, weight, normed))
                del kernels[place + 1]
                kernels[place + 2] = behind.changed(normed=norm.norm.eps)
    for place, (first, second) in _neighbours(kernels, 2):
        given = first.gives(*steps[place].args)
        if given is not None and given == second.takes(*steps[place + 1].args):
            kernels[place], kernels[place + 1] = first.changed(rounds=True), second.changed(rounded=True)
    return kernels


def _neighbours(kernels: dict[int, Any], count: int) -> Iterator[tuple[int, list[Any]]]:
    """Each `count` kernels that lie side by side and can be joined, as they are when their turn comes."""
    for place in itertools.count():
        if place not in kernels and place > max(kernels, default=-1):
            return
        found = [kernels.get(place + i) for i in range(count)]
        if all(isinstance(kernel, Joinable) for kernel in found):
            yield place, found
