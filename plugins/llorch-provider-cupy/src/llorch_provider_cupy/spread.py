"""Tensors over several cards, and what a run over them would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llorch_provider_cupy import memory


@dataclass
class Whereabouts:
    """The cards that hold a tensor's values. Views share it with their tensor."""

    cards: frozenset[int]


@dataclass(frozen=True)
class Tensor:
    parts: tuple[memory.Tensor, ...]  # one a card
    where: Whereabouts
    whole: bool = True  # not a view of some rows

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    def rows(self, n: int) -> Tensor:
        whole = self.whole and n == self.shape[0]
        return Tensor(tuple(part.rows(n) for part in self.parts), self.where, whole)


class Transfer(NamedTuple):
    tensor: Tensor
    source: int
    target: int


@dataclass
class Trace:
    """What a run would do: the cards it visits, what it reads without having written it, the copies between cards,
    where it leaves the tensors it writes."""

    cards: list[int] = field(default_factory=list)
    outside: dict[tuple[int, int], tuple[Tensor, int]] = field(default_factory=dict)
    transfers: list[Transfer] = field(default_factory=list)
    written: dict[int, tuple[Whereabouts, frozenset[int]]] = field(default_factory=dict)

    def run(self, card: int, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        self.cards.append(card)
        for tensor in reads:
            where, cards = self.written.get(id(tensor.where), (tensor.where, None))
            if cards is None:
                self.outside[id(where), card] = tensor, card
            elif card not in cards:
                self.transfers.append(Transfer(tensor, max(cards), card))
                self.written[id(where)] = where, cards | {card}
        for tensor in writes:
            self.written[id(tensor.where)] = tensor.where, frozenset({card})
