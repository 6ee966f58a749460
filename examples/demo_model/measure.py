"""Measures what the demo model can do, as a Markdown table: the figures of its card, README.md, are this script's.

    python examples/demo_model/measure.py [MODEL]

Everything is asked through llorch as a user would: one question, the chat template, the whole answer.
"""

from __future__ import annotations

import argparse
import math
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from corpus import document
from grammar import HER_NAMES, HIS_NAMES, KINDS, RARE_KINDS, article, invented_word

import llorch
from llorch.core.requests import Ended, SamplingParams, StopReason, Token
from llorch.demo import DEMO_MODEL

TEMPERATURE = 0.7  # of stories; sums are greedy
TOGETHER = 8  # questions that are answered at once
LONGEST = 500  # tokens of an answer


@dataclass(frozen=True)
class Sums:
    """A way to ask, and the pairs of numbers (a, b) that are asked for."""

    question: str
    word: str
    result: Callable[[int, int], int]
    pairs: Sequence[tuple[int, int]]


def pairs(highest: int, allowed: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    numbers = range(highest + 1)
    return [(a, b) for a in numbers for b in numbers if allowed(a, b)]


TO_TWENTY = pairs(20, lambda a, b: a + b <= 20)
SUMS = {
    "What is a + b? All with a + b to 20": Sums("What is {a} + {b}?", "plus", operator.add, TO_TWENTY),
    "a plus b? All with a + b to 20": Sums("{a} plus {b}?", "plus", operator.add, TO_TWENTY),
    "a+b. All with a + b to 20": Sums("{a}+{b}", "plus", operator.add, TO_TWENTY),
    "What is a + b? a and b to 20, a + b above 20": Sums(
        "What is {a} + {b}?", "plus", operator.add, pairs(20, lambda a, b: a + b > 20)
    ),
    "What is a - b? All with b <= a <= 20": Sums(
        "What is {a} - {b}?", "minus", operator.sub, pairs(20, lambda a, b: b <= a)
    ),
    "What is a * b? a and b to 10": Sums("What is {a} * {b}?", "times", operator.mul, pairs(10, lambda a, b: True)),
}


def main() -> None:
    arguments = _arguments()
    with llorch.load(arguments.model, provider=arguments.provider, parallel=TOGETHER) as llm:
        print(f"| {arguments.model.name}, {llm.provider_name} | right | of |\n|---|---|---|")
        for name, right, of in measured(llm, arguments.stories):
            print(f"| {name} | {right} | {of} |", flush=True)
        print(f"\nPerplexity of {arguments.tokens} tokens of fresh text: {perplexity(llm, arguments.tokens):.3f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=DEMO_MODEL, help="GGUF file (the packaged one)")
    parser.add_argument("--provider", default="auto", help="(%(default)s)")
    parser.add_argument("--stories", type=int, default=100, help="of each sort (%(default)s)")
    parser.add_argument("--tokens", type=int, default=50_000, help="of fresh text (%(default)s)")
    return parser.parse_args()


def measured(llm: llorch.LLM, stories: int) -> Iterator[tuple[str, int, int]]:
    """What is asked for, how often it was right, and of how many."""
    rng, names = random.Random("measure"), HER_NAMES + HIS_NAMES
    sorts = {
        f"A fox named Pip, seeds 0 to {stories - 1}": [("fox", "Pip")] * stories,
        "Common kinds, known names": [(rng.choice(KINDS), rng.choice(names)) for _ in range(stories)],
        "Rare kinds, known names": [(rng.choice(RARE_KINDS), rng.choice(names)) for _ in range(stories)],
        "Common kinds, invented names": [(rng.choice(KINDS), invented_word(rng).capitalize()) for _ in range(stories)],
        "Invented kinds, invented names": [
            (invented_word(rng), invented_word(rng).capitalize()) for _ in range(stories)
        ],
    }
    for name, asked in sorts.items():
        yield f"Stories: {name}", stories_told(llm, asked), len(asked)
    for name, sums in SUMS.items():
        yield f"Sums: {name}", sums_right(llm, sums), len(sums.pairs)


def answer(llm: llorch.LLM, question: str, seed: int = 0, temperature: float = 0.0) -> str:
    """The whole answer; empty where the model does not end it."""
    prompt = llm.chat.encode(llm.chat.render([{"role": "user", "content": question}]))
    events = list(llm.stream(prompt, SamplingParams(temperature=temperature, seed=seed), max_tokens=LONGEST))
    if not isinstance(events[-1], Ended) or events[-1].reason != StopReason.EOS:
        return ""
    return "".join(event.text for event in events if isinstance(event, Token))


def is_story(text: str, kind: str, name: str) -> bool:
    """A story of the one asked for: presented by kind and name in its first sentence, with a plot and an end."""
    sentences = re.findall(r"[^.!?]+[.!?]", text)
    first = sentences[0] if sentences else ""
    introduced = re.search(rf"\b{kind}\b", first) and re.search(rf"\b{name}\b", first)
    return bool(introduced) and len(sentences) >= 7 and len(re.findall(rf"\b{name}\b", text)) >= 3


def stories_told(llm: llorch.LLM, asked: Sequence[tuple[str, str]]) -> int:
    """How many of these kinds and names get their story; the seed of each is its place."""

    def right(seed: int, kind: str, name: str) -> bool:
        question = f"Tell me a story about {article(kind)} named {name}"
        return is_story(answer(llm, question, seed, TEMPERATURE), kind, name)

    with ThreadPoolExecutor(TOGETHER) as threads:
        return sum(threads.map(right, range(len(asked)), *zip(*asked, strict=True)))


def sums_right(llm: llorch.LLM, sums: Sums) -> int:
    """How many of the pairs get the right answer, whole."""

    def right(a: int, b: int) -> bool:
        return answer(llm, sums.question.format(a=a, b=b)) == f"{a} {sums.word} {b} is {sums.result(a, b)}."

    with ThreadPoolExecutor(TOGETHER) as threads:
        return sum(threads.map(right, *zip(*sums.pairs, strict=True)))


def perplexity(llm: llorch.LLM, tokens: int) -> float:
    """Of documents of the grammar, of a seed that training has not had."""
    rng, nats, count = random.Random("fresh text"), 0.0, 0
    while count < tokens:
        ids = [*llm.tokenizer.encode(document(rng), add_special=True, parse_special=True), llm.tokenizer.eos_id]
        nats, count = nats + loss(llm, ids), count + len(ids) - 1
    return math.exp(nats / count)


def loss(llm: llorch.LLM, ids: list[int]) -> float:
    """The cross-entropy of all ids but the first, in nats. What is behind the ids, so that few lengths occur and few
    plans are made, changes nothing before it."""
    padding = [0] * (-len(ids) % 128)
    logits = llm.logits(ids[:-1] + padding)[: len(ids) - 1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return float(np.sum(np.log(np.exp(logits).sum(-1)) - chosen))


if __name__ == "__main__":
    main()
