"""The stream of text: whole characters, stop strings across token borders, nothing lost and nothing said twice."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llorch.core.detokenizer import IncrementalDetokenizer
from llorch.core.tokenizer import Tokenizer
from llorch.errors import InvalidRequestError
from tests.support import shared


class Pieces:
    """A vocabulary in which token i stands for the i-th piece."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token]


def detokenizer(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(cast(Tokenizer, Pieces(pieces)), stop)


def stream(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[list[str], str | None]:
    """What each push gives, and finish last."""
    streaming = detokenizer(pieces, stop)
    texts = [streaming.push(token) for token in range(len(pieces))]
    return [*texts, streaming.finish()], streaming.stopped


def expected(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The definition: the stop string that starts first, of those the shortest."""
    found = [(text.find(s), len(s), s) for s in stop if s in text]
    return (text[: min(found)[0]], min(found)[2]) if found else (text, None)


def cut(content: bytes, lengths: Sequence[int]) -> list[bytes]:
    """Pieces of these lengths, empty ones too, and the rest."""
    pieces, position = [], 0
    for length in lengths:
        pieces.append(content[position : position + length])
        position += length
    return [*pieces, content[position:]]


# ---- characters ----


def test_a_character_comes_whole_with_its_last_byte() -> None:
    assert stream([bytes([byte]) for byte in "é🦙".encode()]) == (["", "é", "", "", "", "🦙", ""], None)


def test_text_without_stop_strings_is_never_held_back() -> None:
    assert stream([b"Once", b" upon", b"", b" a"]) == (["Once", " upon", "", " a", ""], None)


def test_invalid_bytes_become_a_replacement_character_as_soon_as_they_are_certain() -> None:
    # 0x80 cannot begin a character, 0x28 cannot continue one, and no character begins with 0xF0 0x80
    assert stream([b"a\x80", b"\xe2", b"\x28", b"\xf0", b"\x80", b"b"])[0] == ["a�", "", "�(", "", "��", "b", ""]


def test_half_a_surrogate_pair_waits_for_one_more_byte_at_most() -> None:
    assert stream([b"\xed", b"\xa0", b"b", b"c"])[0] == ["", "", "��b", "c", ""]
    assert stream([b"\xed", b"\xa0", b"\x80", b"c"])[0] == ["", "", "���", "c", ""]


def test_bytes_of_an_unfinished_character_are_dropped_at_the_end() -> None:
    assert stream([b"a", b"\xf0\x9f\xa6"]) == (["a", "", ""], None)


@given(content=st.binary(max_size=40), lengths=st.lists(st.integers(0, 5), max_size=20))
@example(content=b"\xf0\x9f\xa6\xf0\x9f\xa6\x99", lengths=[1, 1, 1, 1])
def test_any_bytes_cut_anywhere_decode_as_they_do_in_one_piece(content: bytes, lengths: list[int]) -> None:
    texts, _ = stream(cut(content, lengths))
    whole = codecs.getincrementaldecoder("utf-8")(errors="replace")
    assert "".join(texts) == whole.decode(content)  # what an unfinished character at the end leaves is not in it


@given(text=st.text(max_size=20).filter(lambda text: "�" not in text), lengths=st.lists(st.integers(0, 3), max_size=30))
def test_a_valid_text_never_shows_a_replacement_character(text: str, lengths: list[int]) -> None:
    texts, _ = stream(cut(text.encode(), lengths))
    assert "�" not in "".join(texts)
    assert "".join(texts) == text


# ---- stop strings ----


def test_a_stop_string_across_token_borders_is_never_shown() -> None:
    assert stream([b"Hi<", b"|en", b"d|", b"> more"], ["<|end|>"]) == (["Hi", "", "", "", ""], "<|end|>")


def test_what_turns_out_to_be_no_stop_string_is_released() -> None:
    assert stream([b"Hi<", b"|e", b"h?"], ["<|end|>"]) == (["Hi", "", "<|eh?", ""], None)


def test_the_text_before_a_stop_string_comes_with_the_push_that_completes_it() -> None:
    assert stream([b"one\nUser: two"], ["\nUser:"]) == (["one", ""], "\nUser:")


def test_nothing_follows_a_stop_string() -> None:
    streaming = detokenizer([b"a.", b"b"], ["."])
    assert [streaming.push(0), streaming.push(1), streaming.finish()] == ["a", "", ""]
    assert streaming.stopped == "."


def test_the_stop_string_that_starts_first_wins_though_another_is_complete_before_it() -> None:
    assert stream([b"x", b"a", b"b", b"c", b"d"], ["bc", "abcd"]) == (["x", "", "", "", "", ""], "abcd")


def test_a_complete_stop_string_that_waited_for_an_earlier_one_counts_when_that_fails() -> None:
    assert stream([b"x", b"a", b"b", b"c", b"!"], ["bc", "abcd"]) == (["x", "", "", "", "a", ""], "bc")


def test_a_complete_stop_string_that_waited_for_an_earlier_one_counts_at_the_end() -> None:
    assert stream([b"x", b"a", b"b", b"c"], ["bc", "abcd"]) == (["x", "", "", "", "a"], "bc")


def test_of_two_stop_strings_that_start_together_the_shorter_wins() -> None:
    assert stream([b"x</s></s>"], ["</s></s>", "</s>"]) == (["x", ""], "</s>")


def test_a_stop_string_may_repeat_its_own_beginning() -> None:
    assert stream([b"aa", b"ab"], ["aab"]) == (["", "a", ""], "aab")


def test_what_is_held_back_is_flushed_at_the_end() -> None:
    assert stream([b"one<|"], ["<|end|>"]) == (["one", "<|"], None)


def test_a_stop_string_may_end_in_a_character_that_tokens_split() -> None:
    assert stream([b"a", b"\xf0\x9f", b"\xa6\x99", b"b"], ["🦙"]) == (["a", "", "", "", ""], "🦙")


def test_an_unfinished_character_at_the_end_completes_no_stop_string() -> None:
    assert stream([b"a\xf0\x9f"], ["�"]) == (["a", ""], None)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="stop string 1 of 2 is empty: leave it out"):
        detokenizer([], ["a", ""])


STOPS = st.lists(st.text("abé", min_size=1, max_size=5), max_size=4)


@given(text=st.text("abé", max_size=24), stop=STOPS, lengths=st.lists(st.integers(0, 4), max_size=24))
def test_any_split_gives_the_text_up_to_the_first_stop_string(text: str, stop: list[str], lengths: list[int]) -> None:
    texts, stopped = stream(cut(text.encode(), lengths), stop)
    assert ("".join(texts), stopped) == expected(text, stop)


@given(text=st.text(max_size=30), data=st.data(), lengths=st.lists(st.integers(0, 4), max_size=24))
def test_any_unicode_text_stops_at_its_own_substrings(text: str, data: st.DataObject, lengths: list[int]) -> None:
    ranges = data.draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4)), max_size=3))
    stop = [text[start : start + length] for start, length in ranges if start < len(text)]
    texts, stopped = stream(cut(text.encode(), lengths), stop)
    assert ("".join(texts), stopped) == expected(text, stop)


@given(text=st.text("ab", max_size=16), stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_no_more_is_held_back_than_could_begin_a_stop_string(text: str, stop: list[str]) -> None:
    streaming = detokenizer([character.encode() for character in text], stop)
    shown = ""
    for token in range(len(text)):
        shown += streaming.push(token)
        if streaming.stopped is not None:
            return
        held = text[len(shown) : token + 1]
        assert not held or any(s.startswith(held) for s in stop) or any(s in held for s in stop)


def test_long_stop_strings_cost_little() -> None:
    stop = "a" * 100_000
    texts, stopped = stream([b"a" * 99_999, b"b" + b"a" * 99_999, b"a"], [stop])
    assert [len(text) for text in texts] == [0, 100_000, 0, 0]
    assert stopped == stop


# ---- over a real vocabulary ----


def test_tokens_of_a_real_vocabulary_stream_to_the_text_they_stand_for() -> None:
    tokenizer = Tokenizer.from_gguf(shared("vocabs", "ggml-vocab-llama-spm.gguf"))
    streaming = IncrementalDetokenizer(tokenizer)
    texts = [streaming.push(token) for token in tokenizer.encode("Hello 🦙\n한국어")]
    # a stream continues a text, so the space that encoding puts first is not taken away
    assert "".join(texts) == " Hello 🦙\n한국어"
    assert "" in texts[1:]  # the emoji has no token of its own
    assert streaming.finish() == ""


def test_an_id_outside_the_vocabulary_is_named() -> None:
    streaming = IncrementalDetokenizer(Tokenizer.from_gguf(shared("models", "stories260K.gguf")))
    with pytest.raises(InvalidRequestError, match="token 512 is outside the vocabulary of 512: use ids from 0 to 511"):
        streaming.push(512)
