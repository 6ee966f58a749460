"""A request's tokens do not depend on who shares its batch, nor on how its prompt is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llorch
from llorch.core.requests import Ended, Request, SamplingParams
from llorch.core.runner import Chunk
from llorch.providers.conformance.models import TinyModel, write_model

SEEDS, TOKENS, TOGETHER = 64, 12, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(TinyModel(type="Q4_K", seed=37), tmp_path_factory.mktemp("model") / "model.gguf")


def prompts() -> list[list[int]]:
    lengths = [1 + seed % 23 for seed in range(SEEDS)]
    return [[1, *np.random.default_rng(i).integers(3, 300, n).tolist()] for i, n in enumerate(lengths)]


def sampling(seed: int) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed)


def together(llm: llorch.LLM) -> list[list[int]]:
    engine, ended = llm.engine(max_queue=SEEDS), {}
    for i, prompt in enumerate(prompts()):
        request = Request(job_id=str(i), prompt=tuple(prompt), max_tokens=TOKENS, ignore_eos=True, sampling=sampling(i))
        engine.submit(request, lambda event, i=i: ended.update({i: event}))
    while engine.step():
        pass
    assert engine.stats().shared_steps >= TOKENS
    assert all(isinstance(event, Ended) for event in ended.values())
    return [list(ended[i].tokens) for i in range(SEEDS)]


def test_tokens_alone_in_a_batch_and_at_any_chunking_are_the_same(model: Path) -> None:
    with llorch.load(model, provider="numba-cpu", parallel=1) as llm:
        alone = [llm.generate_ids(p, max_tokens=TOKENS, temperature=1.0, seed=i) for i, p in enumerate(prompts())]
    assert len({tuple(tokens) for tokens in alone}) > SEEDS // 2, "the streams are too alike to prove anything"
    for chunk in (512, 5):
        with llorch.load(model, provider="numba-cpu", parallel=TOGETHER, chunk=chunk) as llm:
            assert together(llm) == alone


def test_logits_are_the_same_to_the_bit(model: Path) -> None:
    tokens = prompts()[22]
    with llorch.load(model, provider="numba-cpu", parallel=1) as llm:
        whole = llm.logits(tokens)
        with llm._bound.turn, llm._bound.sequence(len(tokens)) as blocks:
            each = [llm.runner.logits([Chunk([t], i, blocks)])[0].copy() for i, t in enumerate(tokens)]
        other = llm.logits([*tokens[:-1], tokens[-1] ^ 1])
    np.testing.assert_array_equal(whole, np.array(each))
    assert not np.array_equal(whole[-1], other[-1])
