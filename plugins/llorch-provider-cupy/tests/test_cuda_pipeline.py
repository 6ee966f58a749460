"""One model over two emulated cards: what it computes, what is copied, what does not fit one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulator.provider import EmulatedProvider, PairProvider
from emulator.runtime import NO_COMPILER, HostRuntime, compiler
from llorch_provider_cupy.pipeline import Pipeline, split
from llorch_provider_cupy.provider import card_names, together

import llorch
from llorch.core.config import ModelConfig
from llorch.core.loader import expected_weights
from llorch.core.model_files import open_model
from llorch.core.runner import Chunk
from llorch.errors import DeviceMemoryError
from llorch.providers import AddSpec, EmbedSpec, HostWeight, registry
from llorch.providers.conformance.models import TinyModel, write_model
from llorch.providers.conformance.rig import Rig

PROMPT = [1, 50, 100, 200, 7]
pytestmark = pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(TinyModel(type="Q4_0", layers=4, seed=25), tmp_path_factory.mktemp("models") / "model.gguf")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, path: Path) -> Callable[..., llorch.LLM]:
    def load(device: str = "emulated:0,1", total: int = 1 << 30, **settings: Any) -> llorch.LLM:
        monkeypatch.setattr(registry, "choose", lambda _name: (EmulatedProvider(total), "the emulated cards"))
        return llorch.load(path, device=device, **settings)

    return load


def steps(llm: llorch.LLM) -> np.ndarray:
    """Logits of a prompt in two chunks, then of decode steps: plain, captured, and replayed in turn."""
    runner = llm.runner
    found = [runner.logits([Chunk(PROMPT[:3], 0, [1])]).copy(), runner.logits([Chunk(PROMPT[3:], 3, [1])]).copy()]
    for at, token in enumerate([9, 8, 7, 6], start=len(PROMPT)):
        found.append(runner.logits([Chunk([token], at, [1])]).copy())
    return np.concatenate(found)


@pytest.mark.parametrize("device", ["emulated:0,1", "emulated:0,0", "emulated:0,emulated:1,0,1"])
def test_several_cards_compute_what_one_does(load: Any, device: str) -> None:
    with load("emulated:0") as one, load(device) as several:
        np.testing.assert_array_equal(steps(several), steps(one))
        assert several.device_info.name == together([card.info for card in several._bound.device.cards]).name


@pytest.mark.parametrize("broken", ["plain", "replayed"])
def test_a_copy_that_is_left_out_is_seen(load: Any, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin."""
    with load("emulated:0") as one, load() as several:
        expected = steps(one)
        copy = HostRuntime.transfer
        sent = []

        def transfer(self: HostRuntime, *args: Any) -> None:
            sent.append(args)
            if broken == "plain" or len(sent) <= 8:  # two a step: prompt, prompt, plain decode, replays
                copy(self, *args)

        monkeypatch.setattr(HostRuntime, "transfer", (lambda *_: None) if broken == "plain" else transfer)
        assert not np.array_equal(steps(several), expected, equal_nan=False)


def test_only_the_residual_stream_is_copied(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = HostRuntime.transfer

    def transfer(self: HostRuntime, other: HostRuntime, target: int, source: int, nbytes: int) -> None:
        copied.append(nbytes)
        copy(self, other, target, source, nbytes)

    monkeypatch.setattr(HostRuntime, "transfer", transfer)
    with load() as llm:
        steps(llm)
        assert llm.runner._captured
        one = 4 * llm.config.dim
        # the stream and what the last layer adds to it, for each step's tokens
        assert copied == [n * one for n in (3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1)]


def test_neighbours_are_joined_on_their_card(load: Any) -> None:
    with load() as llm:
        llm.runner.logits([Chunk([5], 0, [1])])
        for card in llm.device.cards:
            card.runtime.launched.clear()
        llm.runner.logits([Chunk([6], 1, [1])])
        counts = [sum(name.startswith("round_rows") for name in card.runtime.launched) for card in llm.device.cards]
        assert counts == [2, 2]  # before ffn_down, two layers a card


def test_a_model_larger_than_one_card_runs_on_two(load: Any, path: Path) -> None:
    with load("emulated:0", parallel=1, context=64, chunk=8) as llm:
        need = HostRuntime().total - llm._bound.device.memory().free
        expected = llm.generate_ids(PROMPT, max_tokens=6)
    total = need * 3 // 4
    with pytest.raises(DeviceMemoryError, match=r"are free|are left for it"):
        load("emulated:0", total, parallel=1, context=64, chunk=8)
    with load("emulated:0,1", total, parallel=1, context=64, chunk=8) as llm:
        assert llm.generate_ids(PROMPT, max_tokens=6) == expected
        assert "emulated:0: 2 of 4 layers" in "".join(llm.start_lines)
        assert all(0 < card.memory().free < total for card in llm._bound.device.cards)


def test_a_share_that_does_not_fit_its_card_is_refused(path: Path) -> None:
    with closing(EmulatedProvider(1 << 18).open("emulated:0,1")) as device, open_model(path) as file:
        weights = expected_weights(file, ModelConfig.from_gguf(file), device)
        with pytest.raises(DeviceMemoryError, match=r"the weights take .* MiB on an emulated card"):
            device.expect(weights)


def test_a_model_that_the_cards_together_cannot_hold_is_refused_before_it_is_loaded(load: Any) -> None:
    with pytest.raises(DeviceMemoryError, match=r"emulated:0,1 \(weights .* are free: no context fits"):
        load("emulated:0,1", 1 << 18)


def test_more_cards_than_layers_are_refused(load: Any) -> None:
    with pytest.raises(DeviceMemoryError, match="4 layers cannot be split over 5 cards"):
        load("emulated:0,0,0,0,0")


def test_a_run_that_comes_back_to_a_card_is_not_captured() -> None:
    pipeline = PairProvider().open()
    assert isinstance(pipeline, Pipeline)
    x = pipeline.empty((1, 4), "float32")

    def run(cards: list[int]) -> Callable[[], None]:
        return lambda: [pipeline.run(card, lambda: None, [x], [x]) for card in cards] and None

    assert pipeline.capture(run([0, 1, 0])) is None
    assert pipeline.capture(run([0, 0, 1, 1])) is not None
    pipeline.close()


def test_a_replay_finds_what_another_card_wrote_since_it_was_recorded() -> None:
    pipeline = PairProvider().open()
    assert isinstance(pipeline, Pipeline)
    rig = Rig(PairProvider(), pipeline)
    add = rig.bind("add", AddSpec(max_tokens=1, dim=4))  # of no layer: on the last card
    embed = rig.bind("embed", EmbedSpec(max_tokens=1, rows=2, cols=4, type="F32"))  # on the first
    table = np.arange(8, dtype=np.float32).reshape(2, 4)
    host = HostWeight("w", (2, 4), "F32", table.reshape(-1).view(np.uint8), frozenset({"embed"}))
    weight, x, y = pipeline.weight(host), rig.tensor(np.ones((1, 4), np.float32)), pipeline.empty((1, 4), "float32")
    replay = pipeline.capture(lambda: add(y, x, x))
    assert replay is not None
    for token in (1, 0):
        embed(x, rig.tensor(np.array([token], np.int32)), weight)
        replay()
        found = np.empty((1, 4), np.float32)
        pipeline.read(y, found)
        np.testing.assert_array_equal(found[0], 2 * table[token])
    pipeline.close()


@pytest.mark.parametrize(
    ("layers", "before", "after", "room", "expected"),
    [
        ([10] * 8, 0, 0, [1, 1], [0, 0, 0, 0, 1, 1, 1, 1]),
        ([10] * 8, 0, 0, [3, 1], [0] * 6 + [1] * 2),
        ([10] * 8, 60, 0, [1, 1], [0] + [1] * 7),
        ([10] * 2, 900, 0, [1, 1], [0, 1]),
        ([10] * 3, 0, 900, [1, 1, 1], [0, 1, 2]),
        ([5] * 4, 0, 0, [1000, 1, 1], [0, 0, 1, 2]),
    ],
)
def test_layers_are_split_by_room(
    layers: list[int], before: int, after: int, room: list[int], expected: list[int]
) -> None:
    assert split(layers, before, after, room) == expected


def test_names_of_several_cards() -> None:
    assert card_names("cuda:1") == ["cuda:1"]
    assert card_names("cuda:0,1") == card_names("cuda:0,cuda:1") == ["cuda:0", "cuda:1"]
    assert card_names("cpu") == ["cpu"]
