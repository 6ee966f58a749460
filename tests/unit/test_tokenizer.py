"""The tokenizer over SentencePiece vocabularies: special tokens, and every ill-formed file as one clear error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import llorch
from llorch.core.gguf import GGUFFile
from llorch.core.tokenizer import Tokenizer
from llorch.errors import GGUFError, InvalidRequestError, TokenizerError, UnsupportedModelError
from tests.support import shared, synthetic
from tests.vocabulary_files import (
    BASE,
    BYTE,
    CONTROL,
    LETTERS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Token,
    write_sentencepiece,
)

Make = Callable[..., Tokenizer]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def maker(tokens: Sequence[Token], /, **fields: Any) -> Tokenizer:
        return Tokenizer.from_gguf(write_sentencepiece(tmp_path / "vocab.gguf", tokens, **fields))

    return maker


# ---- models ----


def test_the_small_model_of_the_checkpoints() -> None:
    tokenizer = Tokenizer.from_gguf(shared("models", "stories260K.gguf"))
    assert tokenizer.encode("Once upon a time") == [1, 403, 407, 261, 378]
    assert tokenizer.decode([1, 403, 407, 261, 378]) == "Once upon a time"


def test_a_synthetic_model(tmp_path: Path) -> None:
    path = synthetic(tmp_path, "tiny", "F32")
    with GGUFFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    assert tokenizer.vocab_size == 2048
    text = "Hello, wörld! 🦙\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text  # needs nothing of the closed file


def test_it_is_public() -> None:
    assert llorch.Tokenizer is Tokenizer


# ---- special tokens ----

CHAT: list[Token] = [*BASE, *LETTERS, ("<a>", 0.0, CONTROL), ("<a><b>", 0.0, CONTROL), ("<tool>", 0.0, USER_DEFINED)]
A, AB, TOOL, SPACE, LETTER_A, LETTER_B = 264, 265, 266, 259, 260, 261
LESS, MORE = 3 + ord("<"), 3 + ord(">")


def test_control_tokens_match_only_where_asked_for(make: Make) -> None:
    tokenizer = make(CHAT)
    assert tokenizer.encode("<a>", add_special=False, parse_special=True) == [A]
    assert tokenizer.encode("<a>", add_special=False) == [SPACE, LESS, LETTER_A, MORE]


def test_the_longest_special_token_matches_first(make: Make) -> None:
    assert make(CHAT).encode("<a><a><b>", add_special=False, parse_special=True) == [A, AB]


def test_user_defined_tokens_always_match(make: Make) -> None:
    tokenizer = make(CHAT)
    assert tokenizer.encode("a<tool>b", add_special=False) == [SPACE, LETTER_A, TOOL, SPACE, LETTER_B]
    assert tokenizer.decode(tokenizer.encode("a<tool>b <tool>")) == "a<tool>b <tool>"


def test_a_space_comes_before_text_at_the_start_and_after_every_special_token(make: Make) -> None:
    ids = make(CHAT).encode("a<a>a<a><a>a", add_special=False, parse_special=True)
    assert ids == [SPACE, LETTER_A, A, SPACE, LETTER_A, A, A, SPACE, LETTER_A]


def test_no_space_comes_before_text_where_the_vocabulary_wants_none(make: Make) -> None:
    tokenizer = make(CHAT, add_space_prefix=False)
    assert tokenizer.encode("a<a> a", add_special=False, parse_special=True) == [LETTER_A, A, SPACE, LETTER_A]
    assert tokenizer.decode([SPACE, LETTER_A]) == " a"


def test_control_tokens_stand_for_no_text(make: Make) -> None:
    tokenizer = make(CHAT)
    assert tokenizer.decode([1, A, SPACE, LETTER_A, A, SPACE, LETTER_B, 2]) == "a b"
    assert [tokenizer.token_bytes(i) for i in (0, 1, A)] == [b"", b"", b""]
    assert [tokenizer.token_bytes(i) for i in (TOOL, SPACE, 3 + 0x41)] == [b"<tool>", b" ", b"A"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ([1], [])),
        ({"add_bos_token": False}, ([], [])),
        ({"add_eos_token": True}, ([1], [2])),
        ({"bos_token_id": A, "eos_token_id": AB, "add_eos_token": True}, ([A], [AB])),
    ],
)
def test_bos_and_eos_are_added_as_the_vocabulary_says(
    make: Make, fields: dict[str, Any], expected: tuple[list[int], list[int]]
) -> None:
    before, after = expected
    tokenizer = make(CHAT, **fields)
    assert tokenizer.encode("a") == [*before, SPACE, LETTER_A, *after]
    assert tokenizer.encode("") == before + after
    assert tokenizer.encode("a", add_special=False) == [SPACE, LETTER_A]


def test_text_cannot_be_merged_into_a_control_or_byte_token(make: Make) -> None:
    steps: list[Token] = [(text, 10.0, NORMAL) for text in ("<0", "x4", "<0x4", "<0x41", "<0x41>", "<a", "<s")]
    tokenizer = make([*CHAT, *steps])
    ids = tokenizer.encode("<0x41><s><a>", add_special=False)
    assert not {1, A, 3 + 0x41} & set(ids)
    assert tokenizer.decode(ids) == "<0x41><s><a>"


# ---- the end of generation ----


def test_the_end_of_generation_is_a_set(make: Make) -> None:
    tokens = [*CHAT, ("<|im_end|>", 0.0, CONTROL), ("<end_of_turn>", 0.0, USER_DEFINED), ("<|eot_id|>", 0.0, NORMAL)]
    tokenizer = make(tokens, eos_token_id=A, eot_token_id=AB, eom_token_id=TOOL)
    assert tokenizer.eog_ids == {2, A, AB, TOOL, 267, 268, 269}  # 2 is </s>
    assert tokenizer.token_bytes(269) == b""  # a control token, whatever the file says
    assert tokenizer.encode("<|eot_id|>", add_special=False, parse_special=True) == [269]
    assert 269 not in tokenizer.encode("<|eot_id|>")


@pytest.mark.parametrize("others", [("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>")])
def test_a_text_that_only_closes_a_message_does_not_end_generation(make: Make, others: tuple[str, str]) -> None:
    tokens = [*CHAT, ("<|end|>", 0.0, CONTROL)]
    assert make(tokens).eog_ids == {2, 267}
    assert make([*tokens, *((text, 0.0, CONTROL) for text in others)]).eog_ids == {2, 268, 269}


# ---- odd vocabularies that are in use ----


def test_a_file_without_token_types(make: Make) -> None:
    tokenizer = make([*BASE, *LETTERS], token_type=None)
    assert tokenizer.encode("aé") == [1, SPACE, LETTER_A, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode([0, 1, SPACE, LETTER_A, 3 + 0xC3, 3 + 0xA9, 2]) == "aé"


def test_repeated_and_empty_texts_and_those_with_a_nul(make: Make) -> None:
    odd: list[Token] = [("a", -1.0, NORMAL), ("", 0.0, NORMAL), ("", 0.0, CONTROL), ("b\0", 0.0, NORMAL)]
    tokenizer = make([*BASE, *LETTERS, *odd])
    assert tokenizer.encode("ab\0", add_special=False) == [SPACE, 264, LETTER_B, 3]  # the last of two counts
    assert tokenizer.decode([264, LETTER_A, 265, 266, 267]) == "aab\0"


def test_a_vocabulary_without_byte_tokens_has_an_unknown_token(make: Make) -> None:
    tokenizer = make([*BASE[:3], *LETTERS])
    assert tokenizer.encode("aéb", add_special=False) == [3, 4, 0, 5]
    assert tokenizer.decode([3, 4, 0, 5]) == "ab"


def test_a_vocabulary_that_lacks_some_bytes(make: Make) -> None:
    tokens = [token for token in [*BASE, *LETTERS] if token[0] != "<0xA9>"]
    assert make(tokens).encode("é", add_special=False) == [258, 2 + 0xC3, 0]


def test_unused_tokens_are_silent(make: Make) -> None:
    assert make([*BASE, *LETTERS, ("ab", 0.0, UNUSED)]).token_bytes(264) == b""


# ---- errors ----


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"tokens": None}, TokenizerError, "tokenizer.ggml.tokens is missing"),
        ({"model": None}, TokenizerError, "tokenizer.ggml.model is missing"),
        ({"scores": None}, TokenizerError, "tokenizer.ggml.scores is missing, .* of 264 tokens needs 264"),
        (
            {"scores": [0.0] * 263},
            TokenizerError,
            r"tokenizer.ggml.scores has 263 entries, tokenizer.ggml.tokens has 264",
        ),
        ({"scores": [0.0] * 5 + [float("nan")] * 259}, TokenizerError, r"tokenizer.ggml.scores\[5\] is NaN"),
        ({"scores": [1] * 264}, TokenizerError, "tokenizer.ggml.scores holds int32, expected float32"),
        (
            {"scores": ["1"] * 264},
            GGUFError,
            "scores at offset .* is an array of 264 strings, expected an array of num",
        ),
        ({"token_type": [1] * 265}, TokenizerError, "tokenizer.ggml.token_type has 265 entries, .*tokens has 264"),
        ({"token_type": [1] * 263 + [7]}, TokenizerError, r"tokenizer.ggml.token_type\[263\] is 7, expected 1 to 6"),
        (
            {"token_type": [6] * 264},
            TokenizerError,
            r"tokens\[0\] is the byte token '<unk>', expected <0x00> to <0xFF>",
        ),
        ({"bos_token_id": 264}, TokenizerError, "tokenizer.ggml.bos_token_id is 264, the vocabulary has 264 tokens"),
        ({"eos_token_id": -1}, TokenizerError, "tokenizer.ggml.eos_token_id is -1, the vocabulary has 264 tokens"),
        (
            {"eot_token_id": 1 << 31},
            TokenizerError,
            "tokenizer.ggml.eot_token_id is 2147483648, the vocabulary has 264",
        ),
        ({"unknown_token_id": 300}, TokenizerError, "tokenizer.ggml.unknown_token_id is 300"),
        ({"bos_token_id": "1"}, GGUFError, "bos_token_id at offset .* is the string '1', expected an integer"),
        ({"add_bos_token": 1}, GGUFError, "add_bos_token at offset .* is the int 1, expected a boolean"),
    ],
)
def test_an_ill_formed_vocabulary_is_named_with_both_numbers(
    make: Make, tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        make([*BASE, *LETTERS], **fields)
    assert str(raised.value).startswith(f"{tmp_path / 'vocab.gguf'}: ")


@pytest.mark.parametrize("text", ["<0x-1>", "<0x100>", "<0xG0>", "<0x0 >", "0x41", ""])
def test_a_malformed_byte_token(make: Make, text: str) -> None:
    with pytest.raises(TokenizerError, match=r"tokens\[264\] is the byte token .*expected <0x00> to <0xFF>"):
        make([*BASE, *LETTERS, (text, 0.0, BYTE)])


def test_a_text_longer_than_the_library_takes(make: Make) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer.ggml.tokens is no SentencePiece vocabulary: .*too long"):
        make([*BASE, *LETTERS, ("a" * 10_000, 0.0, NORMAL)])


def test_a_bos_token_that_is_wanted_and_absent(make: Make) -> None:
    with pytest.raises(TokenizerError, match=r"add_bos_token is true, but the vocabulary has no BOS token"):
        make([("<unk>", 0.0, UNKNOWN)])


@pytest.mark.parametrize(
    ("model", "what"), [("bert", "WordPiece"), ("t5", "Unigram"), ("gemma4", "character-level BPE")]
)
def test_kinds_that_are_known_and_not_supported_are_refused_by_name(make: Make, model: str, what: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"is '{model}': {what} vocabularies are not .* 'llama' .* 'gpt2'"):
        make(BASE, model=model)


def test_a_kind_that_nobody_knows(make: Make) -> None:
    with pytest.raises(UnsupportedModelError, match="is 'x': this kind of vocabulary is not supported"):
        make(BASE, model="x")


@pytest.mark.parametrize("token", [-1, 264, 1 << 40])
def test_an_id_outside_the_vocabulary(make: Make, token: int) -> None:
    tokenizer = make([*BASE, *LETTERS])
    with pytest.raises(
        InvalidRequestError, match=f"token {token} is outside the vocabulary of 264: use ids from 0 to 263"
    ):
        tokenizer.decode([1, token])
    with pytest.raises(InvalidRequestError, match=f"token {token} is outside"):
        tokenizer.token_bytes(token)


def test_a_lone_surrogate_is_named(make: Make) -> None:
    with pytest.raises(InvalidRequestError, match=r"character 1 of 3 is the lone surrogate U\+D800: send well-formed"):
        make(BASE).encode("a\ud800b")
