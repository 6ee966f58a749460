"""Whole tiny models through the whole of core: the text they give, alone, in chunks, together, and guarded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llorch
from llorch.core.requests import Ended, Request, SamplingParams
from llorch.providers import registry
from llorch.providers.conformance.guarded import GuardedProvider, Opaque
from llorch.providers.conformance.models import OracleModel, TinyModel, write_model
from llorch.providers.conformance.oracle import nmse
from llorch.providers.conformance.rig import Rig
from llorch.providers.device import Provider

PROMPT, COUNT = [1, 50, 100, 200, 7], 12
# Seeds whose greedy tokens vary and are decided by a clear margin: rounding may not decide them.
MODELS = {
    "F32": TinyModel(seed=4),
    "F16, three layers, no groups": TinyModel(type="F16", kv_heads=4, layers=3, seed=43),
    "Q8_0": TinyModel(type="Q8_0", seed=24),
    "Q4_0": TinyModel(type="Q4_0", seed=25),
    "Q4_K": TinyModel(type="Q4_K", seed=37),
    "Q5_K": TinyModel(type="Q5_K", seed=8),
    "Q6_K": TinyModel(type="Q6_K", seed=4),
    "Q8_0 with biases": TinyModel(type="Q8_0", biases=True, seed=40),
    "Q4_K, tied": TinyModel(type="Q4_K", tied=True, gain=3.0, seed=42),
    "Q6_K, rope factors and scaling": TinyModel(type="Q6_K", rope_factors=True, rope_scale=2.0, seed=38),
    "F32, a sliding window": TinyModel(window=6, seed=30),
}
by_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


@pytest.fixture
def load(provider_name: str, rig: Rig, tmp_path: Path) -> Callable[..., llorch.LLM]:
    def load(model: TinyModel, **settings: Any) -> llorch.LLM:
        path = tmp_path / "model.gguf"
        if not path.exists():
            write_model(model, path)
        exact = "f32" if "f32" in rig.device.cache_dtypes else None
        return llorch.load(path, provider=provider_name, cache_type=exact, **settings)

    return load


def assert_greedy(llm: llorch.LLM, model: TinyModel) -> None:
    expected, margin = OracleModel(model).greedy(PROMPT, COUNT)
    assert margin > 0.05, "this model proves nothing: rounding may decide its tokens"
    assert len(set(expected)) >= 6, "this model proves nothing: it repeats itself"
    assert llm.generate_ids(PROMPT, max_tokens=COUNT) == expected, "other greedy tokens than the oracle's"


@by_model
def test_greedy_tokens_equal_the_oracles(load: Any, model: TinyModel) -> None:
    with load(model) as llm:
        assert_greedy(llm, model)


@by_model
def test_logits_of_every_position(load: Any, rig: Rig, model: TinyModel) -> None:
    tokens = [1, *np.random.default_rng(1).integers(3, model.vocab, 70).tolist()]
    with load(model) as llm:
        value = nmse(llm.logits(tokens), OracleModel(model).logits(tokens))
    assert value <= (1e-3 if rig.product_limit > 1e-6 else 1e-8), f"NMSE {value:.2e}"


def test_a_model_with_other_weights_fails(load: Any) -> None:
    with load(TinyModel(seed=5)) as llm, pytest.raises(AssertionError, match="other greedy tokens"):
        assert_greedy(llm, TinyModel(seed=4))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_greedy_tokens_at_any_chunking(load: Any, chunk: int) -> None:
    model = MODELS["Q8_0"]
    with load(model, chunk=chunk, parallel=1) as llm:
        assert_greedy(llm, model)


def test_sequences_that_share_steps_give_what_they_give_alone(load: Any) -> None:
    model = MODELS["Q8_0"]
    prompts = [PROMPT, [1, 9], [1, *range(20, 60)], [1, 250, 251, 252]]
    with load(model, parallel=4) as llm:
        alone = [llm.generate_ids(prompt, max_tokens=COUNT) for prompt in prompts]
        engine, ended = llm.engine(), {}
        for i, prompt in enumerate(prompts):
            request = Request(
                job_id=str(i), prompt=tuple(prompt), max_tokens=COUNT, ignore_eos=True,
                sampling=SamplingParams(temperature=0.0),
            )  # fmt: skip
            engine.submit(request, lambda event, i=i: ended.update({i: event}))
        while engine.step():
            pass
        assert engine.stats().shared_steps >= COUNT
    assert alone[0] == OracleModel(model).greedy(PROMPT, COUNT)[0]
    assert all(isinstance(ended[i], Ended) for i in range(4))
    assert [list(ended[i].tokens) for i in range(4)] == alone


def test_nothing_but_read_and_write_touches_device_memory(
    load: Any, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded, model = GuardedProvider(provider), MODELS["Q8_0"]
    monkeypatch.setattr(registry, "choose", lambda _name: (guarded, "guarded by the suite"))
    with load(model) as llm:
        assert_greedy(llm, model)
        (device,) = guarded.opened
        before = device.allocations
        llm.generate_ids(PROMPT, max_tokens=30)
        assert device.allocations == before, "core allocates after warm-up"


def test_a_guarded_tensor_refuses_the_host() -> None:
    tensor = Opaque(np.zeros((2, 3), np.float32))
    assert tensor.shape == (2, 3)
    for touch in (np.asarray, len, lambda t: t[0], lambda t: t + 1, lambda t: t.tobytes(), float):
        with pytest.raises(AssertionError, match="touched from the host"):
            touch(tensor)


def test_two_devices_open_at_once(load: Any, provider_name: str, tmp_path: Path) -> None:
    one, other = MODELS["Q8_0"], MODELS["F32"]
    path = write_model(other, tmp_path / "other.gguf")
    with load(one) as first, llorch.load(path, provider=provider_name) as second:
        streams = [llm.generate_ids(PROMPT, max_tokens=COUNT) for llm in (first, second, first)]
    assert streams[0] == streams[2] == OracleModel(one).greedy(PROMPT, COUNT)[0]
    assert streams[1] == OracleModel(other).greedy(PROMPT, COUNT)[0]


def test_a_device_may_be_used_from_another_thread_than_it_was_opened_on(load: Any) -> None:
    model, found = MODELS["F32"], []
    with load(model) as llm:
        thread = threading.Thread(target=lambda: found.append(llm.generate_ids(PROMPT, max_tokens=COUNT)))
        thread.start()
        thread.join(60)
    assert found == [OracleModel(model).greedy(PROMPT, COUNT)[0]]
