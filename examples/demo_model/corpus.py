"""What the model learns from: conversations and bare stories of the grammar, as token ids."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import sentencepiece
from plots import story
from talk import Message, conversation, messages_of, simple_sum

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
END = "<|end|>"  # of a message
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PADDING = -1
BARE_STORIES = 0.1  # the share of documents without a conversation around: what a plain completion continues


def document(rng: random.Random) -> str:
    """A document as CHAT_TEMPLATE renders it, or a story alone."""
    if rng.random() < BARE_STORIES:
        return story(rng).text
    return rendered(conversation(rng))


def rendered(messages: list[Message]) -> str:
    return "".join(f"<|{m['role']}|>\n{m['content']}{END}\n" for m in messages)


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


def batch(
    vocabulary: sentencepiece.SentencePieceProcessor,
    seed: str,
    tokens: int,
    longest: int,
    sums: int = 0,
    part: int = 1024,
) -> list[np.ndarray]:
    """The batch of one seed: about `tokens` tokens of documents, and so many sums besides, one a row, in parts [rows, length].

    A document is cut at `longest` + 1 ids. Rows of a part are about as long as each other, at most `part` ids together,
    and end in PADDING: that many stay in a processor's cache. No document stands beside another in a row, so that what it
    copies from is its own.
    """
    rng = random.Random(seed)
    documents: list[list[int]] = []
    while sum(map(len, documents)) < tokens:
        documents.append(encode(vocabulary, document(rng))[: longest + 1])
    documents += [encode(vocabulary, rendered(messages_of(simple_sum(rng)))) for _ in range(sums)]
    documents.sort(key=len, reverse=True)
    parts = []
    while documents:
        length = len(documents[0])
        rows, documents = documents[: max(1, part // length)], documents[max(1, part // length) :]
        padded = np.full((len(rows), length), PADDING, np.int64)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = ids
        parts.append(padded)
    return parts
