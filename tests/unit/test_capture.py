"""Captured steps: pointers and counts are static, host ints are upper bounds, contents come from tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import llorch
from llorch.providers import Batch, registry
from llorch.providers.numpy_cpu import NumpyDevice, NumpyOps, NumpyProvider, hookimpl
from tests.support import shared


class CapturingDevice(NumpyDevice):
    """Records as a GPU does: the replay sees the host ints that were live when it was captured."""

    capture_sizes = (1, 2, 4)
    captured = 0
    replayed = 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        type(self).captured += 1
        frozen = dataclasses.asdict(_only_ints(BATCH[0]))

        def replay() -> None:
            type(self).replayed += 1
            live = dataclasses.asdict(_only_ints(BATCH[0]))
            _set(BATCH[0], frozen)
            run()
            _set(BATCH[0], live)

        return replay


@dataclasses.dataclass
class Ints:
    tokens: int
    sequences: int
    max_query: int
    max_context: int


def _only_ints(batch: Batch) -> Ints:
    return Ints(batch.tokens, batch.sequences, batch.max_query, batch.max_context)


def _set(batch: Batch, ints: dict[str, int]) -> None:
    for name, value in ints.items():
        setattr(batch, name, value)


BATCH: list[Any] = []


class BoundsOps(NumpyOps):
    """Attention that trusts tensors for contents and host ints only as bounds, as a captured kernel must."""

    @hookimpl
    def attention(self, spec: Any) -> Any:
        plain = super().attention(spec)

        def kernel(out: Any, q: Any, k: Any, v: Any, cache: Any, batch: Batch) -> None:
            BATCH[:] = [batch]
            lengths, starts = np.asarray(batch.context_lengths), np.asarray(batch.query_starts)
            assert batch.max_context >= lengths[: batch.sequences].max()
            assert batch.max_query >= np.diff(starts[: batch.sequences + 1]).max()
            plain(out, q, k, v, cache, batch)

        return kernel


class CapturingProvider(NumpyProvider):
    name = "capturing"

    def open(self, device: str | None = None, options: Any = None) -> NumpyDevice:
        opened = super().open(device, options)
        opened.__class__ = CapturingDevice
        return opened

    def operations(self) -> Any:
        return BoundsOps()


@pytest.fixture
def capturing(monkeypatch) -> type[CapturingDevice]:
    monkeypatch.setattr(registry, "choose", lambda _name: (CapturingProvider(), "a test chose it"))
    monkeypatch.setattr(CapturingDevice, "captured", 0)
    monkeypatch.setattr(CapturingDevice, "replayed", 0)
    return CapturingDevice


def test_captured_decoding_gives_the_same_tokens(capturing) -> None:
    with np.load(shared("reference", "stories260K-checkpoints.npz")) as recorded:
        prompt, greedy = recorded["tokens"].tolist(), recorded["greedy"].tolist()
    with llorch.load(shared("models", "stories260K.gguf"), provider="capturing", parallel=4) as llm:
        assert llm.generate_ids(prompt, max_tokens=64) == greedy
        # contexts 15 to 77 lie in the buckets up to 16, 32, 64 and 128, each captured on its first step
        assert capturing.captured == 4
        assert capturing.replayed == 63 - 4
        assert llm.generate_ids(prompt, max_tokens=64) == greedy
        assert capturing.captured == 4


def test_a_batch_between_two_sizes_is_padded_up(capturing) -> None:
    from llorch.core.runner import Chunk

    with llorch.load(shared("models", "stories260K.gguf"), provider="capturing", parallel=4) as llm:
        bound = llm._bound
        with bound.sequence(8) as a, bound.sequence(8) as b, bound.sequence(8) as c:
            alone = []
            for blocks, tokens in ((a, [1, 5, 9]), (b, [1, 7, 3]), (c, [1, 300, 2])):
                llm.runner.logits([Chunk(tokens[:2], 0, blocks, outputs=0)])
                alone.append(llm.runner.logits([Chunk(tokens[2:], 2, blocks)])[0].copy())
            together = [Chunk([9], 2, a), Chunk([3], 2, b), Chunk([2], 2, c)]
            for _ in range(3):  # plain, then replayed
                np.testing.assert_allclose(llm.runner.logits(together), np.stack(alone), atol=1e-4)
    assert capturing.replayed >= 2


def test_a_device_that_cannot_capture_after_all_runs_plainly(capturing, monkeypatch) -> None:
    monkeypatch.setattr(CapturingDevice, "capture", lambda _self, _run: None)
    with llorch.load(shared("models", "stories260K.gguf"), provider="capturing") as llm:
        expected = llm.generate_ids([1, 403, 407], max_tokens=20)
        assert llm.generate_ids([1, 403, 407], max_tokens=20) == expected
