"""What the model learns from: conversations and bare stories of the grammar, as token ids."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from plots import story
from talk import conversation

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
END = "<|end|>"  # of a message
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BARE_STORIES = 0.12  # the share of documents without a conversation around: what a plain completion continues


def document(rng: random.Random) -> str:
    """A document as CHAT_TEMPLATE renders it, or a story alone."""
    if rng.random() < BARE_STORIES:
        return story(rng).text
    return "".join(f"<|{m['role']}|>\n{m['content']}{END}\n" for m in conversation(rng))


def train_vocabulary(path: Path, size: int, seed: int, documents: int = 12_000) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece vocabulary (BPE, byte fallback) of the grammar's words. Text is taken as it is: no prefix, nothing
    normalised."""
    rng = random.Random(seed)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(document(rng) for _ in range(documents)),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=[*ROLES, END],
        max_sentence_length=16384,
        num_threads=1,  # the same vocabulary every time
        minloglevel=1,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def encode(vocabulary: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Ids of a document: BOS, the text with its control tokens, EOS."""
    controls = {mark: vocabulary.piece_to_id(mark) for mark in (*ROLES, END)}
    ids, rest = [vocabulary.bos_id()], text
    while rest:
        found = min(((rest.find(mark), mark) for mark in controls if mark in rest), default=None)
        plain, mark = (rest, None) if found is None else (rest[: found[0]], found[1])
        ids += vocabulary.encode(plain) if plain else []
        if mark is None:
            break
        ids.append(controls[mark])
        rest = rest[len(plain) + len(mark) :]
    return [*ids, vocabulary.eos_id()]


def batches(
    vocabulary: sentencepiece.SentencePieceProcessor, seed: int, rows: int, length: int
) -> Iterator[np.ndarray]:
    """Batches [rows, length + 1] of documents one behind the other, for ever; no document comes twice."""
    rng, stream = random.Random(seed), np.empty(0, np.int64)
    while True:
        parts = [stream]
        while sum(map(len, parts)) < rows * (length + 1):
            parts.append(np.array(encode(vocabulary, document(rng)), np.int64))
        joined = np.concatenate(parts)
        yield joined[: rows * (length + 1)].reshape(rows, length + 1)
        stream = joined[rows * (length + 1) :]
