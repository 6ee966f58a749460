"""Byte-level BPE vocabularies: what the metadata says, what is refused, and how texts come back in pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llorch.core.bpe_splits import NOT_BYTE_LEVEL, PRE_TOKENIZERS
from llorch.core.chat import GUARD, Chat
from llorch.core.detokenizer import IncrementalDetokenizer
from llorch.core.tokenizer import Tokenizer
from llorch.errors import TokenizerError, UnsupportedModelError
from tests.vocabulary_files import ALPHABET, BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, write_bpe

H, E = ALPHABET.index("h"), ALPHABET.index("e")
HE, HEL, START, END, TOOL = range(256, 261)
TOKENS = [*ALPHABET, "he", "hel", ("<s>", CONTROL), ("<|im_end|>", CONTROL), ("<tool>", USER_DEFINED)]
MERGES = ["h e", "he l"]
Make = Callable[..., Tokenizer]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def maker(tokens: Any = TOKENS, merges: Any = MERGES, **fields: Any) -> Tokenizer:
        return Tokenizer.from_gguf(write_bpe(tmp_path / "vocab.gguf", tokens, merges, **fields))

    return maker


def ids(tokenizer: Tokenizer, text: str, **options: Any) -> list[int]:
    return tokenizer.encode(text, **{"add_special": False, **options})


def test_merges_are_made_in_their_order(make: Make) -> None:
    assert ids(make(), "hehel") == [HE, HEL]
    assert ids(make(merges=["e h", "h e", "he l"], tokens=[*TOKENS, "eh"]), "heh") == [H, 261]


def test_of_a_merge_twice_the_first_counts(make: Make) -> None:
    tokens = [*TOKENS, "eh"]
    assert ids(make(tokens, ["e h", "h e", "e h"]), "heh") == ids(make(tokens, ["e h", "h e"]), "heh")
    assert ids(make(tokens, ["h e", "e h", "h e"]), "heh") == ids(make(tokens, ["h e", "e h"]), "heh")


@pytest.mark.parametrize(("name", "expected"), [("llama-bpe", [261]), ("dbrx", [HEL, ALPHABET.index("p")])])
def test_a_piece_that_is_a_token_may_go_before_merges(make: Make, name: str, expected: list[int]) -> None:
    assert ids(make([*TOKENS, "help"], pre=name), "help") == expected


def test_control_tokens_match_where_asked_for_and_user_defined_ones_always(make: Make) -> None:
    tokenizer = make()
    assert ids(tokenizer, "he<|im_end|>", parse_special=True) == [HE, END]
    assert END not in ids(tokenizer, "he<|im_end|>")
    assert ids(tokenizer, "he<tool>he") == [HE, TOOL, HE]
    assert tokenizer.decode([HE, END, TOOL]) == "he<tool>"


def test_merging_never_makes_what_the_file_calls_a_control_token(make: Make) -> None:
    tokens = [*ALPHABET, ("he", CONTROL), ("hel", CONTROL)]
    assert ids(make(tokens, pre="llama-bpe"), "hel") == [H, E, ALPHABET.index("l")]
    normal = make([*ALPHABET, "he", "</", ("</s", NORMAL), ("</s>", NORMAL)], ["< /", "</ s", "</s >"], pre="dbrx")
    assert ids(normal, "a</s>")[-1] != 259  # cut in front of the letter
    assert 259 in normal.eog_ids  # ends generation, whatever its type


def test_bos_is_added_as_the_file_says_or_else_the_name(make: Make) -> None:
    assert make(pre="llama-bpe", bos_token_id=START).encode("he") == [START, HE]
    assert make(pre="llama-bpe", bos_token_id=START, add_bos_token=False).encode("he") == [HE]
    assert make(pre="llama-bpe").encode("he") == [HE]  # there is none
    assert make(bos_token_id=START).encode("he") == [HE]
    assert make(bos_token_id=START, add_bos_token=True).encode_prompt("<s>he") == [START, HE]


def test_falcons_token_11_is_bos_and_eos_where_it_is_a_control_token(make: Make) -> None:
    tokenizer = make([*ALPHABET[:11], ("<|endoftext|>", CONTROL), *ALPHABET[11:], "he", "hel"])
    assert (tokenizer.bos_id, tokenizer.eos_id) == (11, 11)
    assert (make().bos_id, make().eos_id) == (None, None)  # an ordinary character


def test_tokens_of_code_models_end_generation(make: Make) -> None:
    tokens = [*TOKENS, ("<|fim_pad|>", CONTROL), ("<|file_sep|>", CONTROL)]
    assert make(tokens, eos_token_id=HE).eog_ids == {HE, END, 261, 262}
    assert make(tokens, eos_token_id=HE, fim_pad_token_id=HEL).eog_ids == {HE, HEL, END, 262}


def test_what_tokens_of_each_type_add_to_a_text(make: Make) -> None:
    odd = [("<0x41>", BYTE), ("<a>", UNUSED), ("\u2581 plain", NORMAL), ("", NORMAL)]
    tokenizer = make([*TOKENS, *odd])
    assert [tokenizer.token_bytes(i) for i in (HEL, START, TOOL)] == [b"hel", b"", b"<tool>"]
    assert [tokenizer.token_bytes(i) for i in range(261, 265)] == [b"A", b"", "\u2581 plain".encode(), b""]
    assert sorted(tokenizer.token_bytes(i) for i in range(256)) == [bytes([i]) for i in range(256)]


def test_a_byte_that_is_no_token_adds_nothing(make: Make) -> None:
    tokens = [*(token for token in ALPHABET if token != "e"), "xy"]
    assert ids(make(tokens, ["x y"]), "heh") == [tokens.index("h")] * 2  # as in llama.cpp


def test_white_space_beside_tokens_of_some_models(make: Make) -> None:
    right, left = make(general_name="Phi-3"), make([*TOKENS, ("<mask>", CONTROL)], pre="jina-v2-code")
    assert ids(right, "<|im_end|> \n he", parse_special=True) == [END, HE]
    assert ids(left, "he \n <mask> he", parse_special=True)[:2] == [HE, 261]


def test_characters_cut_in_tokens_are_streamed_whole(make: Make) -> None:
    tokenizer = make()
    text = "hé🦙 中he"
    stream = IncrementalDetokenizer(tokenizer)
    pieces = [stream.push(token) for token in ids(tokenizer, text)]
    assert "".join(pieces) + stream.finish() == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces.count("") == 1 + 3 + 2  # bytes that begin é, the llama and 中


def test_a_message_cannot_write_a_control_token(make: Make) -> None:
    tokenizer = make()
    chat = Chat(tokenizer, {"default": "<s>{{ messages[0].content }}<|im_end|>"})
    try:
        for content in ("<|im_end|>", "<|im_", "he<tool>", f"<|im{GUARD}_end|>"):
            found = chat.prompt([{"role": "user", "content": content}])
            assert found[0] == START
            assert [token for token in found if token in (START, END)] == [START, END]
            assert tokenizer.decode(found) == content.replace(GUARD, "")
    finally:
        chat.close()


# ---- errors; tests/malformed has more ----


def test_an_unknown_pre_tokenizer_lists_the_known_ones(make: Make) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer.ggml.pre is 'qwen-2', which is not known") as error:
        make(pre="qwen-2")
    assert all(name in str(error.value) for name in PRE_TOKENIZERS)


@pytest.mark.parametrize("name", sorted(NOT_BYTE_LEVEL))
def test_vocabularies_of_characters_are_refused_by_name(make: Make, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"pre is '{name}': tokens are merged from characters there"):
        make(pre=name)


def test_merges_that_are_missing(make: Make) -> None:
    with pytest.raises(TokenizerError, match=r"vocab.gguf: tokenizer.ggml.merges is missing"):
        make(merges=None)


@pytest.mark.parametrize("merge", ["h l", "zz e", "h zz", "he", "h ", " h", ""])
def test_a_merge_that_cannot_be_made_is_named(make: Make, merge: str) -> None:
    with pytest.raises(TokenizerError, match=rf"offset \d+: tokenizer.ggml.merges\[1\] is '{merge}'"):
        make(merges=["h e", merge])
