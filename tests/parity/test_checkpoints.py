"""CHECKPOINTS.md, row by row: llorch against values recorded from llama.cpp, each row with a twin that must fail.

A twin perturbs the product itself (a wrong eps, the other RoPE pairing, a missing scale) and runs the same assertion.
Row 0, the foundation, is tests/server. `--provider` names the providers that are held to the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llorch
from llorch.core import engine as engine_module
from llorch.core import loader
from llorch.core.config import ModelConfig
from llorch.core.models import llama
from llorch.core.plan import Rotation
from llorch.core.runner import Chunk, Runner
from llorch.core.sampling import softmax
from llorch.demo import DEMO_MODEL
from llorch.providers import AttentionSpec, HostWeight, RopeSpec
from llorch.providers.conformance import oracle
from llorch.providers.conformance.rig import EXACT, Rig
from tests.gguf_copy import rewrite
from tests.support import ROOT, shared

ROUNDED_NODE, ROUNDED_LOGITS = 5e-4, 1e-3  # NMSE, of providers that round activations to int8
Change = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module", params=["stories260K", "llorch-demo"])
def recorded_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of float32 weights, and llama.cpp's values for it (made by tests/reference/record.py).

    The first is not ours to ship. The second is the demo model, dequantised: a clone alone proves the table with it.
    """
    if request.param == "stories260K":
        return shared("models", "stories260K.gguf"), shared("reference", "stories260K-checkpoints.npz")
    twin = tmp_path_factory.mktemp("demo") / "llorch-demo-f32.gguf"
    return rewrite(DEMO_MODEL, twin, dequantise=True), ROOT / "tests" / "reference" / "llorch-demo.npz"


@pytest.fixture(scope="module")
def reference(recorded_model: tuple[Path, Path]) -> dict[str, np.ndarray]:
    with np.load(recorded_model[1]) as recorded:
        return dict(recorded)


def layers_of(reference: dict[str, np.ndarray]) -> list[int]:
    """The layers whose nodes were recorded."""
    return sorted(int(name.rsplit("-", 1)[1]) for name in reference if name.startswith("node:attn_norm-"))


Load = Callable[..., llorch.LLM]


@pytest.fixture(scope="module")
def load_model(provider_name: str, rig: Rig, recorded_model: tuple[Path, Path]) -> Load:
    """Loads the model on the provider under test, with a float32 cache where it has one."""
    exact = "f32" if "f32" in rig.device.cache_dtypes else None

    def load(**settings: Any) -> llorch.LLM:
        return llorch.load(recorded_model[0], provider=provider_name, cache_type=exact, **settings)

    return load


@pytest.fixture(scope="module")
def model(load_model: Load) -> Iterator[llorch.LLM]:
    with load_model() as llm:
        yield llm


@contextmanager
def perturbed(load_model: Load, change: Change) -> Iterator[llorch.LLM]:
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
    patch.setattr(llama, "Rotation", lambda _pairing, *rest: Rotation("half", *rest))


def weights_with(change: Callable[[str, np.ndarray], np.ndarray]) -> Change:
    """`change` gets a tensor's name and values and gives others."""
    real = loader._host_weight

    def host_weight(file: Any, name: str, uses: Any) -> HostWeight:
        weight = real(file, name, uses)
        values = change(name, weight.data.view(np.float32).reshape(weight.shape))
        return dataclasses.replace(weight, data=np.ascontiguousarray(values).view(np.uint8).reshape(-1))

    return lambda patch: patch.setattr(loader, "_host_weight", host_weight)


@weights_with
def last_column_dropped(name: str, values: np.ndarray) -> np.ndarray:
    if ".attn_" in name and values.ndim == 2:
        values = values.copy()
        values[:, -1] = 0
    return values


@weights_with
def keys_of_other_heads(name: str, values: np.ndarray) -> np.ndarray:
    """Both models have four KV heads."""
    return values.reshape(4, -1, values.shape[1])[::-1] if name.endswith("attn_k.weight") else values


@weights_with
def up_in_place_of_silu(name: str, values: np.ndarray) -> np.ndarray:
    """A gate of ones: silu(g) * u becomes a multiple of u."""
    return np.ones_like(values) if name.endswith("ffn_gate.weight") else values


def inputs_with(change: Callable[[dict[str, np.ndarray], int, int], None]) -> Change:
    """`change` gets the batch's host arrays and the numbers of tokens and of output rows."""
    real = Runner._fill

    def fill(self: Runner, chunks: Any) -> tuple[int, int]:
        tokens, outputs = real(self, chunks)
        change(self._graph.inputs.host, tokens, outputs)
        self._graph.inputs.upload()
        return tokens, outputs

    return lambda patch: patch.setattr(Runner, "_fill", fill)


@inputs_with
def cache_off_by_one(host: dict[str, np.ndarray], tokens: int, _outputs: int) -> None:
    """What a later chunk writes is shifted."""
    if host["positions"][0] > 0:
        host["slots"][:tokens] += 1


@inputs_with
def last_row_missed(host: dict[str, np.ndarray], _tokens: int, outputs: int) -> None:
    if outputs == 1:
        host["output_rows"][0] = max(0, host["output_rows"][0] - 1)


# ---- the assertions, shared by rows and twins ----


def assert_near(found: np.ndarray, expected: np.ndarray, limit: float, what: str, nmse_limit: float | None) -> None:
    """At most `limit` apart; or, where activations are rounded, an NMSE of at most `nmse_limit`."""
    if nmse_limit is not None:
        value = oracle.nmse(found, expected)
        assert value <= nmse_limit, f"{what}: the difference has an NMSE of {value:.1e}, at most {nmse_limit:.0e}"
    else:
        error = np.abs(found - expected).max()
        assert error <= limit, f"{what}: largest difference {error:.2e}, at most {limit:.0e}"


@pytest.fixture(scope="module")
def rounded(rig: Rig) -> bool:
    return rig.product_limit > EXACT


def assert_nodes(
    llm: llorch.LLM,
    reference: dict[str, np.ndarray],
    row: Row,
    *,
    rounded: bool,
    fused: bool = False,
) -> None:
    tokens = reference["tokens"].tolist()
    layers = layers_of(reference) if "{}" in row.label else [0]
    labels, nodes = [row.label.format(layer) for layer in layers], [row.node.format(layer) for layer in layers]
    found = llm.checkpoints(tokens, labels, fused=fused)
    nmse_limit = (ROUNDED_LOGITS if row.label == "output" else ROUNDED_NODE) if rounded else None
    for label, node in zip(labels, nodes, strict=True):
        recorded = reference[f"node:{node}"] if f"node:{node}" in reference else reference[node]
        expected = recorded.reshape(len(tokens), -1)
        assert found[label].shape == expected.shape, f"{label}: {found[label].shape}, llama.cpp has {expected.shape}"
        assert_near(found[label], expected, row.limit, label, nmse_limit)
        mean = np.abs(found[label] - expected).mean()
        assert rounded or row.mean is None or mean <= row.mean, f"{label}: mean difference {mean:.2e} over {row.mean}"


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    label: str
    node: str
    limit: float  # largest absolute difference
    mean: float | None
    twin: Change


ROWS = [
    Row("1 RMSNorm", "blk.{}.attn_norm", "attn_norm-{}", 1e-5, 1e-6, config_with(rms_eps=1e-1)),
    Row("1 RMSNorm of the feed-forward", "blk.{}.ffn_norm", "ffn_norm-{}", 1e-5, 1e-6, config_with(rms_eps=1e-1)),
    Row("1B RoPE on Q", "blk.{}.q_rope", "Qcur-{}/ROPE", 1e-4, None, other_pairing),
    Row("1B RoPE on K", "blk.{}.k_rope", "Kcur-{}/ROPE", 1e-4, None, other_pairing),
    Row("2 Q projection", "blk.{}.attn_q", "Qcur-{}", 1e-4, None, last_column_dropped),
    Row("2 K projection", "blk.{}.attn_k", "Kcur-{}", 1e-4, None, last_column_dropped),
    Row("2 V projection, untouched by RoPE", "blk.{}.attn_v", "Vcur-{}", 1e-4, None, last_column_dropped),
    Row("5 attention output", "blk.{}.attn_output", "attn_out-{}", 1e-4, None, keys_of_other_heads),
    Row("5 its scale", "blk.{}.attn_output", "attn_out-{}", 1e-4, None, config_with(attention_scale=1.0)),
    Row("6 SwiGLU", "blk.{}.ffn_swiglu", "ffn_swiglu-{}", 1e-4, None, up_in_place_of_silu),
    Row("6 feed-forward output", "blk.{}.ffn_down", "ffn_out-{}", 1e-4, None, up_in_place_of_silu),
    Row("7 whole block", "blk.{}.out", "l_out-{}", 1e-4, None, other_pairing),
    Row("8 logits of every position", "output", "logits", 1e-3, None, config_with(rope_base=500.0)),
]
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@by_row
def test_row_agrees_with_llamacpp(model, reference, rounded, row) -> None:
    assert_nodes(model, reference, row, rounded=rounded)


@by_row
def test_a_perturbed_product_fails_the_row(load_model, reference, rounded, row) -> None:
    with perturbed(load_model, row.twin) as wrong, pytest.raises(AssertionError, match="difference"):
        assert_nodes(wrong, reference, row, rounded=rounded)


def test_rows_hold_for_the_plan_as_served(model, reference, rounded) -> None:
    tokens, checked = reference["tokens"].tolist(), set()
    for row in ROWS:
        try:
            model.checkpoints(tokens, [row.label.format(0)], fused=True)
        except llorch.errors.InvalidRequestError:  # fused away by this provider
            continue
        assert_nodes(model, reference, row, rounded=rounded, fused=True)
        checked.add(row.label)
    assert {"output", "blk.{}.attn_output"} <= checked


# ---- row 1B on the oracle's own Q and K ----


def assert_rope(rig: Rig, model: llorch.LLM, reference: dict[str, np.ndarray], limit: float = 1e-5) -> None:
    positions = np.arange(len(reference["tokens"]), dtype=np.int32)
    rotation = llama.Rotation("adjacent", model.config.rope_frequencies())
    for name, heads in (("Qcur", model.config.n_heads), ("Kcur", model.config.n_kv_heads)):
        spec = RopeSpec(
            max_tokens=64,
            heads=heads,
            head_dim=model.config.head_dim,
            pairing=rotation.pairing,
            frequencies=rotation.frequencies,
        )
        x = rig.tensor(reference[f"node:{name}-0"])
        rig.bind("rope", spec)(x, rig.tensor(positions))
        found = np.empty_like(reference[f"node:{name}-0"])
        rig.device.read(x, found)
        error = np.abs(found - reference[f"node:{name}-0/ROPE"].reshape(found.shape)).max()
        assert error <= limit, f"{name}: largest difference {error:.2e}"


def test_rope_on_llamacpps_own_q_and_k(rig, model, reference) -> None:
    assert_rope(rig, model, reference)


def test_rope_with_the_other_pairing_fails(rig, model, reference, monkeypatch) -> None:
    other_pairing(monkeypatch)
    with pytest.raises(AssertionError, match="largest difference"):
        assert_rope(rig, model, reference)


# ---- row 3: the cache, at any split of the prompt ----


def chunked_logits(llm: llorch.LLM, tokens: list[int], sizes: list[int]) -> np.ndarray:
    """Logits of every position, the prompt given in chunks of these sizes."""
    found, start = [], 0
    bound = llm._bound
    with bound.sequence(len(tokens)) as blocks:
        for size in sizes:
            chunk = Chunk(tokens[start : start + size], start, blocks, outputs=size)
            found.append(llm.runner.logits([chunk]).copy())
            start += size
    return np.concatenate(found)


SPLITS = ([14], [1] * 14, [7, 7], [13, 1], [1, 13], [3, 5, 6])
LONG = ([40], [1] * 40, [33, 7], [32, 8], [31, 9], [20, 20])  # across the border of a cache block


def assert_splits_agree(llm: llorch.LLM, tokens: list[int], splits: tuple[list[int], ...], *, rounded: bool) -> None:
    whole = llm.logits(tokens)
    for sizes in splits:
        found = chunked_logits(llm, tokens, sizes)
        if llm.batch_invariant:
            assert np.array_equal(found, whole), f"chunks {sizes}: the largest difference is not 0"
        assert_near(found, whole, 1e-4, f"chunks {sizes}", ROUNDED_LOGITS if rounded else None)


def test_cache_gives_the_same_logits_at_any_split_of_the_prompt(model, reference, rounded) -> None:
    tokens = reference["tokens"].tolist()
    assert_splits_agree(model, tokens, SPLITS, rounded=rounded)
    found = chunked_logits(model, tokens, [5, 9])
    assert_near(found, reference["logits"], 1e-3, "chunks", ROUNDED_LOGITS if rounded else None)
    assert_splits_agree(model, tokens + reference["greedy"][:26].tolist(), LONG, rounded=rounded)


def test_a_cache_that_is_off_by_one_fails(load_model, reference, rounded) -> None:
    tokens = reference["tokens"].tolist() + reference["greedy"][:26].tolist()
    with perturbed(load_model, cache_off_by_one) as wrong, pytest.raises(AssertionError, match="difference"):
        assert_splits_agree(wrong, tokens, LONG, rounded=rounded)


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
    for layer in layers_of(reference):
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


def assert_last_row(llm: llorch.LLM, tokens: list[int], *, rounded: bool) -> None:
    for prompt in (tokens, tokens[:1]):
        rows = llm.logits(prompt)
        with llm._bound.sequence(len(prompt)) as blocks:  # as generation asks for it: one row, not all
            last = llm.runner.logits([Chunk(prompt, 0, blocks)])[0].copy()
        if llm.batch_invariant:
            assert np.array_equal(last, rows[-1]), "the last row: the largest difference is not 0"
        assert_near(last, rows[-1], 1e-4, "the last row", ROUNDED_LOGITS if rounded else None)
        assert last.argmax() == rows[-1].argmax(), "another most likely token"


def test_last_token_logits_equal_the_last_row(model, reference, rounded) -> None:
    assert_last_row(model, reference["tokens"].tolist(), rounded=rounded)


def test_a_wrong_output_row_fails(load_model, reference, rounded) -> None:
    with perturbed(load_model, last_row_missed) as wrong, pytest.raises(AssertionError, match="last row"):
        assert_last_row(wrong, reference["tokens"].tolist(), rounded=rounded)


# ---- rows 10, 12: greedy text ----


def assert_greedy(llm: llorch.LLM, reference: dict[str, np.ndarray]) -> None:
    expected = reference["greedy"].tolist()
    found = llm.generate_ids(reference["tokens"].tolist(), max_tokens=len(expected))
    assert found == expected, "other greedy tokens"


def test_64_greedy_tokens_equal_llamacpps_over_three_runs(model, reference) -> None:
    for _ in range(3):
        assert_greedy(model, reference)


@pytest.mark.parametrize("chunk", [1, 3, 5, 8, 13, 14])
def test_greedy_tokens_are_the_same_over_every_chunking_of_the_prompt(load_model, reference, chunk) -> None:
    with load_model(chunk=chunk, parallel=1) as llm:
        assert_greedy(llm, reference)


def test_greedy_tokens_of_another_rope_base_fail(load_model, reference) -> None:
    with (
        perturbed(load_model, config_with(rope_base=500.0)) as wrong,
        pytest.raises(AssertionError, match="other greedy"),
    ):
        assert_greedy(wrong, reference)


def test_greedy_tokens_of_the_runner_up_fail(model, reference, monkeypatch) -> None:
    monkeypatch.setattr(engine_module.Sampler, "candidates", None)  # whole rows
    monkeypatch.setattr(engine_module.Sampler, "sample", lambda _self, logits: int(np.argsort(logits)[-2]))
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
