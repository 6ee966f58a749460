"""Which cache blocks hold which tokens, so that prompts that begin alike share their blocks."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

ROOT = b""  # the digest of no tokens
COPY_SHARE = 4  # a copy must save more than one part in this many of a block: all prompts begin with BOS
ALTERNATIVES = 32  # continuations of a prefix that are looked at for a common beginning, the latest first


@dataclass(frozen=True, slots=True)
class Known:
    """A block's tokens, and what comes before them."""

    digest: bytes
    parent: bytes
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """The longest known beginning of a prompt: whole blocks, then perhaps the first `common` tokens of another."""

    blocks: list[int] = field(default_factory=list)
    digest: bytes = ROOT  # of the tokens in `blocks`
    partial: int | None = None
    common: int = 0


class PrefixIndex:
    """Blocks by a hash chain: SHA-256 over the digest of all that comes before, and the block's own tokens.

    A cryptographic hash, as a hit is not compared with the tokens before the block, and clients choose them: under a
    weak hash one could make a prompt that gets another's keys and values.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: dict[bytes, int] = {}
        self._known: dict[int, Known] = {}
        self._children: dict[bytes, dict[int, None]] = {}  # by the parent's digest, in the order they were added

    def __contains__(self, block: int) -> bool:
        return block in self._known

    def known(self, block: int) -> Known:
        return self._known[block]

    def add(self, block: int, parent: bytes, tokens: Sequence[int]) -> bytes:
        """Records that a block holds `tokens`, a whole block or less, behind those of `parent`. Returns their digest.

        Replaces what was known of it, the beginning of the same. Where another block is known to hold `tokens`, that
        one stays the known one.
        """
        digest = _digest(parent, tokens)
        self.forget(block)
        if digest not in self._blocks:
            self._blocks[digest] = block
            self._known[block] = Known(digest, parent, tuple(tokens))
            self._children.setdefault(parent, {})[block] = None
        return digest

    def forget(self, block: int) -> None:
        """What a block holds is of no more use; nothing where that was not known."""
        known = self._known.pop(block, None)
        if known is None:
            return
        del self._blocks[known.digest]
        siblings = self._children[known.parent]
        del siblings[block]
        if not siblings:
            del self._children[known.parent]

    def clear(self) -> None:
        self._blocks.clear()
        self._known.clear()
        self._children.clear()

    def find(self, tokens: Sequence[int]) -> Match:
        """What is known of a prompt's beginning, but for its last token, whose logits are wanted."""
        size, most = self._block_size, len(tokens) - 1
        blocks: list[int] = []
        digest, at = ROOT, 0
        while at + size <= most:
            following = _digest(digest, tokens[at : at + size])
            block = self._blocks.get(following)
            if block is None:
                break
            blocks.append(block)
            digest, at = following, at + size
        return Match(blocks, digest, *self._partial(digest, tokens[at : min(at + size, most)]))

    def _partial(self, parent: bytes, tokens: Sequence[int]) -> tuple[int | None, int]:
        """The block that begins most like `tokens`, and how far, where a copy of it is worth it."""
        best, most = None, self._block_size // COPY_SHARE
        for block in islice(reversed(self._children.get(parent, {})), ALTERNATIVES):
            common = _common(self._known[block].tokens, tokens)
            if common > most:
                best, most = block, common
        return best, most if best is not None else 0


def _digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(parent + array("i", tokens).tobytes()).digest()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common beginning."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
