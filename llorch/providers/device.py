"""The device side of the contract: what an opened device gives, what it is given, and the provider that opens it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from llorch.errors import DeviceMemoryError
from llorch.providers.memory_limit import MemoryLimit, amount
from llorch.providers.spec import Tensor, Use


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

    def require(self, free: int) -> None:
        """Raises DeviceMemoryError where the cache takes more than so many bytes."""
        if self.nbytes > free:
            raise DeviceMemoryError(
                f"a KV cache of {self.blocks * self.block_size} tokens needs {amount(self.nbytes)}, "
                f"{amount(free)} are free: start with a smaller --context or --parallel"
            )


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
      right after another, with at most reads between them. Returns entries that together do the same: where a kernel
      can do a part of its neighbour's work, such as rounding what it writes, both are replaced (`entry._replace`), and
      where it does all of it the neighbour is left out, with its outputs, which nothing may read then. What is
      returned keeps its outputs and its order.
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
    """What an entry point of group `llorch.providers` yields. Light: it must load without its heavy imports.

    A provider may also have

    - `options: frozenset[str]`: which of `DeviceOptions` it takes.
    - `rounds_activations: bool`, False where it is not there: its products take the activations in fewer bits, such as
      int8 or half. It sets what the conformance suite asks of products, in normalised mean squared error (NMSE, the
      squared error over the squared exact values, both summed): at most 1e-10, what float32 gives, or 5e-4 where they
      are rounded; of `gate_up_swiglu` ten times as much; of a whole model's logits at most 1e-8, or 1e-3. Other
      operations, and the greedy tokens of whole models, are held to the same either way.
    """

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
