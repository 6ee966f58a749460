"""SentencePiece vocabularies against llama.cpp's own server."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from llorch.core.gguf import GGUFFile
from llorch.core.tokenizer import Tokenizer
from tests.support import absent, shared
from tests.vocabulary_files import CONTROL, UNUSED, USER_DEFINED, Token, write_sentencepiece

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
    path = write_sentencepiece(tmp_path_factory.mktemp("parity") / "model.gguf", tokens, tensors=True, **fields)
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
