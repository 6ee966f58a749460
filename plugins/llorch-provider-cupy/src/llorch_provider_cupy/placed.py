"""Operations over several cards: each kernel on the card of its layer, behind the copies that it needs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llorch.providers import OPTIONAL, REQUIRED, Batch, Kernel, OpSpec, Step, hookimpl
from llorch_provider_cupy import joining
from llorch_provider_cupy.device import CudaDevice
from llorch_provider_cupy.operations import CudaOps
from llorch_provider_cupy.spread import Tensor

if TYPE_CHECKING:
    from llorch_provider_cupy.pipeline import Pipeline

# arguments that a kernel writes without reading them are its outputs, but for these
READ_TOO = {"rope": (0,), "rope_pair": (0, 1), "add_rmsnorm": (1,)}


class CardBatch:
    """A batch as one card sees it; the host's ints are always those of the batch."""

    def __init__(self, batch: Batch, card: int) -> None:
        self._batch = batch
        for name in ("positions", "slots", "sequence_ids", "block_tables", "query_starts", "context_lengths"):
            setattr(self, name, getattr(batch, name).parts[card])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)


class Placed:
    """A kernel of the contract on one card of a pipeline."""

    def __init__(self, pipeline: Pipeline, operation: str, spec: OpSpec, kernel: Kernel) -> None:
        self._pipeline, self._spec, self._kernel, self.card = pipeline, spec, kernel, pipeline.card_of(spec)
        self._writes = [index for _, index in spec.outputs]
        self._skips = set(self._writes) - set(READ_TOO.get(operation, ()))

    @property
    def joins_norms(self) -> bool:
        return self._pipeline.cards[self.card].joins_norms

    def __call__(self, *args: Any) -> None:
        here = [self._here(arg) for arg in args]
        self.run(args, lambda: self._kernel(*here))

    def steps(self, *args: Any) -> Sequence[Step]:
        """The card's own step, which first brings what it reads."""
        here = [self._here(arg) for arg in args]
        prepare: Callable[..., Sequence[Step]] | None = getattr(self._kernel, "steps", None)
        (own,) = [Step(self._kernel, tuple(here), self._spec)] if prepare is None else prepare(*here)
        return [Step(PlacedStep(self, args, own), (), self._spec)]

    def run(self, args: Sequence[Any], work: Callable[[], None]) -> None:
        reads = [arg for i, arg in enumerate(args) if isinstance(arg, Tensor) and i not in self._skips]
        self._pipeline.run(self.card, work, reads, [args[i] for i in self._writes])

    def _here(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return arg.parts[self.card]
        if isinstance(arg, dict):
            return arg[self.card]
        return CardBatch(arg, self.card) if isinstance(arg, Batch) else arg


@dataclass(frozen=True)
class PlacedStep:
    """What a plan holds of a placed kernel."""

    placed: Placed
    args: tuple[Any, ...]
    own: Step  # of its card

    @property
    def card(self) -> int:
        return self.placed.card

    def __call__(self) -> None:
        self.placed.run(self.args, functools.partial(self.own.kernel, *self.own.args))


def fuse(entries: Sequence[Any]) -> list[Any]:
    """A plan with the neighbours on each card joined as that card joins them."""
    found: list[Any] = []
    for card, group in itertools.groupby(entries, lambda entry: getattr(entry.kernel, "card", None)):
        together = list(group)
        if card is not None:
            own = [entry.kernel.own for entry in together]
            joined = joining.fuse(own, norms=together[0].kernel.placed.joins_norms)
            together = [_with(together[place], kernel) for place, kernel in joined.items()]
        found += together
    return found


def _with(entry: Any, kernel: Any) -> Any:
    placed = entry.kernel
    return entry._replace(kernel=replace(placed, own=placed.own._replace(kernel=kernel)))


class Operations:
    """The operations of one card, or of the right one of several."""


def _factory(operation: str) -> Callable[..., Any]:
    def factory(self: Operations, device: CudaDevice | Pipeline, spec: Any) -> Kernel | None:
        make: Callable[..., Kernel | None] = getattr(CudaOps(), operation)
        if isinstance(device, CudaDevice):
            return make(device, spec)
        kernel = make(device.cards[device.card_of(spec)], spec)
        return None if kernel is None else Placed(device, operation, spec, kernel)

    factory.__name__ = operation
    return hookimpl(factory)


for _name in (*REQUIRED, *OPTIONAL):
    setattr(Operations, _name, _factory(_name))
