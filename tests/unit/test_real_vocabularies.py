"""Vocabularies of real models: llama.cpp's ids to the letter, and every text back as it was."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llorch.core.tokenizer import Tokenizer
from tests.support import shared

NAMES = ["llama-spm", "llama-bpe", "qwen2"]
LOADED: dict[str, Tokenizer] = {}
MIB = 1 << 20


def loaded(name: str) -> Tokenizer:
    path = shared("vocabs", f"ggml-vocab-{name}.gguf")
    if name not in LOADED:
        LOADED[name] = Tokenizer.from_gguf(path)
    return LOADED[name]


@pytest.mark.parametrize("name", NAMES)
def test_all_47_strings_are_exact(name: str) -> None:
    tokenizer = loaded(name)
    strings = shared("vocabs", f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = shared("vocabs", f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    assert len(strings) == len(lines) == 47
    for string, line in zip(strings, lines, strict=True):
        expected = [int(token) for token in line.split()]
        assert tokenizer.encode(string, add_special=False) == expected, string
        assert tokenizer.decode(expected) == string


# 20 texts an example: 10,000 a vocabulary. For SentencePiece U+2581 stands for the space, so no text keeps it.
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(texts=st.lists(st.text(max_size=20), min_size=20, max_size=20, unique=True))
def test_decoding_gives_back_what_was_encoded(name: str, texts: list[str]) -> None:
    tokenizer = loaded(name)
    for text in texts:
        if tokenizer.kind == "sentencepiece":
            text = text.replace("\N{LOWER ONE EIGHTH BLOCK}", "")
        assert tokenizer.decode(tokenizer.encode(text)) == text
        pieces = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_special=False)))
        assert pieces == (f" {text}" if text and tokenizer.kind == "sentencepiece" else text).encode()


def test_what_the_llama_2_vocabulary_says_about_itself() -> None:
    tokenizer = loaded("llama-spm")
    assert (tokenizer.kind, tokenizer.pre, tokenizer.vocab_size) == ("sentencepiece", None, 32000)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eog_ids) == (1, 2, {2})
    assert [tokenizer.token_bytes(i) for i in (1, 13, 15043)] == [b"", b"\n", b" Hello"]


def test_what_the_llama_3_vocabulary_says_about_itself() -> None:
    tokenizer = loaded("llama-bpe")
    assert (tokenizer.kind, tokenizer.pre, tokenizer.vocab_size) == ("bpe", "llama-bpe", 128256)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eog_ids) == (128000, 128001, {128001, 128009})
    assert tokenizer.encode("Hello") == [128000, 9906]  # the file is silent about BOS, Llama 3 wants one
    assert [tokenizer.token_bytes(i) for i in (128000, 9906, 220)] == [b"", b"Hello", b" "]


def test_what_the_qwen_2_vocabulary_says_about_itself() -> None:
    tokenizer = loaded("qwen2")
    assert (tokenizer.kind, tokenizer.pre) == ("bpe", "qwen2")
    assert tokenizer.text(tokenizer.eos_id or 0) == "<|endoftext|>"
    assert {tokenizer.text(i) for i in tokenizer.eog_ids} >= {"<|endoftext|>", "<|im_end|>"}
    assert tokenizer.encode("Hello") == [9707]


def test_control_tokens_match_in_a_rendered_prompt_alone() -> None:
    tokenizer = loaded("llama-bpe")
    text = "<|begin_of_text|>Hi<|eot_id|>"
    assert tokenizer.encode_prompt(text) == [128000, 13347, 128009]  # no second BOS
    assert not {128000, 128009} & set(tokenizer.encode(text, add_special=False))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unit", ["a", " ", "7", "\n", "中", "e\u0301", "a1", "<|eot_id|>"])
def test_a_megabyte_of_one_thing_takes_linear_time(name: str, unit: str) -> None:
    """Times are of the whole against an eighth: quadratic time would be 64 times as much. No clock is trusted alone."""
    tokenizer = loaded(name)
    seconds = []
    for size in (MIB // 8, MIB):
        text = unit * (size // len(unit.encode()))
        start = time.process_time()
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        seconds.append(time.process_time() - start)
        assert len(ids) >= len(text) // 256
    assert seconds[1] < 25 * max(seconds[0], 0.02)
