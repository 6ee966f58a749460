"""Vocabularies that cannot be used: read as tokenizers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from tests.malformed.case import Case
from tests.malformed.case import of as case_of
from tests.malformed.layout import BOOL, F32, I32, I64, STRING, U32, VOCAB, WORDS, array, byte_level, scalar, tiny

TINY = tiny().but(tensors=())
of = partial(case_of, tokenizer=True, error="TokenizerError")
P = "tokenizer.ggml."


def vocabularies() -> Iterator[Case]:
    for part in (_kinds, _tokens, _scores, _token_types, _special_ids, _byte_tokens, _merges, _byte_level):
        yield from part()


def _kinds() -> Iterator[Case]:
    yield of("no tokenizer", TINY.without_field(P + "model"), "tokenizer.ggml.model is missing")
    for name in ("whatever", "", "LLAMA"):
        file = TINY.with_field(P + "model", scalar(STRING, name))
        yield of(
            f"tokenizer {name!r}",
            file,
            f"tokenizer.ggml.model is {name!r}",
            "supported: ",
            error="UnsupportedModelError",
        )
    wrong = {
        "model": scalar(U32, 1),
        "tokens": array(I32, [1, 2]),
        "scores": array(STRING, ["1"]),
        "token_type": scalar(I32, 1),
    }
    wrong |= {"bos_token_id": scalar(STRING, "1"), "eos_token_id": scalar(F32, 2.0), "add_bos_token": scalar(U32, 1)}
    wrong |= {"add_space_prefix": scalar(STRING, "true"), "unknown_token_id": array(I32, [0])}
    for name, value in wrong.items():
        file = TINY.with_field(P + name, value)
        yield of(f"{name} of a wrong type", file, f"field {P}{name}", "expected", where=P + name, error="GGUFError")


def _tokens() -> Iterator[Case]:
    yield of("no tokens", TINY.without_field(P + "tokens"), f"{P}tokens is missing")
    yield of("0 tokens", TINY.with_field(P + "tokens", array(STRING, [])), f"{P}tokens", "0 tokens")


def _scores() -> Iterator[Case]:
    yield of("no scores", TINY.without_field(P + "scores"), f"{P}scores is missing", str(VOCAB))
    for count in (0, 1, VOCAB - 1, VOCAB + 1):
        file = TINY.with_field(P + "scores", array(F32, [0.0] * count))
        yield of(
            f"{count} scores", file, f"{P}scores", f"has {count} entries, {P}tokens has {VOCAB}", where=P + "scores"
        )
    file = TINY.with_field(P + "scores", array(I32, [0] * VOCAB))
    yield of("whole numbers for scores", file, f"{P}scores", "holds int32, expected float32", where=P + "scores")
    for index in (0, VOCAB - 1):
        scores = [0.0] * VOCAB
        scores[index] = math.nan
        file = TINY.with_field(P + "scores", array(F32, scores))
        yield of(f"score {index} is NaN", file, f"{P}scores[{index}] is NaN", where=P + "scores")


def _token_types() -> Iterator[Case]:
    for count in (0, VOCAB - 1, VOCAB + 1):
        file = TINY.with_field(P + "token_type", array(I32, [1] * count))
        yield of(
            f"{count} token types",
            file,
            f"{P}token_type",
            f"has {count} entries, {P}tokens has {VOCAB}",
            where=P + "token_type",
        )
    for kind in (0, 7, -1, 2**31 - 1):
        types = [1] * VOCAB
        types[9] = kind
        file = TINY.with_field(P + "token_type", array(I32, types))
        yield of(f"token type {kind}", file, f"{P}token_type[9] is {kind}, expected 1 to 6", where=P + "token_type")


def _special_ids() -> Iterator[Case]:
    for role in ("bos", "eos", "unknown", "eot", "eom"):
        for token in (VOCAB, 2**32 - 1, -1):
            key = f"{P}{role}_token_id"
            file = TINY.with_field(key, scalar(I64, token))
            yield of(f"{role} is {token}", file, key, f"is {token}, the vocabulary has {VOCAB} tokens", where=key)
    small = TINY.with_field(P + "tokens", array(STRING, ["a"])).with_field(P + "scores", array(F32, [0.0]))
    small = small.without_field(P + "token_type").without_field(P + "bos_token_id").without_field(P + "eos_token_id")
    yield of("a BOS that is not there", small, f"{P}add_bos_token", "no BOS token", where=P + "add_bos_token")
    adds_eos = small.without_field(P + "add_bos_token").with_field(P + "add_bos_token", scalar(BOOL, False))
    adds_eos = adds_eos.with_field(P + "add_eos_token", scalar(BOOL, True))
    yield of("an EOS that is not there", adds_eos, f"{P}add_eos_token", "no EOS token", where=P + "add_eos_token")


def _byte_tokens() -> Iterator[Case]:
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(f"w{i}" for i in range(WORDS))]
    for text in ("<0x-1>", "<0x100>", "<0xZZ>", "<0x>", "", "0x41", "<0x 1>", "<0x1>", "<0x41> "):
        tokens = [*texts[:70], text, *texts[71:]]
        file = TINY.with_field(P + "tokens", array(STRING, tokens))
        said = (f"{P}tokens[70] is the byte token {text!r}, expected <0x00> to <0xFF>",)
        yield of(f"the byte token {text!r}", file, *said, where=P + "tokens")


GOOD = TINY.but(fields={**{k: v for k, v in TINY.fields.items() if not str(k).startswith(P)}, **byte_level()})


def _merges() -> Iterator[Case]:
    """Byte-level BPE: what each merge joins, and what it gives, must be tokens."""
    yield of("no merges", GOOD.without_field(P + "merges"), f"{P}merges is missing")
    wrong = {"numbers": array(I32, [1]), "a text": scalar(STRING, "h e"), "no array of strings": array(I32, [])}
    for name, value in wrong.items():
        file = GOOD.with_field(P + "merges", value)
        yield of(f"{name} for merges", file, f"{P}merges", "expected", where=P + "merges", error="GGUFError")
    pair = "expected two tokens with a space between them"
    merges = {
        "of an unknown left": ("zz e", f"'zz' is none of the {VOCAB} tokens"),
        "of an unknown right": ("h zz", f"'zz' is none of the {VOCAB} tokens"),
        "that gives no token": ("h l", f"'hl' is none of the {VOCAB} tokens"),
        "of three parts": ("h e l", f"'e l' is none of the {VOCAB} tokens"),
        "of one part": ("he", pair),
        "of nothing": ("", pair),
        "of a space": (" ", pair),
        "of a missing right": ("h ", pair),
        "of a missing left": (" e", pair),
    }
    for name, (merge, said) in merges.items():
        for index in (0, 1):
            file = GOOD.with_field(P + "merges", array(STRING, [merge] if index == 0 else ["h e", merge]))
            yield of(f"merge {index} {name}", file, f"{P}merges[{index}] is '{merge}'", said, where=P + "merges")
    control = GOOD.with_field(P + "merges", array(STRING, ["h e"] * 50_000 + ["e zz"]))
    yield of("a wrong merge behind many", control, f"{P}merges[50000] is 'e zz'", where=P + "merges")
    long = GOOD.with_field(P + "merges", array(STRING, ["h " + "e" * 100_000]))
    yield of("a merge of a hundred thousand characters", long, f"{P}merges[0] is 'h eee", where=P + "merges")


def _byte_level() -> Iterator[Case]:
    """Byte-level BPE: the pre-tokenizer, and what the tokens are."""
    for name in ("llama-BPE", "gpt2", "x" * 1000, "\n"):
        file = GOOD.with_field(P + "pre", scalar(STRING, name))
        yield of(f"pre-tokenizer {name[:12]!r}", file, f"{P}pre is '", "llama-bpe, ", "qwen2, ", where=P + "pre")
    for name in ("gemma4", "whitespace"):
        file = GOOD.with_field(P + "pre", scalar(STRING, name))
        said = (f"{P}pre is '{name}'", "merged from characters")
        yield of(f"pre-tokenizer {name}", file, *said, where=P + "pre", error="UnsupportedModelError")
    for name in ("pre", "add_space_prefix", "add_eos_token"):
        file = GOOD.with_field(P + name, scalar(I32, 1))
        said = (f"field {P}{name}", "expected")
        yield of(f"{name} of a wrong type, byte-level", file, *said, where=P + name, error="GGUFError")
    types = GOOD.with_field(P + "token_type", array(I32, [1] * 70 + [6] + [1] * (VOCAB - 71)))
    said = (f"{P}tokens[70] is the byte token", "expected <0x00> to <0xFF>")
    yield of("a byte token among byte-level ones", types, *said, where=P + "tokens")
    few = GOOD.with_field(P + "token_type", array(I32, [1] * (VOCAB - 1)))
    said = (f"{P}token_type", f"has {VOCAB - 1} entries, {P}tokens has {VOCAB}")
    yield of("too few token types, byte-level", few, *said, where=P + "token_type")
    bos = GOOD.with_field(P + "bos_token_id", scalar(U32, VOCAB))
    yield of("BOS past the end, byte-level", bos, f"is {VOCAB}, the vocabulary has {VOCAB}", where=P + "bos_token_id")
