"""Streamed text on a terminal: whole words on a line, whatever the pieces it comes in."""

from __future__ import annotations

import pytest

from llorch.commands._terminal import WordWrap, printable
from tests.terminal.terminal import screen

TEXT = "Once upon a time there was a fox called Pip, who lived  behind the old mill.\n\tHe was happy."


def wrapped(pieces: list[str], width: int) -> list[str]:
    wrap = WordWrap(lambda: width)
    lines = screen("".join(wrap.push(piece) for piece in pieces))
    assert all(len(line) < width for line in lines)  # a terminal treats its last column in ways of its own
    return lines


@pytest.mark.parametrize("width", [12, 20, 40, 80])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_words_stay_whole(width: int, size: int) -> None:
    lines = wrapped([TEXT[i : i + size] for i in range(0, len(TEXT), size)], width)
    assert " ".join(lines).split() == TEXT.split()


def test_a_line_is_filled_as_far_as_words_go() -> None:
    assert wrapped(["one two three four"], 10) == ["one two ", "three ", "four"]


def test_a_word_longer_than_a_line_is_cut() -> None:
    assert wrapped(["a ", "x" * 25], 11) == ["a ", "x" * 10, "x" * 10, "x" * 5]


def test_wide_characters_count_twice() -> None:
    wrap = WordWrap(lambda: 11)
    assert wrap.push("猫" * 6) == "猫" * 5 + "\n" + "猫"


def test_control_characters_are_spelt_out() -> None:
    assert printable("a\x1b]0;title\x07\n\tb\u202e") == "a\\x1b]0;title\\x07\n\tb\\u202e"
