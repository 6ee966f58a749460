"""The packaged demonstration model: what a newcomer asks it first, and how well it knows its grammar."""

from __future__ import annotations

import importlib
import math
import random
import re
from collections.abc import Iterator

import gguf
import numpy as np
import pytest

import llorch
from llorch.core.requests import Ended, SamplingParams, StopReason, Token
from llorch.demo import DEMO_MODEL
from tests.support import ROOT

SEEDS = range(20)
FRESH_TOKENS = 6000


@pytest.fixture(scope="module")
def llm() -> Iterator[llorch.LLM]:
    with llorch.load(DEMO_MODEL, provider="numpy-cpu", parallel=1, threads=1) as llm:
        yield llm


def answer(llm: llorch.LLM, question: str, seed: int = 0, temperature: float = 0.0) -> str:
    """The whole answer; fails where the model does not end it."""
    prompt = llm.chat.encode(llm.chat.render([{"role": "user", "content": question}]))
    events = list(llm.stream(prompt, SamplingParams(temperature=temperature, seed=seed), max_tokens=500))
    assert isinstance(events[-1], Ended)
    assert events[-1].reason == StopReason.EOS, "the answer has no end"
    return "".join(event.text for event in events if isinstance(event, Token))


def is_story(text: str, kind: str, name: str) -> bool:
    """A story of the one asked for: presented by kind and name in its first sentence, with a plot and an end."""
    sentences = re.findall(r"[^.!?]+[.!?]", text)
    first = sentences[0] if sentences else ""
    introduced = re.search(rf"\b{kind}\b", first) and re.search(rf"\b{name}\b", first)
    return bool(introduced) and len(sentences) >= 7 and len(re.findall(rf"\b{name}\b", text)) >= 3


def test_a_story_about_a_fox_named_pip_is_one_in_19_of_20(llm: llorch.LLM) -> None:
    stories = [answer(llm, "Tell me a story about a fox named Pip", seed, temperature=0.7) for seed in SEEDS]
    wrong = [story for story in stories if not is_story(story, "fox", "Pip")]
    assert len(wrong) <= 1, "\n\n".join(wrong)
    assert len(set(stories)) == len(stories), "they are the same"
    assert not any(is_story(story, "bear", "Pip") or is_story(story, "fox", "Luna") for story in stories)


def test_other_kinds_and_names_are_taken_over_as_well(llm: llorch.LLM) -> None:
    asked = [
        ("owl", "Luna"),
        ("dragon", "Ivy"),
        ("robot", "Max"),
        ("cat", "Molly"),
        ("penguin", "Bob"),
        ("king", "Leo"),
    ]
    stories = {(kind, name): answer(llm, f"Tell me a story about a {kind} named {name}.") for kind, name in asked}
    wrong = [text for (kind, name), text in stories.items() if not is_story(text, kind, name)]
    assert len(wrong) <= 1, "\n\n".join(wrong)


def test_sums_of_small_numbers_are_right(llm: llorch.LLM) -> None:
    pairs = [(a, b) for a in range(1, 10, 2) for b in range(1, 10, 2)]
    answers = [answer(llm, f"What is {a} + {b}?") for a, b in pairs]
    right = [text == f"{a} plus {b} is {a + b}." for (a, b), text in zip(pairs, answers, strict=True)]
    assert sum(right) >= len(pairs) - 1, answers


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Hello", r"Hello|Hi"),
        ("What are you?", r"llorch demo"),
        ("What is the capital of France?", r"small demonstration model"),
        ("Write a Python program about the moon", r"small demonstration model"),
        ("What is 4123 + 978?", r"too big"),
        ("Thanks!", r"welcome|glad|pleasure"),
        ("How can I use a real model?", r"--model"),
    ],
)
def test_small_talk(llm: llorch.LLM, question: str, expected: str) -> None:
    assert re.search(expected, answer(llm, question))


def test_a_story_that_the_user_begins_goes_on(llm: llorch.LLM) -> None:
    start = "Once upon a time, there was a fox named Pip. Pip wanted to learn to swim."
    text = answer(llm, f"Continue this story: {start}")
    assert "Pip" in text
    assert "Once upon" not in text
    assert len(re.findall(r"[.!?]", text)) >= 5


def test_perplexity_of_fresh_text_of_the_grammar(llm: llorch.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of a seed that training has not had; and the same words in another order, which must be unlikely."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "demo_model")
    corpus = importlib.import_module("corpus")
    rng = random.Random("fresh text")
    nats, tokens = 0.0, 0
    while tokens < FRESH_TOKENS:
        text = corpus.document(rng)
        ids = [*llm.tokenizer.encode(text, add_special=True, parse_special=True), llm.tokenizer.eos_id]
        nats, tokens = nats + loss(llm, ids), tokens + len(ids) - 1
    perplexity = math.exp(nats / tokens)
    assert perplexity <= 1.75, perplexity
    mixed = [ids[0], *rng.sample(ids[1:-1], len(ids) - 2), ids[-1]]
    assert math.exp(loss(llm, mixed) / (len(mixed) - 1)) > 20 * perplexity


def loss(llm: llorch.LLM, ids: list[int]) -> float:
    """The cross-entropy of all ids but the first, in nats. What is behind the ids, so that few lengths occur and few
    plans are made, changes nothing before it."""
    padding = [0] * (-len(ids) % 128)
    logits = llm.logits(ids[:-1] + padding)[: len(ids) - 1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return float(np.sum(np.log(np.exp(logits).sum(-1)) - chosen))


def test_the_file_is_small_and_says_what_it_is() -> None:
    assert DEMO_MODEL.stat().st_size <= 4_000_000
    fields = gguf.GGUFReader(DEMO_MODEL).fields
    told = {name.removeprefix("general."): field.contents() for name, field in fields.items() if "general." in name}
    assert (told["architecture"], told["name"], told["license"]) == ("llama", "llorch-demo", "MIT")
    assert "must not be relied on" in told["description"]
    assert "nats a token on fresh text" in fields["llorch.demo.training"].contents()
    assert "assistant" in fields["tokenizer.chat_template"].contents()
    heads, kv_heads = (fields[f"llama.attention.head_count{of}"].contents() for of in ("", "_kv"))
    assert heads > kv_heads
