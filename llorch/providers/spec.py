"""The contract between llorch and a compute provider.

A provider offers layer operations (`LayerOps`) on a device (`Device`). Each hook of `LayerOps` is a *factory*: it is
called once per call site when a model is bound, with a frozen spec of all that is static there, and returns the kernel
for that site, or None to decline. Kernels are called millions of times, so they are bare positional functions that

- write into their first argument, allocate no device memory, return nothing and never synchronise;
- get activations as [T, width] float32 tensors, where T <= spec.max_tokens varies from call to call;
- may be given an `out` that aliases an input only in `add`.

T tokens of S sequences travel together (a ragged batch), so prefill, chunked prefill and batched decode are one call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import pluggy

if TYPE_CHECKING:
    from llorch.providers.device import Device

API_VERSION = 1
ACCEPTED_API_VERSIONS = range(1, API_VERSION + 1)  # new optional hooks and new spec fields with defaults don't bump it

hookspec = pluggy.HookspecMarker("llorch")
hookimpl = pluggy.HookimplMarker("llorch")

Kernel: TypeAlias = Callable[..., None]
Use: TypeAlias = Literal["embed", "matmul", "vector"]
Pairing: TypeAlias = Literal["adjacent", "half"]  # RoPE rotates (2i, 2i+1), or (i, i + d/2)


class Tensor(Protocol):
    """Device memory. Opaque to core beyond these two; what a kernel does with it is between it and its device."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


# ---- specs: all that is static at a call site --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """Label and layer say where the site is; they take no part in equality, so a provider can memoise compiled code."""

    max_tokens: int  # the largest T this site will see
    label: str = field(default="", compare=False)
    layer: int | None = field(default=None, compare=False)

    @property
    def outputs(self) -> tuple[tuple[str, int], ...]:
        """(label, index of the argument it names) of all that a kernel of this site writes."""
        return ((self.label, 0),)


@dataclass(frozen=True, kw_only=True)
class EmbedSpec(OpSpec):
    rows: int  # vocabulary
    cols: int
    type: str  # the table's weight type as the device holds it: "F32", "Q4_0", ...


@dataclass(frozen=True, kw_only=True)
class RMSNormSpec(OpSpec):
    dim: int
    eps: float


@dataclass(frozen=True, kw_only=True)
class MatmulSpec(OpSpec):
    rows: int  # width of the output
    cols: int  # width of the input
    type: str
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class RopeSpec(OpSpec):
    """Pair i of a head turns by position * frequencies[i]; the result is multiplied by `magnitude`.

    2 * len(frequencies) may be less than head_dim: the dimensions behind it pass unchanged.
    """

    heads: int
    head_dim: int
    pairing: Pairing
    frequencies: tuple[float, ...]  # scaling and factors included
    magnitude: float = 1.0


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(OpSpec):
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    block_size: int
    max_blocks: int  # width of a block table
    max_sequences: int
    cache_dtype: str  # "f32" or "f16"
    window: int | None = None  # a query at p sees keys p - window + 1 .. p
    soft_cap: float | None = None  # scores become soft_cap * tanh(scores / soft_cap)


@dataclass(frozen=True, kw_only=True)
class SwigluSpec(OpSpec):
    dim: int


@dataclass(frozen=True, kw_only=True)
class AddSpec(OpSpec):
    dim: int


@dataclass(frozen=True, kw_only=True)
class GatherSpec(OpSpec):
    dim: int


@dataclass(frozen=True, kw_only=True)
class AddRMSNormSpec(OpSpec):
    add: AddSpec
    norm: RMSNormSpec

    @property
    def outputs(self) -> tuple[tuple[str, int], ...]:
        return ((self.norm.label, 0), (self.add.label, 1))


@dataclass(frozen=True, kw_only=True)
class MatmulGroupSpec(OpSpec):
    parts: tuple[MatmulSpec, ...]  # products of one x

    @property
    def outputs(self) -> tuple[tuple[str, int], ...]:
        return tuple((part.label, i) for i, part in enumerate(self.parts))


@dataclass(frozen=True, kw_only=True)
class RopePairSpec(OpSpec):
    q: RopeSpec
    k: RopeSpec

    @property
    def outputs(self) -> tuple[tuple[str, int], ...]:
        return ((self.q.label, 0), (self.k.label, 1))


@dataclass(frozen=True, kw_only=True)
class GateUpSwigluSpec(OpSpec):
    gate: MatmulSpec
    up: MatmulSpec


@dataclass(frozen=True, kw_only=True)
class TopkSpec(OpSpec):
    vocab: int
    k: int


# ---- the operations ----------------------------------------------------------------------------------------------


class LayerOps:
    """A provider implements these with `@hookimpl`. Required first; the optional ones core decomposes when declined.

    `LayerOps` names the kernel each factory returns. Widths are in the spec, T is the first dimension of `out`.
    """

    @hookspec(firstresult=True)
    def embed(self, device: Device, spec: EmbedSpec) -> Kernel | None:
        """kernel(out, tokens, table): out[t] = table[tokens[t]]"""

    @hookspec(firstresult=True)
    def rmsnorm(self, device: Device, spec: RMSNormSpec) -> Kernel | None:
        """kernel(out, x, weight): out = x / sqrt(mean(x^2) + eps) * weight"""

    @hookspec(firstresult=True)
    def matmul(self, device: Device, spec: MatmulSpec) -> Kernel | None:
        """kernel(out, x, w, bias): out[T, rows] = x[T, cols] @ w.T + bias; bias is None where spec.bias is False"""

    @hookspec(firstresult=True)
    def rope(self, device: Device, spec: RopeSpec) -> Kernel | None:
        """kernel(x, positions): rotates x[T, heads * head_dim] in place"""

    @hookspec(firstresult=True)
    def attention(self, device: Device, spec: AttentionSpec) -> Kernel | None:
        """kernel(out, q, k, v, cache, batch): writes k, v to batch.slots, then each query attends causally"""

    @hookspec(firstresult=True)
    def swiglu(self, device: Device, spec: SwigluSpec) -> Kernel | None:
        """kernel(out, gate, up): out = gate * sigmoid(gate) * up"""

    @hookspec(firstresult=True)
    def add(self, device: Device, spec: AddSpec) -> Kernel | None:
        """kernel(out, x, y): out = x + y; out may be x"""

    @hookspec(firstresult=True)
    def gather(self, device: Device, spec: GatherSpec) -> Kernel | None:
        """kernel(out, x, rows): out[i] = x[rows[i]]"""

    # Optional: fusions pay on launch-bound and bandwidth-bound devices.

    @hookspec(firstresult=True)
    def add_rmsnorm(self, device: Device, spec: AddRMSNormSpec) -> Kernel | None:
        """kernel(out, x, y, weight): x += y in place, then out = rmsnorm(x) * weight"""

    @hookspec(firstresult=True)
    def matmul_group(self, device: Device, spec: MatmulGroupSpec) -> Kernel | None:
        """kernel(out_1 .. out_n, x, w_1 .. w_n, bias_1 .. bias_n): the matmuls of spec.parts, which share x"""

    @hookspec(firstresult=True)
    def rope_pair(self, device: Device, spec: RopePairSpec) -> Kernel | None:
        """kernel(q, k, positions): rotates both in place"""

    @hookspec(firstresult=True)
    def gate_up_swiglu(self, device: Device, spec: GateUpSwigluSpec) -> Kernel | None:
        """kernel(out, x, w_gate, w_up, bias_gate, bias_up): out = swiglu(matmul(x, w_gate), matmul(x, w_up))"""

    @hookspec(firstresult=True)
    def topk(self, device: Device, spec: TopkSpec) -> Kernel | None:
        """kernel(values, ids, logits): the k largest of each row, largest first, the lower id first among equals

        Where it is declined core reads the whole row; where it is offered only candidates travel to the host.
        """


REQUIRED = ("embed", "rmsnorm", "matmul", "rope", "attention", "swiglu", "add", "gather")
OPTIONAL = ("add_rmsnorm", "matmul_group", "rope_pair", "gate_up_swiglu", "topk")


def operation_of(spec: OpSpec) -> str:
    """The operation whose call sites such a spec describes."""
    kind = type(spec).__name__
    named = (name for name in REQUIRED + OPTIONAL if getattr(LayerOps, name).__annotations__["spec"] == kind)
    return next(named, kind)


class Step(NamedTuple):
    """An entry of a plan: `kernel(*args)`; the spec says which of them it writes, and under which labels.

    A kernel may have an attribute `steps(*args) -> Sequence[Step]`: entries that core puts in its place when it builds
    a plan. Decompositions keep their labels that way, and a provider may prebind arguments: a step that carries the
    site's own spec is known by the arguments that core gave, whatever its own are.
    """

    kernel: Kernel
    args: tuple[Any, ...]
    spec: OpSpec
