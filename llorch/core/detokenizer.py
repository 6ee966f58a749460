"""Token ids to a stream of text: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from llorch.core.tokenizer import Tokenizer
from llorch.errors import InvalidRequestError


class IncrementalDetokenizer:
    """The text of one generation, released as it becomes certain. Not for use by several threads at once.

    Bytes that can no longer become a character turn into U+FFFD at once (those of a surrogate with the next byte), just
    where `bytes.decode(errors="replace")` would put it. The stop string that starts first ends the text; of two that
    start together the shorter, which is complete first. How the text is cut into tokens makes no difference.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Raises InvalidRequestError for an empty stop string, which would match everywhere."""
        for index, text in enumerate(stop):
            if not text:
                raise InvalidRequestError(f"stop string {index} of {len(stop)} is empty: leave it out")
        self.stopped: str | None = None  # the stop string that ended the text
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matchers = [_StopMatcher(text) for text in dict.fromkeys(stop)]
        self._held = ""  # text that a stop string may begin in
        self._start = self._end = 0  # where the held text starts in the whole text, and where the matchers are
        self._match: tuple[int, str] | None = None  # the earliest stop string that is complete: its position, itself

    def push(self, token_id: int) -> str:
        """The text that this token makes certain, often none; none at all once `stopped` is set.

        Raises InvalidRequestError for an id outside the vocabulary.
        """
        piece = self._tokenizer.token_bytes(token_id)
        return self._release(self._decoder.decode(piece)) if self.stopped is None else ""

    def finish(self) -> str:
        """What is held back, as no more tokens come. Bytes of an unfinished character are dropped.

        May set `stopped`: a complete stop string waits while one that starts before it is under way.
        """
        if self.stopped is not None:
            return ""
        text = self._release("")
        if self.stopped is None:
            text += self._take(self._end) if self._match is None else self._stop(*self._match)
        return text

    def _release(self, text: str) -> str:
        if not self._matchers:
            return text
        self._held += text
        open_from = self._start  # no stop string begins in front of it, but for the one in _match
        for character in text:
            self._end += 1
            for matcher in self._matchers:
                if matcher.feed(character):
                    found = (self._end - len(matcher.text), matcher.text)
                    self._match = min(self._match or found, found, key=lambda match: match[0])
            open_from = self._end - max(matcher.matched for matcher in self._matchers)
            if self._match is not None and self._match[0] <= open_from:
                return self._stop(*self._match)
        return self._take(open_from)

    def _stop(self, position: int, stop: str) -> str:
        text, self.stopped = self._take(position), stop
        self._held = ""
        return text

    def _take(self, end: int) -> str:
        """Text held up to this position, which is held no more."""
        text, self._held = self._held[: end - self._start], self._held[end - self._start :]
        self._start = end
        return text


class _StopMatcher:
    """Knuth, Morris, Pratt: how much of a stop string the text so far ends with, in constant time a character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # characters; always short of the whole string
        self._borders = [0]  # of each prefix: the longest shorter prefix that it ends with
        for character in text[1:]:
            self._borders.append(self._advance(self._borders[-1], character))

    def feed(self, character: str) -> bool:
        """Whether the stop string ends with this character."""
        self.matched = self._advance(self.matched, character)
        if self.matched < len(self.text):
            return False
        self.matched = 0  # where it occurs again, it starts later and cannot win
        return True

    def _advance(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.text[matched] == character)
