"""The tokenizer: llama.cpp's ids to the letter, special tokens, and every ill-formed vocabulary as one clear error."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llorch
from llorch.core.gguf import GGUFFile
from llorch.core.tokenizer import Tokenizer
from llorch.errors import GGUFError, InvalidRequestError, TokenizerError, UnsupportedModelError
from tests.support import absent, shared, synthetic

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
Token = tuple[str, float, int]

BYTES: list[Token] = [(f"<0x{i:02X}>", 0.0, BYTE) for i in range(256)]
BASE: list[Token] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), *BYTES]
LETTERS: list[Token] = [(letter, -100.0, NORMAL) for letter in "▁abcd"]


def write(path: Path, tokens: Sequence[Token], /, *, tensors: bool = False, **fields: Any) -> Path:
    """A SentencePiece vocabulary; with tensors, a model that llama.cpp loads. A field that is None is left out."""
    texts, scores, types = zip(*tokens, strict=True)
    known = {"model": "llama", "tokens": texts, "scores": scores, "token_type": types, **fields}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in known.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            (writer.add_uint32 if value >= 0 else writer.add_int32)(name, value)
        elif value is not None:
            writer.add_array(name, list(value))
    if tensors:
        add_tensors(writer, len(tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensors(writer: gguf.GGUFWriter, size: int, dim: int = 32) -> None:
    writer.add_context_length(64)
    writer.add_embedding_length(dim)
    writer.add_block_count(1)
    writer.add_feed_forward_length(dim)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(dim)
    shapes = {"token_embd": (size, dim), "output": (size, dim), "output_norm": (dim,)}
    shapes |= {f"blk.0.{name}": (dim,) for name in ("attn_norm", "ffn_norm")}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": (dim, dim) for name in matrices}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))


Make = Callable[..., Tokenizer]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def maker(tokens: Sequence[Token], /, **fields: Any) -> Tokenizer:
        return Tokenizer.from_gguf(write(tmp_path / "vocab.gguf", tokens, **fields))

    return maker


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return Tokenizer.from_gguf(shared("vocabs", "ggml-vocab-llama-spm.gguf"))


# ---- real vocabularies ----


def test_all_47_strings_of_the_llama_vocabulary_are_exact(llama: Tokenizer) -> None:
    strings = shared("vocabs", "ggml-vocab-llama-spm.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = shared("vocabs", "ggml-vocab-llama-spm.gguf.out").read_text().split("\n")
    assert len(strings) == len(lines) == 47
    for string, line in zip(strings, lines, strict=True):
        expected = [int(token) for token in line.split()]
        assert llama.encode(string, add_special=False) == expected, string
        assert llama.decode(expected) == string


def test_what_the_llama_vocabulary_says_about_itself(llama: Tokenizer) -> None:
    assert (llama.kind, llama.vocab_size, llama.bos_id, llama.eos_id) == ("sentencepiece", 32000, 1, 2)
    assert llama.eog_ids == {2}
    assert (llama.token_bytes(1), llama.token_bytes(13), llama.token_bytes(15043)) == (b"", b"\n", b" Hello")


# For SentencePiece U+2581 stands for the space, so no text with it comes back as it was.
@settings(max_examples=500, deadline=None)
@given(text=st.text().filter(lambda text: "▁" not in text))
def test_decoding_gives_back_what_was_encoded(llama: Tokenizer, text: str) -> None:
    assert llama.decode(llama.encode(text)) == text
    assert (
        b"".join(map(llama.token_bytes, llama.encode(text, add_special=False))) == (f" {text}" if text else "").encode()
    )


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


# ---- against llama.cpp itself ----

EXTRA: list[Token] = [
    ("<|im_start|>", -1000.0, CONTROL),
    ("<|im_end|>", -1000.0, CONTROL),
    ("<|im", -1000.0, CONTROL),  # shorter than those that begin with it
    ("im_e", -1000.0, USER_DEFINED),  # within a longer one
    ("\n\n", -1000.0, USER_DEFINED),
    ("   ", -1000.0, USER_DEFINED),
    ("<tool>", -1000.0, USER_DEFINED),
    ("<pad>", -1000.0, UNUSED),
]
FRAGMENTS = [
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "the",
    " the",
    " ",
    "\t",
    "\n",
    "▁",
    "▁▁",
    "é",
    "e\u0301",
    "🦙",
    "한국",
    "\0",
]
FRAGMENTS += ["\ufffd", "\u200d", "\u3000"] + [text for text, _, _ in EXTRA]


def random_text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randint(0, 12)):
        kind = rng.random()
        if kind < 0.5:
            parts.append(rng.choice(FRAGMENTS))
        elif kind < 0.8:
            parts.append("".join(rng.choices("abcdefghij <>|_\n .,0123", k=rng.randint(1, 12))))
        else:
            parts.append(chr(rng.choice([rng.randint(1, 0xD7FF), rng.randint(0xE000, 0x10FFFF)])))
    return "".join(parts)


Post = Callable[..., Any]


def serve_with_llama_cpp(path: Path) -> Iterator[Post]:
    """POSTs to llama.cpp's own server on the loopback interface."""
    try:
        import xllamacpp
    except ImportError as error:
        absent(f"xllamacpp (extra `parity`) cannot be imported: {error}")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_gpu_layers, parameters.warmup, parameters.verbosity = 64, 0, False, 0
    parameters.cpuparams.n_threads, parameters.port = 1, 0
    server = xllamacpp.Server(parameters)
    with httpx.Client(base_url=server.listening_address, trust_env=False, timeout=30) as client:
        yield lambda route, **body: client.post(route, json=body).raise_for_status().json()
    del server


@pytest.fixture(scope="module", params=["as it is", "with more special tokens", "without a space prefix"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tokenizer, Post]]:
    """The llama vocabulary here and in llama.cpp."""
    with GGUFFile.open(shared("vocabs", "ggml-vocab-llama-spm.gguf")) as file:
        texts = file.get("tokenizer.ggml.tokens", list)
        scores, types = (file.get(f"tokenizer.ggml.{key}", np.ndarray).tolist() for key in ("scores", "token_type"))
    tokens = list(zip(texts, scores, types, strict=True))
    fields = {}
    if request.param != "as it is":
        tokens += EXTRA
    if request.param == "without a space prefix":
        fields = {"add_space_prefix": False, "add_bos_token": False, "add_eos_token": True}
    path = write(tmp_path_factory.mktemp("parity") / "model.gguf", tokens, tensors=True, **fields)
    for post in serve_with_llama_cpp(path):
        yield Tokenizer.from_gguf(path), post


def test_random_texts_have_the_ids_that_llama_cpp_gives_them(pair: tuple[Tokenizer, Post]) -> None:
    tokenizer, post = pair
    rng = random.Random(5)
    for _ in range(400):
        text, add_special, parse_special = random_text(rng), rng.random() < 0.5, rng.random() < 0.5
        expected = post("/tokenize", content=text, add_special=add_special, parse_special=parse_special)["tokens"]
        assert tokenizer.encode(text, add_special, parse_special) == expected, (text, add_special, parse_special)


def test_tokens_stand_for_the_bytes_that_llama_cpp_writes(pair: tuple[Tokenizer, Post]) -> None:
    tokenizer, post = pair
    tokens = [i for i in range(259, tokenizer.vocab_size) if tokenizer.token_bytes(i)]
    assert len(tokens) > 31_000
    assert b"".join(map(tokenizer.token_bytes, tokens)).decode() == post("/detokenize", tokens=tokens)["content"]


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


@pytest.mark.parametrize("name", ["ggml-vocab-llama-bpe.gguf", "ggml-vocab-qwen2.gguf"])
def test_byte_level_bpe_is_refused_by_name(name: str) -> None:
    path = shared("vocabs", name)
    with pytest.raises(UnsupportedModelError) as error:
        Tokenizer.from_gguf(path)
    assert str(error.value) == (
        f"{path}: tokenizer.ggml.model is 'gpt2': byte-level BPE vocabularies are not supported yet; "
        "supported: 'llama' (SentencePiece); use a model with such a vocabulary"
    )


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
