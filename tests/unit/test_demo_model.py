"""The packaged demonstration model: what a newcomer asks it first, and how well it knows its grammar."""

from __future__ import annotations

import importlib
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import gguf
import pytest

import llorch
from llorch.demo import DEMO_MODEL
from tests.support import ROOT

SEEDS = range(20)
FRESH_TOKENS = 6000


@pytest.fixture(scope="module")
def llm() -> Iterator[llorch.LLM]:
    with llorch.load(DEMO_MODEL, provider="numpy-cpu", parallel=8, threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def measure() -> Iterator[ModuleType]:
    """examples/demo_model/measure.py: what is asked, and how an answer is judged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "demo_model")
        yield importlib.import_module("measure")


@pytest.fixture
def answer(llm: llorch.LLM, measure: ModuleType) -> Callable[..., str]:
    """The whole answer to a question; fails where the model does not end it."""

    def whole(question: str, seed: int = 0, temperature: float = 0.0) -> str:
        text: str = measure.answer(llm, question, seed, temperature)
        assert text, f"the answer to {question!r} has no end"
        return text

    return whole


def test_a_story_about_a_fox_named_pip_is_one_in_19_of_20(answer: Callable[..., str], measure: ModuleType) -> None:
    stories = [answer("Tell me a story about a fox named Pip", seed, temperature=0.7) for seed in SEEDS]
    wrong = [story for story in stories if not measure.is_story(story, "fox", "Pip")]
    assert len(wrong) <= 1, "\n\n".join(wrong)
    assert len(set(stories)) == len(stories), "they are the same"
    assert not any(
        measure.is_story(story, "bear", "Pip") or measure.is_story(story, "fox", "Luna") for story in stories
    )


def test_other_kinds_and_names_are_taken_over_as_well(answer: Callable[..., str], measure: ModuleType) -> None:
    asked = [
        ("owl", "Luna"),
        ("dragon", "Ivy"),
        ("robot", "Max"),
        ("cat", "Molly"),
        ("penguin", "Bob"),
        ("king", "Leo"),
    ]
    stories = {(kind, name): answer(f"Tell me a story about a {kind} named {name}.") for kind, name in asked}
    wrong = [text for (kind, name), text in stories.items() if not measure.is_story(text, kind, name)]
    assert len(wrong) <= 1, "\n\n".join(wrong)


@pytest.mark.parametrize("way", ["What is a + b?", "a plus b?", "a+b."])
def test_every_sum_to_twenty_is_right(llm: llorch.LLM, measure: ModuleType, way: str) -> None:
    sums = measure.SUMS[f"{way} All with a + b to 20"]
    assert len(sums.pairs) == 231
    assert measure.sums_right(llm, sums) == 231


def test_a_wrong_sum_is_not_counted_as_right(llm: llorch.LLM, measure: ModuleType) -> None:
    sums = measure.SUMS["What is a + b? All with a + b to 20"]
    off_by_one = replace(sums, result=lambda a, b: a + b + 1, pairs=sums.pairs[:20])
    assert measure.sums_right(llm, off_by_one) == 0


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
def test_small_talk(answer: Callable[..., str], question: str, expected: str) -> None:
    assert re.search(expected, answer(question))


def test_a_story_that_the_user_begins_goes_on(answer: Callable[..., str]) -> None:
    start = "Once upon a time, there was a fox named Pip. Pip wanted to learn to swim."
    text = answer(f"Continue this story: {start}")
    assert "Pip" in text
    assert "Once upon" not in text
    assert len(re.findall(r"[.!?]", text)) >= 5


def test_perplexity_of_fresh_text_of_the_grammar(llm: llorch.LLM, measure: ModuleType) -> None:
    """Documents of a seed that training has not had; and the same words in another order, which must be unlikely."""
    perplexity = measure.perplexity(llm, FRESH_TOKENS)
    assert perplexity <= 1.7, perplexity
    rng = random.Random("another order")
    text = measure.document(rng)
    ids = [*llm.tokenizer.encode(text, add_special=True, parse_special=True), llm.tokenizer.eos_id]
    mixed = [ids[0], *rng.sample(ids[1:-1], len(ids) - 2), ids[-1]]
    assert math.exp(measure.loss(llm, mixed) / (len(mixed) - 1)) > 20 * perplexity


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
