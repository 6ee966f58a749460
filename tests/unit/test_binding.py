"""The seam's rules at load: what a provider may get wrong is an error that names it, never a silent fallback."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import llorch
from llorch.core.binder import Binder
from llorch.errors import BindError, DeviceMemoryError, KernelError
from llorch.providers import (
    OPTIONAL,
    REQUIRED,
    AddRMSNormSpec,
    AddSpec,
    GateUpSwigluSpec,
    MatmulGroupSpec,
    MatmulSpec,
    RMSNormSpec,
    RopePairSpec,
    RopeSpec,
    Step,
    TopkSpec,
    hookimpl,
    registry,
)
from llorch.providers.numpy_cpu import NumpyDevice, NumpyOps, NumpyProvider, provider
from llorch.providers.spec import LayerOps
from tests.support import shared


class Ops(NumpyOps):
    """The reference's operations, for a test to break one."""


def bind(operations: object, **settings: Any) -> Binder:
    return Binder(provider.open(), operations, "acme", **settings)


NORM = RMSNormSpec(max_tokens=4, label="blk.0.attn_norm", layer=0, dim=8, eps=1e-5)


class FixedProvider(NumpyProvider):
    """A provider with the operations and the device that a test gives it."""

    name = "acme"

    def __init__(self, operations: object, device: type[NumpyDevice] = NumpyDevice) -> None:
        self._operations, self._device = operations, device

    def open(self, device: str | None = None, options: Any = None) -> NumpyDevice:
        opened = super().open(device, options)
        opened.__class__ = self._device
        return opened

    def operations(self) -> Any:
        return self._operations


@pytest.fixture
def load_with(monkeypatch):
    """Loads stories260K on a provider with these operations."""

    def load(operations: object, device: type[NumpyDevice] = NumpyDevice, **settings: Any) -> llorch.LLM:
        chosen = FixedProvider(operations, device)
        monkeypatch.setattr(registry, "choose", lambda _name: (chosen, "a test chose it"))
        return llorch.load(shared("models", "stories260K.gguf"), provider="acme", **settings)

    return load


# ---- the contract itself ----


def test_every_hook_is_required_or_optional() -> None:
    hooks = {name for name in vars(LayerOps) if not name.startswith("_")}
    assert hooks == set(REQUIRED) | set(OPTIONAL)
    assert not set(REQUIRED) & set(OPTIONAL)


def test_label_and_layer_take_no_part_in_equality() -> None:
    other = RMSNormSpec(max_tokens=4, label="blk.3.ffn_norm", layer=3, dim=8, eps=1e-5)
    assert other == NORM
    assert hash(NORM) == hash(other)
    assert RMSNormSpec(max_tokens=4, dim=8, eps=1e-6) != other


# ---- registering ----


def test_a_misspelt_hook_is_an_error_that_names_it() -> None:
    class Misspelt(Ops):
        @hookimpl
        def rms_norm(self, spec: Any) -> Any:
            return None

    with pytest.raises(BindError, match=r"acme.*rms_norm.*; did you mean rmsnorm\? the operations are embed, rmsnorm"):
        bind(Misspelt())


def test_a_misspelt_argument_is_an_error_that_names_it() -> None:
    class Misspelt(Ops):
        @hookimpl
        def rmsnorm(self, specification: Any) -> Any:
            return None

    with pytest.raises(BindError, match=r"acme.*specification"):
        bind(Misspelt())


def test_an_operation_newer_than_core_is_accepted_as_optional_hook() -> None:
    class Newer(Ops):
        @hookimpl(optionalhook=True)
        def mixture_of_experts(self, spec: Any) -> Any:
            return None

    assert callable(bind(Newer()).bind("rmsnorm", NORM))


@pytest.mark.parametrize("operation", ["rmsnorm", "add_rmsnorm"])
def test_an_operation_without_hookimpl_is_an_error_that_names_it(operation) -> None:
    class Unmarked(Ops):
        pass

    setattr(Unmarked, operation, lambda self, spec: None)
    with pytest.raises(BindError, match=f"acme: {operation} without @hookimpl would never be asked: mark it"):
        bind(Unmarked())


def test_an_inherited_operation_can_be_taken_back() -> None:
    class Less(Ops):
        topk = None

    assert bind(Less()).bind_if_offered("topk", TopkSpec(max_tokens=1, vocab=8, k=1)) is None


# ---- binding ----


def test_a_factory_is_called_once_per_site_and_its_kernel_is_bare() -> None:
    calls = []

    class Counting(Ops):
        @hookimpl
        def rmsnorm(self, device: Any, spec: Any) -> Any:
            calls.append((type(device), spec))
            return super().rmsnorm(spec)

    kernel = bind(Counting()).bind("rmsnorm", NORM)
    assert calls == [(NumpyDevice, NORM)]
    assert type(kernel).__name__ == "function"


def test_declined_required_operations_fail_at_load_and_are_all_listed(load_with) -> None:
    class Forgetful(Ops):
        @hookimpl
        def rmsnorm(self, spec: Any) -> Any:
            return None

        @hookimpl
        def swiglu(self, spec: Any) -> Any:
            super().swiglu(spec)  # no return

    with pytest.raises(BindError) as caught:
        load_with(Forgetful())
    message = str(caught.value)
    assert "declines 16 required operations" in message  # 2 a layer, 5 layers, and output_norm; 5 swiglu
    assert "rmsnorm (11 sites, first blk.0.attn_norm:" in message
    assert "swiglu (5 sites, first blk.0.ffn_swiglu:" in message
    assert message.count("where its factory returned None (a forgotten `return`?)") == 2
    assert "--provider" in message


def test_a_factory_that_raises_is_named_with_its_site() -> None:
    class Broken(Ops):
        @hookimpl
        def rmsnorm(self, spec: Any) -> Any:
            raise ZeroDivisionError("no such dimension")

    with pytest.raises(BindError, match=r"acme: its factory for rmsnorm at blk.0.attn_norm raised ZeroDivisionError"):
        bind(Broken()).bind("rmsnorm", NORM)


def test_a_factory_that_returns_no_kernel_is_named() -> None:
    class Wrong(Ops):
        @hookimpl
        def rmsnorm(self, spec: Any) -> Any:
            return 7

    with pytest.raises(BindError, match=r"rmsnorm at blk\.0\.attn_norm returned int, not a kernel"):
        bind(Wrong()).bind("rmsnorm", NORM)


def test_a_weight_type_that_the_device_does_not_take_is_converted_and_reported(load_with, tmp_path) -> None:
    from tests.support import synthetic

    class HalfOnly(NumpyDevice):
        weight_types = {use: frozenset({"F16", "F32"}) for use in ("embed", "matmul", "vector")}

    path = synthetic(tmp_path, "tiny", "Q8_0")
    with llorch.load(path, provider="numpy-cpu", context=64) as exact:
        expected = exact.logits([1, 300, 301])
    chosen = FixedProvider(Ops(), HalfOnly)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "choose", lambda _name: (chosen, "a test chose it"))
        with llorch.load(path, provider="acme", context=64) as converted:
            assert any("from Q8_0 to F16 (+" in line for line in converted.start_lines)
            found = converted.logits([1, 300, 301])
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_a_device_that_takes_no_plain_type_fails_with_the_tensors_name(load_with) -> None:
    class Strange(NumpyDevice):
        weight_types = {use: frozenset({"Q4_0"}) for use in ("embed", "matmul", "vector")}

    with pytest.raises(BindError, match=r"token_embd.weight is F32, used as embed.*takes Q4_0 for that"):
        load_with(Ops(), Strange)


class Loose(NumpyDevice):
    """Declares what a test says."""

    weight_types: Any = {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed": None}, "has no key 'embed', for the types that it takes as embed; it has 'matmul', 'vector'"),
        ({"matmul": {"F32", "Q4_O"}}, r"has 'Q4_O' under 'matmul', which is no GGML type; did you mean Q4_0\?"),
        ({"vector": "F32"}, "has 'F32' under 'vector', expected a set of GGML type names"),
    ],
)
def test_weight_types_are_checked_when_a_device_is_opened(load_with, monkeypatch, changes, message) -> None:
    plain = {use: {"F32"} for use in ("embed", "matmul", "vector")}  # a set is as good as a frozenset
    monkeypatch.setattr(Loose, "weight_types", plain)
    load_with(Ops(), Loose).close()
    monkeypatch.setattr(Loose, "weight_types", {k: v for k, v in {**plain, **changes}.items() if v is not None})
    with pytest.raises(BindError, match=f"provider acme: weight_types of its device cpu {message}"):
        load_with(Ops(), Loose)


def test_a_tied_embedding_is_uploaded_once_with_both_uses(load_with) -> None:
    seen: list[Any] = []

    class Watching(NumpyDevice):
        def weight(self, host_weight: Any) -> Any:
            seen.append((host_weight.name, host_weight.uses))
            return super().weight(host_weight)

    load_with(Ops(), Watching).close()
    names = [name for name, _ in seen]
    assert len(names) == len(set(names))
    tied = "output.weight" not in names
    assert dict(seen)["token_embd.weight"] == (frozenset({"embed", "matmul"}) if tied else frozenset({"embed"}))


# ---- decompositions ----


def fused_specs() -> dict[str, Any]:
    site = {"max_tokens": 4}
    add, norm = AddSpec(dim=8, label="a", **site), RMSNormSpec(dim=8, eps=1e-5, label="n", **site)
    matmul = [MatmulSpec(rows=6, cols=8, type="F32", label=f"m{i}", **site) for i in range(2)]
    rope = [RopeSpec(heads=2, head_dim=4, pairing="adjacent", frequencies=(1.0, 0.1), label=n, **site) for n in "qk"]
    return {
        "add_rmsnorm": AddRMSNormSpec(add=add, norm=norm, **site),
        "matmul_group": MatmulGroupSpec(parts=tuple(matmul), **site),
        "rope_pair": RopePairSpec(q=rope[0], k=rope[1], **site),
        "gate_up_swiglu": GateUpSwigluSpec(gate=matmul[0], up=matmul[1], label="s", **site),
    }


@pytest.mark.parametrize("operation", sorted(fused_specs()))
def test_a_declined_optional_operation_is_decomposed_and_counted(operation) -> None:
    binder = bind(NumpyOps())
    kernel = binder.bind(operation, fused_specs()[operation])
    assert binder.decomposed == 1
    parts = {"add_rmsnorm": 2, "matmul_group": 2, "rope_pair": 2, "gate_up_swiglu": 3}[operation]
    assert binder.bound == parts
    assert binder.finish() == f"{parts} of {parts} operations bound (0 fused, 1 decomposed)"
    assert hasattr(kernel, "steps")


def test_a_decompositions_declined_part_is_listed() -> None:
    class NoSwiglu(Ops):
        @hookimpl
        def swiglu(self, spec: Any) -> Any:
            return None

    binder = bind(NoSwiglu())
    binder.bind("gate_up_swiglu", fused_specs()["gate_up_swiglu"])
    with pytest.raises(BindError, match="swiglu"):
        binder.finish()


class Fused(Ops):
    """Optional operations of a provider's own, that count their calls."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    @hookimpl
    def add_rmsnorm(self, spec: AddRMSNormSpec) -> Any:
        norm = self.rmsnorm(spec.norm)

        def kernel(out: Any, x: Any, y: Any, weight: Any) -> None:
            self._count("add_rmsnorm")
            x += y
            norm(out, x, weight)

        return kernel

    @hookimpl
    def rope_pair(self, spec: RopePairSpec) -> Any:
        q_rope, k_rope = self.rope(spec.q), self.rope(spec.k)

        def both(q: Any, k: Any, positions: Any) -> None:
            self._count("rope_pair")
            q_rope(q, positions)
            k_rope(k, positions)

        # prebound: one entry without arguments in the kernel's place
        both.steps = lambda *args: [Step(lambda: both(*args), (), spec)]
        return both


def test_a_providers_fused_operations_are_used_and_counted(load_with) -> None:
    tokens = [1, 403, 407, 261]
    with llorch.load(shared("models", "stories260K.gguf"), provider="numpy-cpu") as plain:
        labels = ["blk.1.q_rope", "blk.2.k_rope", "blk.1.out", "blk.2.attn_norm", "output"]
        expected = plain.checkpoints(tokens, labels)
    operations = Fused()
    with load_with(operations) as llm:
        line = next(line for line in llm.start_lines if "operations bound" in line)
        assert "(16 fused, 10 decomposed)" in line  # 9 add_rmsnorm, 5 rope_pair, 2 topk; 5 groups, 5 gates
        served = llm.checkpoints(tokens, labels, fused=True)
        assert operations.calls == {"add_rmsnorm": 9, "rope_pair": 5}
        apart = llm.checkpoints(tokens, labels)
        assert operations.calls == {"add_rmsnorm": 9, "rope_pair": 5}  # not asked when labels are to exist
    for label in labels:
        np.testing.assert_array_equal(served[label], expected[label])
        np.testing.assert_array_equal(apart[label], expected[label])


# ---- a device that joins entries of a plan ----


class Joining(NumpyDevice):
    """The rotation of q and k is left to attention, the entry behind it."""

    def fuse(self, entries: Any) -> list[Any]:
        found = list(entries)
        for rope in [entry for entry in entries if "q_rope" in entry.outputs[0][0]]:
            k_rope, attention = found[found.index(rope) + 1 :][:2]

            def both(*args: Any, before: Any = (rope, k_rope), kernel: Any = attention.kernel) -> None:
                for entry in before:
                    entry.kernel(*entry.args)
                kernel(*args)

            found[found.index(rope) : found.index(attention) + 1] = [attention._replace(kernel=both)]
        return found


def test_a_device_may_leave_out_what_a_neighbour_does(load_with) -> None:
    tokens = [1, 403, 407, 261]
    with llorch.load(shared("models", "stories260K.gguf"), provider="numpy-cpu") as plain:
        expected = plain.checkpoints(tokens, ["blk.0.attention", "output"])
    with load_with(NumpyOps(), Joining) as llm:
        assert [label for label in llm.labels(fused=True) if "rope" in label] == []
        found = llm.checkpoints(tokens, ["blk.0.attention", "output"], fused=True)
        with pytest.raises(llorch.errors.InvalidRequestError, match="q_rope"):
            llm.checkpoints(tokens, ["blk.0.q_rope"], fused=True)
    for label, values in expected.items():
        np.testing.assert_array_equal(found[label], values)


@pytest.mark.parametrize(
    "wrong", [lambda entries: entries[::-1], lambda entries: [*entries, entries[0]]], ids=["another order", "one twice"]
)
def test_joined_entries_keep_their_order(load_with, wrong) -> None:
    class Wrong(NumpyDevice):
        def fuse(self, entries: Any) -> Any:
            return wrong(entries)

    with load_with(NumpyOps(), Wrong) as llm, pytest.raises(BindError, match="another order"):
        llm.logits([1, 403])


# ---- kernels that raise ----


class Raising(Fused):
    """Raises `error` at a site, once it is armed: the load itself runs nothing."""

    def __init__(self, label: str, error: Exception) -> None:
        super().__init__()
        self._label, self._error = label, error

    def _raising(self, spec: Any, kernel: Any) -> Any:
        def wrong(*_args: Any) -> None:
            raise self._error

        return wrong if spec.label == self._label else kernel

    @hookimpl
    def rmsnorm(self, spec: Any) -> Any:
        return self._raising(spec, super().rmsnorm(spec))

    @hookimpl
    def swiglu(self, spec: Any) -> Any:
        return self._raising(spec, super().swiglu(spec))

    @hookimpl
    def add_rmsnorm(self, spec: Any) -> Any:
        return self._raising(spec, super().add_rmsnorm(spec))


@pytest.mark.parametrize(
    ("label", "operation"),
    [
        ("blk.0.attn_norm", "rmsnorm"),
        ("blk.3.ffn_norm", "add_rmsnorm"),  # the provider's own fused kernel
        ("blk.2.ffn_swiglu", "swiglu"),  # a part of what core decomposes
    ],
)
def test_a_kernel_that_raises_is_named_with_its_operation_and_site(load_with, label, operation) -> None:
    error = TypeError("takes 5 positional arguments but 6 were given")
    with load_with(Raising(label, error)) as llm:
        with pytest.raises(KernelError) as caught:
            llm.generate_ids([1, 403, 407], max_tokens=2)
        assert caught.value.__cause__ is error
        assert str(caught.value) == (
            f"provider acme: its kernel for {operation} at {label} raised TypeError: takes 5 positional arguments but "
            "6 were given"
        )


@pytest.mark.parametrize("error", [DeviceMemoryError("full"), MemoryError("full"), BindError("of its own")])
def test_an_error_of_llorchs_own_and_a_lack_of_memory_pass_unchanged(load_with, error) -> None:
    with load_with(Raising("blk.3.ffn_norm", error)) as llm:
        with pytest.raises(type(error)) as caught:
            llm.logits([1, 403, 407])
        assert caught.value is error


def test_the_labels_of_a_model_are_listed_with_their_operations(load_with) -> None:
    with load_with(Ops()) as llm:
        labels = llm.labels()
        assert list(labels)[:4] == ["token_embd", "blk.0.attn_norm", "blk.0.attn_q", "blk.0.attn_k"]
        assert list(labels)[-3:] == ["output_rows", "output_norm", "output"]
        assert labels["blk.1.k_rope"] == "rope"
        assert set(labels.values()) == set(REQUIRED)
        assert llm.checkpoints([1, 2], list(labels)).keys() == labels.keys()
    with load_with(Fused()) as llm:
        assert llm.labels(fused=True)["blk.0.q_rope"] == "rope_pair"
