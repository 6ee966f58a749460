"""Byte-level BPE against llama.cpp: the same ids for every name of a pre-tokenizer that llama.cpp has.

The vocabularies are trained on the very texts that are compared, without a pre-tokenizer, so that every cut that falls
elsewhere gives other ids. Each fifth merge is left out: its token is only reached where merges are ignored.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llorch.core.bpe_splits import PRE_TOKENIZERS
from llorch.core.tokenizer import Tokenizer
from llorch.core.vocabulary import END_OF_GENERATION, FILL_IN_THE_MIDDLE
from tests.parity.llamacpp import LlamaVocabulary
from tests.vocabulary_files import ALPHABET, CONTROL, NORMAL, USER_DEFINED, train_bpe, write_bpe

CHARACTERS = (
    " \t\n\0\x1f\x7f\x85\xa0\u1680\u2028\u3000aB1!$+_-(/#\\{}\xe9\xc9\xdf\xaa\xbd\u017f\u01c5\u02b0\u0301\u0378\u0663"
    "\u0800\u0948\u1000\u17b4\u200c\u200d\u2014\u201c\u2026\u2167\u3002\u3131\u3400\u4e2d\u9fff\uf900\uff09\uff0c\ufffd"
    "\U00010400\U00020000\U000e0001\u0897\U000105c0\U0001cc00\U0002ebf0"  # the last four are of Unicode 16 and 15.1
)
WORDS = (
    "'s 'S 'll 'RE 'vE 'x 'ſ Hello world HELLOworld camelCase Σσ 12 123 1234 12345 文字 ひら カナ 한국 ไทย e\u0301 🦙 "
    "👩\u200d💻 ?! ... <=> ^~|` // [x] <sentinel:1> IMGIMGABZ"
)
FRAGMENTS = [*CHARACTERS, *WORDS.split(), "  ", "   ", "\r\n", "\n\n", " \n "]
TEXTS = 250
SIZE = 4000


def random_text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randint(1, 14)):
        kind = rng.random()
        if kind < 0.7:
            parts.append(rng.choice(FRAGMENTS))
        elif kind < 0.8:
            parts.append("".join(rng.choices("abcXYZ 0123456789'.,\n", k=rng.randint(1, 9))))
        elif kind < 0.9:
            parts.append(rng.choice([" ", "\n", "1", "A", "\xe9", "\u4e2d", "\t"]) * rng.randint(2, 40))
        else:
            ranges = [(1, 0x2FFF), (1, 0xD7FF), (0xE000, 0x10FFFF)]
            parts.append(chr(rng.randint(*rng.choice(ranges))))
    return "".join(parts)


def random_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [random_text(rng) for _ in range(count)]


class Vocabulary:
    """A trained vocabulary, written under any name."""

    def __init__(self, folder: Path, texts: Sequence[str], size: int) -> None:
        self.path, self.texts = folder / "model.gguf", texts
        tokens, merges = train_bpe(texts, size)
        self.tokens = [("<s>", CONTROL), ("</s>", CONTROL), *tokens]
        self.merges = [merge for i, merge in enumerate(merges) if i % 5]

    def write(self, **fields: Any) -> Path:
        ids = {"bos_token_id": 0, "eos_token_id": 1, "seperator_token_id": 1}  # the field is spelt so
        return write_bpe(self.path, self.tokens, self.merges, tensors=True, **{**ids, **fields})


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(tmp_path_factory.mktemp("bpe"), random_texts(7, TEXTS), SIZE)


def check(vocabulary: Vocabulary, ours: str, theirs: str | None = None, **fields: Any) -> None:
    """Compares the ids of all texts, in a file that names `ours`; llama.cpp gets one that names `theirs`."""
    tokenizer = Tokenizer.from_gguf(vocabulary.write(pre=ours, **fields))
    with LlamaVocabulary(vocabulary.write(pre=theirs or ours, **fields)) as reference:
        for text in vocabulary.texts:
            assert tokenizer.encode(text) == reference.encode(text), text


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_ids_are_llama_cpps_whatever_the_pre_tokenizer(vocabulary: Vocabulary, name: str) -> None:
    check(vocabulary, name)


def test_a_file_that_names_no_pre_tokenizer(vocabulary: Vocabulary) -> None:
    tokenizer = Tokenizer.from_gguf(vocabulary.write(pre=None))
    assert tokenizer.pre == "default"
    with LlamaVocabulary(vocabulary.path) as reference:
        assert [tokenizer.encode(text) for text in vocabulary.texts] == [reference.encode(t) for t in vocabulary.texts]


# names that differ in one thing: the numbers, the marks, the case, the merges, ...
NEIGHBOURS = (
    "gpt-2 starcoder, qwen2 llama4, qwen2 qwen35, dbrx llama-bpe, tekken gpt-4o, deepseek-v3 spark2_5, superbpe gpt-2, "
    "jais-2 dbrx, bloom viking, kimi-k2 dbrx, exaone-moe qwen2, afmoe deepseek-v3, tiny_aya gpt-4o, "
    "k2-horizon dbrx, seed-coder qwen2, ufakzeka qwen2, default falcon, deepseek-llm deepseek-coder"
)


@pytest.mark.parametrize(("ours", "theirs"), [pair.split() for pair in NEIGHBOURS.split(", ")])
def test_another_pre_tokenizer_gives_other_ids(vocabulary: Vocabulary, ours: str, theirs: str) -> None:
    """The comparison can fail."""
    with pytest.raises(AssertionError):
        check(vocabulary, ours, theirs)


@pytest.mark.parametrize("name", ["qwen35", "deepseek-v3"])
def test_every_kind_of_character_is_what_it_is_to_llama_cpp(tmp_path: Path, name: str) -> None:
    """Where Unicode's categories begin and end, and what versions 15 and 16 have added; both names tell letters, marks,
    numbers, punctuation, symbols and white space apart."""
    codes = [code for code in range(1, 0x32000) if not 0xD800 <= code < 0xE000]
    before = [unicodedata.category(chr(code - 1)) for code in codes]
    edges = [code for code, kind in zip(codes, before, strict=True) if kind != unicodedata.category(chr(code))]
    unknown = [code for code in codes if unicodedata.category(chr(code)) == "Cn"][::40]
    text = [f"x{c}1{c} {c}y{c}." for c in map(chr, [*edges, *unknown])]
    check(Vocabulary(tmp_path, text, 24_000), name)


@pytest.mark.parametrize(
    "fields",
    [
        {"pre": "llama-bpe"},
        {"pre": "llama-bpe", "add_bos_token": False},
        {"pre": "gpt-2", "add_bos_token": True, "add_eos_token": True},
        {"pre": "tekken"},
        {"pre": "chameleon", "add_eos_token": True},
        {"pre": "qwen2", "add_space_prefix": True},
        {"pre": "jina-v2-code"},
        {"pre": "gpt-2", "general_name": "Phi-3 mini"},
        {"pre": "gpt-2", "general_name": "Modern-BERT"},
    ],
)
def test_special_tokens_match_as_in_llama_cpp(vocabulary: Vocabulary, fields: dict[str, Any]) -> None:
    special = [("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL), ("<|im", CONTROL), ("im_e", USER_DEFINED)]
    special += [("\n\n", USER_DEFINED), ("<tool>", USER_DEFINED), ("<mask>", CONTROL), ("[MASK]", CONTROL)]
    special += [("<unk>", CONTROL), ("<|endoftext|>", CONTROL)]
    rng = random.Random(3)
    tokens = [*vocabulary.tokens, *special]
    path = write_bpe(vocabulary.path, tokens, vocabulary.merges, tensors=True, bos_token_id=0, eos_token_id=1, **fields)
    tokenizer = Tokenizer.from_gguf(path)
    pieces = [text for text, _ in special] + ["<s>", "</s>", " ", "  ", "\n", "\t", "\u3000", "Hello", "<", ">", "|"]
    with LlamaVocabulary(path) as reference:
        for _ in range(300):
            text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
            flags = (rng.random() < 0.5, rng.random() < 0.5)
            assert tokenizer.encode(text, *flags) == reference.encode(text, *flags), (text, flags)


ENDINGS = sorted(END_OF_GENERATION.union(*FILL_IN_THE_MIDDLE.values()))
BESIDE = [("<|end|>", "<|return|>", "<|call|>"), ("<|end|>", "<|calls|>", "<|flush|>"), ("<|end|>", "<|return|>")]
BESIDE += [("</s>", "<|tool_response>"), ("<|fim_pad|>", "<|file_sep|>", "<|endoftext|>"), ("<|im_end|>", "<|eot_id|>")]


@pytest.mark.parametrize("texts", [*((text,) for text in ENDINGS), *BESIDE], ids=" ".join)
@pytest.mark.parametrize("fields", [{}, {"eot_token_id": 5, "fim_pad_token_id": 6}], ids=["silent", "named"])
def test_the_end_of_generation_is_llama_cpps(tmp_path: Path, texts: tuple[str, ...], fields: dict[str, int]) -> None:
    tokens = [*ALPHABET, "ab", *((text, NORMAL) for text in texts)]
    path = write_bpe(tmp_path / "model.gguf", tokens, ["a b"], tensors=True, bos_token_id=0, eos_token_id=1, **fields)
    with LlamaVocabulary(path) as reference:
        assert Tokenizer.from_gguf(path).eog_ids == reference.eog_ids
