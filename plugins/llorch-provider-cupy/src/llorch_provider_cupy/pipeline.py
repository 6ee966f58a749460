"""One model over several cards: each holds a stretch of its layers, a step passes through them in turn.

To core it is one device. A tensor has memory on every card, and knows on which its values are: a kernel that reads it
on another card is preceded by a copy, which in a model happens where one card's layers end and the next one's begin.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llorch.providers import (
    CacheSpec,
    DeviceInfo,
    DeviceMemoryError,
    EmbedSpec,
    HostWeight,
    MemoryInfo,
    OpSpec,
)
from llorch_provider_cupy import memory
from llorch_provider_cupy.device import CudaDevice
from llorch_provider_cupy.memory import Inputs, LayerCache, Weight
from llorch_provider_cupy.placed import fuse
from llorch_provider_cupy.spread import Tensor, Trace, Transfer, Whereabouts


class Pipeline:
    """`Device` over opened cards. Weights are {card: Weight}, cache layers LayerCache of their layer's card."""

    weight_types = CudaDevice.weight_types
    cache_dtypes = CudaDevice.cache_dtypes
    block_sizes = CudaDevice.block_sizes

    def __init__(self, cards: Sequence[CudaDevice], info: DeviceInfo) -> None:
        self.cards, self.info, self.capture_sizes = tuple(cards), info, cards[0].capture_sizes
        self._layers: list[int] = []  # the card of each; of others the last
        self._trace: Trace | None = None  # while a run is looked at, not done
        self._only: int | None = None  # the card whose work alone is done, while it is recorded

    @property
    def last(self) -> int:
        return len(self.cards) - 1

    def card_of(self, spec: OpSpec) -> int:
        """Embedding on the first card, what belongs to no layer on the last."""
        return 0 if isinstance(spec, EmbedSpec) else self._card_of_layer(spec.layer)

    def _card_of_layer(self, layer: int | None) -> int:
        return self.last if layer is None or layer >= len(self._layers) else self._layers[layer]

    # ---- weights ----

    def expect(self, weights: Sequence[HostWeight]) -> str:
        """Splits the layers. Raises DeviceMemoryError where a card's share does not fit it."""
        sizes: dict[int, int] = {}
        before = after = 0
        for weight in weights:
            layer, size = layer_of(weight.name), self.cards[0].bytes_of(weight)
            if layer is not None:
                sizes[layer] = sizes.get(layer, 0) + size
            elif "embed" in weight.uses:
                before += size
            if layer is None and weight.uses != {"embed"}:
                after += size
        if len(sizes) < len(self.cards):
            raise DeviceMemoryError(
                f"{len(sizes)} layers cannot be split over {len(self.cards)} cards: name at most {len(sizes)} of them"
            )
        room = [card.memory().free for card in self.cards]
        self._layers = split([sizes[layer] for layer in sorted(sizes)], before, after, room)
        lines = []
        for i, card in enumerate(self.cards):
            line = card.expect([weight for weight in weights if i in self._cards_of_weight(weight)])
            lines.append(f"{card.info.name}: {self._layers.count(i)} of {len(self._layers)} layers, {line}")
        return "; ".join(lines)

    def _cards_of_weight(self, weight: HostWeight) -> set[int]:
        if (layer := layer_of(weight.name)) is not None:
            return {self._card_of_layer(layer)}
        return ({0} if "embed" in weight.uses else set()) | ({self.last} if weight.uses != {"embed"} else set())

    def weight(self, host_weight: HostWeight) -> dict[int, Weight]:
        return {i: self.cards[i].weight(host_weight) for i in sorted(self._cards_of_weight(host_weight))}

    def weight_bytes(self, weight: dict[int, Weight]) -> int:
        return next(iter(weight.values())).nbytes

    def held_bytes(self, weight: dict[int, Weight]) -> int:
        return sum(self.cards[i].held_bytes(part) for i, part in weight.items())

    # ---- memory ----

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return self._tensor([card.empty(shape, dtype) for card in self.cards])

    def _tensor(self, parts: Sequence[memory.Tensor]) -> Tensor:
        return Tensor(tuple(parts), Whereabouts(frozenset(range(len(self.cards)))))

    def rows(self, tensor: Tensor, n: int) -> Tensor:
        return tensor.rows(n)

    def cache_blocks(self, spec: CacheSpec) -> int:
        """What the card with the least room has."""
        return min(self.cards[i].cache_blocks(part) for i, part in self._caches(spec).items())

    def _caches(self, spec: CacheSpec) -> dict[int, CacheSpec]:
        """The part of each card that has layers."""
        cards = [self._card_of_layer(layer) for layer in range(spec.layers)]
        return {i: replace(spec, layers=cards.count(i)) for i in sorted(set(cards))}

    def kv_cache(self, spec: CacheSpec) -> PipelineCache:
        return PipelineCache([self.cards[i].kv_cache(part) for i, part in self._caches(spec).items()])

    def inputs(self, shapes: Mapping[str, tuple[int, ...]]) -> PipelineInputs:
        return PipelineInputs(self, [card.inputs(shapes) for card in self.cards])

    def write(self, tensor: Tensor, host: npt.NDArray[Any]) -> None:
        for card, part in zip(self.cards, tensor.parts, strict=True):
            card.write(part, host)
        if tensor.whole:
            tensor.where.cards = frozenset(range(len(self.cards)))

    def read(self, tensor: Tensor, host: npt.NDArray[Any]) -> None:
        card = max(tensor.where.cards)
        self.cards[card].read(tensor.parts[card], host)

    def memory(self) -> MemoryInfo:
        found = [card.memory() for card in self.cards]
        return MemoryInfo(total=sum(m.total for m in found), free=sum(m.free for m in found))

    def close(self) -> None:
        for card in self.cards:
            card.close()

    # ---- work ----

    def run(self, card: int, work: Callable[[], None], reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """Does a kernel's work on a card, with what it reads brought there before."""
        if self._trace is not None:
            self._trace.run(card, reads, writes)
        elif self._only is not None:
            if card == self._only:
                work()
        else:
            for tensor in reads:
                self._bring(tensor, card)
            work()
            for tensor in writes:
                tensor.where.cards = frozenset({card})

    def _bring(self, tensor: Tensor, card: int) -> None:
        if card not in tensor.where.cards:
            self._copy(Transfer(tensor, max(tensor.where.cards), card))
            tensor.where.cards |= {card}

    def _copy(self, transfer: Transfer) -> None:
        source, target = (transfer.tensor.parts[card] for card in (transfer.source, transfer.target))
        nbytes = int(np.prod(source.shape)) * source.dtype.itemsize
        there = self.cards[transfer.target].runtime
        self.cards[transfer.source].runtime.transfer(there, target.address, source.address, nbytes)

    def fuse(self, entries: Sequence[Any]) -> Sequence[Any]:
        return fuse(entries)

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """A recording a card, with the copies between them. None where a run comes back to a card it has left."""
        trace = self._trace = Trace()
        try:
            run()
        finally:
            self._trace = None
        if trace.cards != sorted(trace.cards):
            return None
        parts = []
        for card in sorted(set(trace.cards)):
            # what a card reads of others is complete when they are done: all of it can come before its own work
            copies = [transfer for transfer in trace.transfers if transfer.target == card]
            parts.append((copies, self._record(card, run)))
        outside, written = tuple(trace.outside.values()), tuple(trace.written.values())

        def replay() -> None:
            for tensor, card in outside:
                self._bring(tensor, card)
            for copies, recorded in parts:
                for transfer in copies:
                    self._copy(transfer)
                recorded()
            for where, cards in written:
                where.cards = cards

        return replay

    def _record(self, card: int, run: Callable[[], None]) -> Callable[[], None]:
        self._only = card
        try:
            return self.cards[card].runtime.record(run)
        finally:
            self._only = None


class PipelineCache:
    def __init__(self, parts: Sequence[memory.KVCache]) -> None:
        self._parts = parts
        self.layers: list[LayerCache] = [layer for part in parts for layer in part.layers]

    def copy(self, src: int, dst: int) -> None:
        for part in self._parts:
            part.copy(src, dst)


class PipelineInputs:
    """One host array, uploaded to every card."""

    def __init__(self, pipeline: Pipeline, parts: Sequence[Inputs]) -> None:
        self._parts, self.host = parts, parts[0].host
        self.device = {name: pipeline._tensor([part.device[name] for part in parts]) for name in self.host}

    def upload(self) -> None:
        for part in self._parts:
            part.upload(self._parts[0].everything)


# ---- the split ----


def layer_of(name: str) -> int | None:
    """The layer of a tensor by its GGUF name."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else None


def split(layers: Sequence[int], before: int, after: int, room: Sequence[int]) -> list[int]:
    """The card of each layer, in order, at least one a card: bytes in proportion to the cards' room.

    `layers`: bytes of each; `before` and `after`: of what lies on the first card and the last beside them. There are
    at least as many layers as cards.
    """
    total, cards = before + sum(layers) + after, len(room)
    ends = np.cumsum(room) / sum(room) * total
    found: list[int] = []
    start = float(before)
    for i, size in enumerate(layers):
        card = int(np.searchsorted(ends, start + size / 2))
        previous = found[-1] if found else -1
        least = max(previous, cards - (len(layers) - i), 0)  # the layers that are left reach the last card
        found.append(min(max(card, least), previous + 1))
        start += size
    return found
