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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pluggy

from llorch.providers.memory_limit import MemoryLimit

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


class Step(NamedTuple):
    """An entry of a plan: `kernel(*args)`; the spec says which of them it writes, and under which labels.

    A kernel may have an attribute `steps(*args) -> Sequence[Step]`: entries that core puts in its place when it builds
    a plan. Decompositions keep their labels that way, and a provider may prebind arguments: a step that carries the
    site's own spec is known by the arguments that core gave, whatever its own are.
    """

    kernel: Kernel
    args: tuple[Any, ...]
    spec: OpSpec


# ---- devices -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostWeight:
    """A tensor as it lies in the model file: raw GGUF blocks over a read-only memory map that outlives the device."""

    name: str
    shape: tuple[int, ...]  # (rows, cols), or (dim,) for a vector; row-major
    type: str  # GGML type name
    data: npt.NDArray[np.uint8]  # the blocks, flat
    uses: frozenset[Use]

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The paged KV cache. Token at offset o of block b has slot b * block_size + o. Core never allots block 0."""

    layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    blocks: int
    dtype: str  # "f32" or "f16"

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values together."""
        width = {"f32": 4, "f16": 2}[self.dtype]
        return 2 * self.layers * self.kv_heads * self.head_dim * self.block_size * self.blocks * width


class KVCache(Protocol):
    @property
    def layers(self) -> Sequence[Any]:
        """One opaque object a layer, which that layer's attention kernel gets as `cache`."""

    def copy(self, src: int, dst: int) -> None:
        """Copies block `src` to block `dst` in every layer."""


class Inputs(Protocol):
    """int32 arrays that the host fills before each step."""

    @property
    def host(self) -> Mapping[str, npt.NDArray[np.int32]]: ...
    @property
    def device(self) -> Mapping[str, Tensor]: ...
    def upload(self) -> None:
        """Sends all of them, in one transfer."""


@dataclass
class Batch:
    """The ragged batch of a step: one object for a model's life, refilled before each step.

    Host ints are exact in a plain run and upper bounds in a captured one; the tensors hold the truth: their first
    `tokens` (`sequences`) rows count. Padding tokens have sequence -1 and slots in block 0; padding sequences an
    empty query.
    """

    positions: Tensor  # [max_tokens] place of each token in its sequence
    slots: Tensor  # [max_tokens] where its key and value go
    sequence_ids: Tensor  # [max_tokens] row in block_tables, -1 for padding
    block_tables: Tensor  # [max_sequences, max_blocks]
    query_starts: Tensor  # [max_sequences + 1] sequence s has tokens query_starts[s] .. query_starts[s + 1] - 1
    context_lengths: Tensor  # [max_sequences] tokens in the cache after this step
    tokens: int = 0
    sequences: int = 0
    max_query: int = 0
    max_context: int = 0


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes of the memory that weights and cache live in."""

    total: int
    free: int


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes that a model will take of a device's memory, as far as the provider decides about them."""

    weights: int  # as the device holds them: repacked, expanded
    cache: int
    scratch: int  # what operations share beside the activations, which core asks for with `empty`


@dataclass(frozen=True)
class DeviceInfo:
    """A device that a provider sees, before it is opened."""

    name: str  # what --device takes: "cpu", "cuda:0"
    description: str
    memory_architecture: str  # "cpu", "cuda", "opencl", ...


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """What a user may set about a device. None: the provider's choice.

    A provider without threads passes over `threads`. The others it gets only where its attribute `options` names
    them (`options = frozenset({"gpu_memory"})`): setting one of another provider is an error.
    """

    threads: int | None = None  # CPU threads
    gpu_memory: MemoryLimit | None = None  # most of the device's memory to take
    prefill_weights: Literal["half"] | None = None  # "half": weights of products lie expanded beside the quantised


class Device(Protocol):
    """An opened device. One thread at a time calls it.

    A device may also have

    - `memory_need(weights: Sequence[HostWeight], cache: CacheSpec, specs: Sequence[OpSpec]) -> MemoryNeed`: what these
      weights (whose data is not there yet), this cache and these call sites will take. It is asked before anything is
      loaded, and may be asked often. Without it core counts weights and cache by their specs.
    - `cache_blocks(spec: CacheSpec) -> int`: how many of the spec.blocks blocks it has room for. It is asked when
      weights, activations and scratch memory are allocated, just before `kv_cache`. Without it, core takes at most
      half of the free memory for a cache whose size the user has not named.
    - `held_bytes(weight) -> int`: the memory that a weight takes, where that is not `weight_bytes`.
    - `fuse(entries)`: called with each finished plan, named tuples (kernel, args, outputs) that will always run one
      right after another, with at most reads between them. Returns as many, with the same outputs, that together do
      the same: where a kernel can do a part of its neighbour's work, such as rounding what it writes, both are
      replaced.
    """

    @property
    def info(self) -> DeviceInfo: ...
    @property
    def weight_types(self) -> Mapping[Use, frozenset[str]]:
        """The GGML types it takes per use; core converts others to F32 (or F16) before `weight`."""

    @property
    def cache_dtypes(self) -> Sequence[str]:
        """Cache types it offers, its default first."""

    @property
    def block_sizes(self) -> Sequence[int]:
        """Tokens a cache block may hold, best first."""

    @property
    def capture_sizes(self) -> Sequence[int]:
        """Token counts that `capture` pays for, ascending; smaller batches are padded up to one. Empty: no capture."""

    def expect(self, weights: Sequence[HostWeight]) -> str:
        """Called once before the first `weight` with all that will come. Returns a line for the load log, or ""."""

    def weight(self, host_weight: HostWeight) -> Any:
        """Takes a weight, once per tensor with the set of all its uses; may repack. Kernels get what it returns."""

    def weight_bytes(self, weight: Any) -> int:
        """Bytes that a product reads of what `weight` returned."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Uninitialised memory; dtype is "float32" or "int32"."""

    def rows(self, tensor: Tensor, n: int) -> Tensor:
        """A view of the first n rows."""

    def kv_cache(self, spec: CacheSpec) -> KVCache: ...
    def inputs(self, shapes: Mapping[str, tuple[int, ...]]) -> Inputs: ...
    def write(self, tensor: Tensor, host: npt.NDArray[Any]) -> None: ...
    def read(self, tensor: Tensor, host: npt.NDArray[Any]) -> None:
        """Copies to the host. The only point that waits for the device."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """Records what `run` does and returns its replay; None: it cannot."""

    def memory(self) -> MemoryInfo: ...
    def close(self) -> None: ...


class Provider(Protocol):
    """What an entry point of group `llorch.providers` yields. Light: it must load without its heavy imports."""

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def requires(self) -> str:
        """What it needs to run, in a few words."""

    @property
    def api_version(self) -> int: ...
    @property
    def priority(self) -> int:
        """What `auto` ranks by, highest first: 0 for the reference, tens for a CPU, hundreds for an accelerator."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's result does not depend on the rows beside it, to the bit."""

    def devices(self) -> Sequence[DeviceInfo]:
        """Raises ProviderUnavailableError with the reason and the next command where there is none."""

    def open(self, device: str | None = None, options: DeviceOptions | None = None) -> Device:
        """Opens a device by name, the best one by default."""

    def operations(self) -> object:
        """The object whose hookimpls are the factories. Called once per opened device."""
