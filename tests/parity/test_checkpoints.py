"""CHECKPOINTS.md, row by row: llorch against values recorded from llama.cpp, each row with a twin that must fail.

A twin perturbs the product itself (a wrong eps, the other RoPE pairing, a missing scale) and runs the same assertion.
Row 0, the foundation, is tests/server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import llorch
from llorch.core import engine as engine_module
from llorch.core.config import ModelConfig
from llorch.core.models import llama
from llorch.core.plan import Rotation
from llorch.core.sampling import softmax
from llorch.providers import AttentionSpec
from llorch.providers.conformance import oracle
from llorch.providers.numpy_cpu import LayerCache, NumpyOps, NumpyWeight, hookimpl
from tests.support import shared

LAYERS = (0, 1, 4)
Change = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(shared("reference", "stories260K-checkpoints.npz")) as recorded:
        return dict(recorded)


def load_model(**settings: Any) -> llorch.LLM:
    return llorch.load(shared("models", "stories260K.gguf"), provider="numpy-cpu", cache_type="f32", **settings)


@pytest.fixture(scope="module")
def model() -> Iterator[llorch.LLM]:
    with load_model() as llm:
        yield llm


@contextmanager
def perturbed(change: Change) -> Iterator[llorch.LLM]:
    """A model whose product computes something else."""
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        with load_model() as llm:
            yield llm


# ---- what a twin changes ----


def config_with(**fields: Any) -> Change:
    real = ModelConfig.from_gguf

    def change(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(ModelConfig, "from_gguf", lambda file: dataclasses.replace(real(file), **fields))

    return change


def other_pairing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(llama, "Rotation", lambda _pairing, frequencies: Rotation("half", frequencies))


def last_column_dropped(patch: pytest.MonkeyPatch) -> None:
    real = NumpyWeight.multiply

    def multiply(self: NumpyWeight, out: np.ndarray, x: np.ndarray) -> None:
        cut = x.copy()
        cut[:, -1] = 0
        real(self, out, cut)

    patch.setattr(NumpyWeight, "multiply", multiply)


def keys_of_other_heads(patch: pytest.MonkeyPatch) -> None:
    real = LayerCache.read

    def read(self: LayerCache, cache: np.ndarray, table: np.ndarray, length: int) -> np.ndarray:
        return real(self, cache, table, length)[::-1]

    patch.setattr(LayerCache, "read", read)


def gate_without_silu(patch: pytest.MonkeyPatch) -> None:
    class Ops(NumpyOps):
        @hookimpl
        def swiglu(self, spec: Any) -> Any:
            return lambda out, gate, up: np.multiply(gate, up, out=out)

    patch.setattr("llorch.providers.numpy_cpu.NumpyOps", Ops)


def cache_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """What a later chunk reads of an earlier one is shifted; within one chunk nothing is."""
    real = LayerCache.append

    def append(self: LayerCache, k: np.ndarray, v: np.ndarray, slots: np.ndarray) -> None:
        real(self, k, v, slots + (slots.min() > self.keys.shape[2]))

    patch.setattr(LayerCache, "append", append)


# ---- the assertions, shared by rows and twins ----


def assert_nodes(
    llm: llorch.LLM, reference: dict[str, np.ndarray], label: str, node: str, limit: float, mean: float | None = None,
    fused: bool = False,
) -> None:  # fmt: skip
    tokens = reference["tokens"].tolist()
    labels = [label.format(layer) for layer in LAYERS] if "{}" in label else [label]
    nodes = [node.format(layer) for layer in LAYERS] if "{}" in node else [node]
    found = llm.checkpoints(tokens, labels, fused=fused)
    for one, name in zip(labels, nodes, strict=True):
        recorded = reference[f"node:{name}"] if f"node:{name}" in reference else reference[name]
        expected = recorded.reshape(len(tokens), -1)
        assert found[one].shape == expected.shape, f"{one}: {found[one].shape}, llama.cpp has {expected.shape}"
        error = np.abs(found[one] - expected)
        assert error.max() <= limit, f"{one}: largest difference {error.max():.2e}, at most {limit:.0e}"
        assert mean is None or error.mean() <= mean, f"{one}: mean difference {error.mean():.2e}, at most {mean:.0e}"


ROWS = [
    # row, label, node, largest difference, mean difference, twin
    ("1 RMSNorm", "blk.{}.attn_norm", "attn_norm-{}", 1e-5, 1e-6, config_with(rms_eps=1e-2)),
    ("1 RMSNorm of the feed-forward", "blk.{}.ffn_norm", "ffn_norm-{}", 1e-5, 1e-6, config_with(rms_eps=1e-2)),
    ("1B RoPE on Q", "blk.{}.q_rope", "Qcur-{}/ROPE", 1e-4, None, other_pairing),
    ("1B RoPE on K", "blk.{}.k_rope", "Kcur-{}/ROPE", 1e-4, None, other_pairing),
    ("2 Q projection", "blk.{}.attn_q", "Qcur-{}", 1e-4, None, last_column_dropped),
    ("2 K projection", "blk.{}.attn_k", "Kcur-{}", 1e-4, None, last_column_dropped),
    ("2 V projection, untouched by RoPE", "blk.{}.attn_v", "Vcur-{}", 1e-4, None, last_column_dropped),
    ("5 attention output", "blk.{}.attn_output", "attn_out-{}", 1e-4, None, keys_of_other_heads),
    ("5 the scale of the scores", "blk.{}.attn_output", "attn_out-{}", 1e-4, None, config_with(attention_scale=1.0)),
    ("6 SwiGLU", "blk.{}.ffn_swiglu", "ffn_swiglu-{}", 1e-4, None, gate_without_silu),
    ("6 feed-forward output", "blk.{}.ffn_down", "ffn_out-{}", 1e-4, None, gate_without_silu),
    ("7 whole block", "blk.{}.out", "l_out-{}", 1e-4, None, other_pairing),
    ("8 logits of every position", "output", "logits", 1e-3, None, config_with(rope_base=5000.0)),
]  # fmt: skip
IDS = [row[0] for row in ROWS]


@pytest.mark.parametrize(("_row", "label", "node", "limit", "mean", "_twin"), ROWS, ids=IDS)
def test_row_agrees_with_llamacpp(model, reference, _row, label, node, limit, mean, _twin) -> None:
    assert_nodes(model, reference, label, node, limit, mean)


@pytest.mark.parametrize(("_row", "label", "node", "limit", "mean", "twin"), ROWS, ids=IDS)
def test_a_perturbed_product_fails_the_row(reference, _row, label, node, limit, mean, twin) -> None:
    with perturbed(twin) as wrong, pytest.raises(AssertionError, match="difference"):
        assert_nodes(wrong, reference, label, node, limit, mean)


def test_rows_hold_for_the_plan_as_served(model, reference) -> None:
    tokens = reference["tokens"].tolist()
    checked = 0
    for _row, label, node, limit, mean, _twin in ROWS:
        try:
            model.checkpoints(tokens, [label.format(0)], fused=True)
        except llorch.errors.InvalidRequestError:  # fused away by this provider
            continue
        assert_nodes(model, reference, label, node, limit, mean, fused=True)
        checked += 1
    assert checked >= 5


# ---- row 1B on the oracle's own Q and K ----


def assert_rope(model: llorch.LLM, reference: dict[str, np.ndarray], limit: float = 1e-5) -> None:
    from llorch.providers import RopeSpec

    positions = np.arange(len(reference["tokens"]), dtype=np.int32)
    rotation = _rotation(model)
    for name, heads in (("Qcur", model.config.n_heads), ("Kcur", model.config.n_kv_heads)):
        spec = RopeSpec(
            max_tokens=64, heads=heads, head_dim=model.config.head_dim, pairing=rotation.pairing,
            frequencies=rotation.frequencies,
        )  # fmt: skip
        x = reference[f"node:{name}-0"].copy()
        NumpyOps().rope(spec)(x, positions)
        error = np.abs(x - reference[f"node:{name}-0/ROPE"].reshape(x.shape)).max()
        assert error <= limit, f"{name}: largest difference {error:.2e}"


def _rotation(model: llorch.LLM) -> Rotation:
    return llama.Rotation("adjacent", model.config.rope_frequencies())


def test_rope_on_llamacpps_own_q_and_k(model, reference) -> None:
    assert_rope(model, reference)


def test_rope_with_the_other_pairing_fails(model, reference, monkeypatch) -> None:
    other_pairing(monkeypatch)
    with pytest.raises(AssertionError, match="largest difference"):
        assert_rope(model, reference)


# ---- row 3: the cache, at any split of the prompt ----


def chunked_logits(llm: llorch.LLM, tokens: list[int], sizes: list[int]) -> np.ndarray:
    """Logits of every position, the prompt given in chunks of these sizes."""
    from llorch.core.runner import Chunk

    found, start = [], 0
    bound = llm._bound
    with bound.sequence(len(tokens)) as blocks:
        for size in sizes:
            chunk = Chunk(tokens[start : start + size], start, blocks, outputs=size)
            found.append(llm.runner.logits([chunk]).copy())
            start += size
    return np.concatenate(found)


SPLITS = {14: ([14], [1] * 14, [7, 7], [13, 1], [1, 13], [3, 5, 6])}
LONG = ([40], [1] * 40, [33, 7], [32, 8], [31, 9], [20, 20])  # across the border of a cache block


def assert_splits_agree(llm: llorch.LLM, tokens: list[int], splits: tuple[list[int], ...]) -> None:
    whole = llm.logits(tokens)
    for sizes in splits:
        error = np.abs(chunked_logits(llm, tokens, sizes) - whole).max()
        assert error <= 1e-4, f"chunks {sizes}: largest difference {error:.2e}"


def test_cache_gives_the_same_logits_at_any_split_of_the_prompt(model, reference) -> None:
    tokens = reference["tokens"].tolist()
    assert_splits_agree(model, tokens, SPLITS[14])
    error = np.abs(chunked_logits(model, tokens, [5, 9]) - reference["logits"]).max()
    assert error <= 1e-3
    assert_splits_agree(model, tokens + reference["greedy"][:26].tolist(), LONG)


def test_a_cache_that_is_off_by_one_fails(reference) -> None:
    with perturbed(cache_off_by_one) as wrong, pytest.raises(AssertionError, match="largest difference"):
        assert_splits_agree(wrong, reference["tokens"].tolist() + reference["greedy"][:26].tolist(), LONG)


# ---- row 4: attention scores, of the oracle that holds the providers ----


def attention_spec(model: llorch.LLM, **changes: Any) -> AttentionSpec:
    c = model.config
    spec = AttentionSpec(
        max_tokens=64, heads=c.n_heads, kv_heads=c.n_kv_heads, head_dim=c.head_dim, scale=c.attention_scale,
        block_size=32, max_blocks=2, max_sequences=1, cache_dtype="f32",
    )  # fmt: skip
    return dataclasses.replace(spec, **changes)


def assert_scores(reference: dict[str, np.ndarray], spec: AttentionSpec) -> None:
    tokens = len(reference["tokens"])
    for layer in LAYERS:
        q = reference[f"node:Qcur-{layer}/ROPE"].reshape(tokens, -1).astype(np.float64)
        k = reference[f"node:Kcur-{layer}/ROPE"].reshape(tokens, -1).astype(np.float64)
        recorded = reference[f"node:kq_soft_max-{layer}"]
        assert np.all(recorded[..., tokens:] == 0)  # llama.cpp pads the context
        error = np.abs(oracle.attention_weights(q, k, 0, spec) - recorded[..., :tokens]).max()
        assert error <= 1e-4, f"layer {layer}: largest difference {error:.2e}"


def test_attention_scores_of_the_oracle_agree_with_llamacpp(model, reference) -> None:
    assert_scores(reference, attention_spec(model))


def test_attention_scores_without_the_scale_fail(model, reference) -> None:
    with pytest.raises(AssertionError, match="largest difference"):
        assert_scores(reference, attention_spec(model, scale=1.0))


# ---- row 9: the last token's logits ----


def assert_last_row(llm: llorch.LLM, tokens: list[int]) -> None:
    for prompt in (tokens, tokens[:1]):
        rows = llm.logits(prompt)
        last = chunked_logits_last(llm, prompt)
        assert np.abs(last - rows[-1]).max() <= 1e-4, "the last row differs"
        assert last.argmax() == rows[-1].argmax(), "another most likely token"


def chunked_logits_last(llm: llorch.LLM, tokens: list[int]) -> np.ndarray:
    """Logits of the last token alone, as generation asks for them."""
    from llorch.core.runner import Chunk

    with llm._bound.sequence(len(tokens)) as blocks:
        return llm.runner.logits([Chunk(tokens, 0, blocks)])[0].copy()


def test_last_token_logits_equal_the_last_row(model, reference) -> None:
    assert_last_row(model, reference["tokens"].tolist())


def test_a_wrong_output_row_fails(model, reference, monkeypatch) -> None:
    class Ops(NumpyOps):
        @hookimpl
        def gather(self, spec: Any) -> Any:
            return lambda out, x, rows: np.take(x, np.maximum(rows - (len(rows) == 1), 0), axis=0, out=out)

    monkeypatch.setattr("llorch.providers.numpy_cpu.NumpyOps", Ops)
    with load_model() as wrong, pytest.raises(AssertionError, match="last row"):
        assert_last_row(wrong, reference["tokens"].tolist())


# ---- rows 10, 12: greedy text ----


def assert_greedy(llm: llorch.LLM, reference: dict[str, np.ndarray]) -> None:
    expected = reference["greedy"].tolist()
    found = llm.generate_ids(reference["tokens"].tolist(), max_tokens=len(expected))
    assert found == expected, "other greedy tokens"


def test_64_greedy_tokens_equal_llamacpps_over_three_runs(model, reference) -> None:
    for _ in range(3):
        assert_greedy(model, reference)


@pytest.mark.parametrize("chunk", [1, 3, 5, 8, 13, 14])
def test_greedy_tokens_are_the_same_over_every_chunking_of_the_prompt(reference, chunk) -> None:
    with load_model(chunk=chunk, parallel=1) as llm:
        assert_greedy(llm, reference)


def test_greedy_tokens_of_another_rope_base_fail(reference) -> None:
    with perturbed(config_with(rope_base=500.0)) as wrong, pytest.raises(AssertionError, match="other greedy"):
        assert_greedy(wrong, reference)


def test_greedy_tokens_of_the_runner_up_fail(model, reference, monkeypatch) -> None:
    real = engine_module.Sampler.sample_candidates
    monkeypatch.setattr(engine_module.Sampler, "candidates", property(lambda _self: 2))
    monkeypatch.setattr(
        engine_module.Sampler, "sample_candidates", lambda self, ids, values: real(self, ids[1:], values[1:])
    )
    with pytest.raises(AssertionError, match="other greedy"):
        assert_greedy(model, reference)


# ---- row 11: softmax ----


def assert_probabilities(logits: np.ndarray, expected_logits: np.ndarray) -> None:
    for row, recorded in zip(logits, expected_logits, strict=True):
        found = softmax(row)
        exact = np.exp(recorded.astype(np.float64) - recorded.max())
        exact /= exact.sum()
        assert abs(float(found.sum()) - 1) <= 1e-6, "the sum is not 1"
        assert found.argsort()[::-1][:5].tolist() == exact.argsort()[::-1][:5].tolist(), "other top five"
        assert np.abs(found - exact).max() <= 1e-6, "probabilities differ"


def test_softmax_of_recorded_logits(reference) -> None:
    assert_probabilities(reference["logits"], reference["logits"])


def test_softmax_of_other_logits_fails(reference) -> None:
    with pytest.raises(AssertionError, match="probabilities differ"):
        assert_probabilities(reference["logits"] / 1.01, reference["logits"])
