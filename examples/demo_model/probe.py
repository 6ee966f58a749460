"""How often the first sentences of a story have the kind and the name that were asked for."""

from __future__ import annotations

import random

import sentencepiece
import torch
from corpus import encode
from grammar import HER_NAMES, HIS_NAMES, KINDS, article, invented_word
from model import Llama

TEMPERATURE = 0.7
IDS = 40  # more than any first sentence has


def copies(model: Llama, vocabulary: sentencepiece.SentencePieceProcessor, stories: int = 10) -> tuple[float, float]:
    """The shares for known kinds and names, and for known kinds with names that nobody has heard of."""
    rng = random.Random("probe")
    known = [(rng.choice(KINDS), rng.choice(HER_NAMES + HIS_NAMES)) for _ in range(stories)]
    invented = [(rng.choice(KINDS), invented_word(rng).capitalize()) for _ in range(stories)]
    return _share(model, vocabulary, known), _share(model, vocabulary, invented)


@torch.no_grad()
def _share(model: Llama, vocabulary: sentencepiece.SentencePieceProcessor, asked: list[tuple[str, str]]) -> float:
    generator = torch.Generator().manual_seed(0)
    right = 0
    for kind, name in asked:
        question = f"<|user|>\nTell me a story about {article(kind)} named {name}<|end|>\n<|assistant|>\n"
        prompt = encode(vocabulary, question)[:-1]
        ids = list(prompt)
        for _ in range(IDS):
            logits = model(torch.tensor([ids]))[0, -1]
            ids.append(int(torch.multinomial(torch.softmax(logits / TEMPERATURE, -1), 1, generator=generator)))
        text = vocabulary.decode(ids[len(prompt) :])
        right += f" {kind}" in text and f" {name}" in text
    return right / len(asked)
