"""A base for providers over a NumPy-like array module: NumPy, CuPy, PyTorch.

An author names the module (`ArrayProvider.module`) and its devices, and gives three primitives where the module differs
from NumPy: `ArrayDevice.empty`, `from_host` and `to_host`. All else has a default that is written with these and with
functions that the three modules share, so a provider is a page long, and each operation can then be replaced by a
faster one. Import from here: `from llorch.providers.array import ArrayDevice, ArrayOps, ArrayProvider`.

Weights are float32 on the device; an author who keeps them quantised overrides `weight_types`, `weight` and the
operations that read them. The cache is float32. Expressions make temporaries, which the module's own allocator reuses.
Attention reads the batch's shape from the host's copy of it, so that it never waits for the device: a device that
captures needs an attention of its own, which reads the tensors.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import gguf
import numpy as np
import numpy.typing as npt

from llorch.providers import (
    AddSpec,
    AttentionSpec,
    Batch,
    CacheSpec,
    DeviceInfo,
    DeviceMemoryError,
    DeviceOptions,
    EmbedSpec,
    GatherSpec,
    HostWeight,
    Kernel,
    MatmulSpec,
    MemoryInfo,
    MemoryNeed,
    OpSpec,
    ProviderUnavailableError,
    RMSNormSpec,
    RopeSpec,
    SwigluSpec,
    hookimpl,
)
from llorch.providers.host_memory import host_memory
from llorch.providers.memory_limit import amount

SLAB_ELEMENTS = 1 << 20  # a weight is dequantised in slabs of rows of at most this many, to bound what is in between
SCORE_ELEMENTS = 1 << 24  # a long prompt's scores are made in slices of at most this many (64 MiB)

DEQUANTIZABLE = frozenset(t.name for t in gguf.quants._type_traits) | {"F32", "F16"}

Array = Any  # an array of the author's module


def dequantize(weight: HostWeight) -> npt.NDArray[np.float32]:
    """The values of a weight in float32, on the host; not a copy where the file holds float32."""
    if weight.type == "F32":
        return weight.data.view(np.float32).reshape(weight.shape)
    kind = gguf.GGMLQuantizationType[weight.type]
    blocks = weight.data.reshape(math.prod(weight.shape[:-1]), -1)
    values = np.empty((len(blocks), weight.shape[-1]), np.float32)
    step = max(1, SLAB_ELEMENTS // weight.shape[-1])
    for start in range(0, len(blocks), step):
        values[start : start + step] = gguf.quants.dequantize(blocks[start : start + step], kind)
    return values.reshape(weight.shape)


# ---- the device ----


@dataclass
class LayerCache:
    """Keys and values of one layer, each [blocks, block_size, kv_heads, head_dim]."""

    keys: Array
    values: Array


class ArrayCache:
    def __init__(self, device: ArrayDevice, spec: CacheSpec) -> None:
        shape = (spec.blocks, spec.block_size, spec.kv_heads, spec.head_dim)
        self.layers = [
            LayerCache(device.empty(shape, "float32"), device.empty(shape, "float32")) for _ in range(spec.layers)
        ]

    def copy(self, src: int, dst: int) -> None:
        for layer in self.layers:
            layer.keys[dst] = layer.keys[src]
            layer.values[dst] = layer.values[src]


class ArrayInputs:
    """Host arrays that lie side by side, as their device tensors do, so that one transfer carries all."""

    def __init__(self, device: ArrayDevice, shapes: Mapping[str, tuple[int, ...]]) -> None:
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()]).tolist()
        places = {name: slice(end - math.prod(shapes[name]), end) for name, end in zip(shapes, ends, strict=True)}
        self._device, self._all_host = device, np.zeros(ends[-1], np.int32)
        self._all = device.from_host(self._all_host)
        self.host = {name: self._all_host[place].reshape(shapes[name]) for name, place in places.items()}
        self.device = {name: self._all[place].reshape(shapes[name]) for name, place in places.items()}

    def upload(self) -> None:
        self._device.write(self._all, self._all_host)
        self._device.uploaded = self


class ArrayDevice:
    """Tensors are arrays of the module `xp`; what an author overrides first are the three primitives."""

    weight_types: Mapping[Any, frozenset[str]] = dict.fromkeys(("embed", "matmul", "vector"), DEQUANTIZABLE)
    cache_dtypes: Sequence[str] = ("f32",)
    block_sizes: Sequence[int] = (32, 16, 64)
    capture_sizes: Sequence[int] = ()

    def __init__(self, xp: Any, info: DeviceInfo, options: DeviceOptions) -> None:
        self.xp, self.info, self.options = xp, info, options
        self.uploaded: ArrayInputs | None = None  # the inputs of the step that runs

    # The primitives, as NumPy has them.

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Uninitialised device memory; dtype is "float32" or "int32"."""
        return self.xp.empty(shape, dtype=getattr(self.xp, dtype))

    def from_host(self, array: npt.NDArray[Any]) -> Array:
        """A device tensor that holds a copy of a host array, of the same shape and dtype."""
        return self.xp.array(array)

    def to_host(self, tensor: Array) -> npt.NDArray[Any]:
        """A device tensor's contents; waits for the device."""
        host: npt.NDArray[Any] = tensor
        return host

    # What follows from them.

    def rows(self, tensor: Array, n: int) -> Array:
        return tensor[:n]

    def write(self, tensor: Array, host: npt.NDArray[Any]) -> None:
        tensor[...] = self.from_host(host)

    def read(self, tensor: Array, host: npt.NDArray[Any]) -> None:
        host[...] = self.to_host(tensor)

    def inputs(self, shapes: Mapping[str, tuple[int, ...]]) -> ArrayInputs:
        return ArrayInputs(self, shapes)

    def on_host(self, tensor: Array) -> npt.NDArray[Any]:
        """A tensor's contents: for an input of the running step the host's own copy, so that nobody waits."""
        if self.uploaded is not None:
            for name, known in self.uploaded.device.items():
                if known is tensor:
                    return self.uploaded.host[name]
        return self.to_host(tensor)

    def expect(self, weights: Sequence[HostWeight]) -> str:
        """Raises DeviceMemoryError where float32 copies of these do not fit. What a subclass's own `weight` takes is
        not known here: `memory_need` was asked about it before.
        """
        need = self._held(weights)
        if not self._inherits_weight:
            return f"weights: {amount(need)} as the device was given them"
        self._require(need, "the weights as float32 need", "choose a smaller model")
        return f"weights: float32 on the device, {amount(need)}"

    def memory_need(self, weights: Sequence[HostWeight], cache: CacheSpec, specs: Sequence[OpSpec]) -> MemoryNeed:
        """Float32 weights; as in the file for a subclass that takes them otherwise and says no more here."""
        scratch = max(map(_temporaries, specs), default=0)
        return MemoryNeed(weights=self._held(weights), cache=cache.nbytes, scratch=scratch)

    @property
    def _inherits_weight(self) -> bool:
        return type(self).weight is ArrayDevice.weight

    def _held(self, weights: Sequence[HostWeight]) -> int:
        """Bytes, as far as this class knows: what a subclass's own `weight` keeps is its affair."""
        return sum(4 * math.prod(w.shape) if self._inherits_weight else w.nbytes for w in weights)

    def weight(self, host_weight: HostWeight) -> Array:
        """Float32 [rows, cols], or [dim]."""
        return self.from_host(dequantize(host_weight))

    def weight_bytes(self, weight: Array) -> int:
        return int(weight.nbytes)

    def kv_cache(self, spec: CacheSpec) -> ArrayCache:
        what = f"a KV cache of {spec.blocks * spec.block_size} tokens needs"
        self._require(spec.nbytes, what, "start with a smaller --context or --parallel")
        return ArrayCache(self, spec)

    def _require(self, need: int, what: str, remedy: str) -> None:
        free = self.memory().free
        if need > free:
            raise DeviceMemoryError(f"{what} {amount(need)}, {amount(free)} are free on {self.info.name}: {remedy}")

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        return None

    def memory(self) -> MemoryInfo:
        return host_memory()

    def close(self) -> None:
        self.uploaded = None


def _temporaries(spec: OpSpec) -> int:
    """Bytes of the expressions of an operation's kernel, about."""
    if isinstance(spec, SwigluSpec):
        return 8 * spec.max_tokens * spec.dim
    if not isinstance(spec, AttentionSpec):
        return 0
    context = spec.max_blocks * spec.block_size
    scores = min(spec.max_tokens * spec.heads * context, max(SCORE_ELEMENTS, spec.heads * context))
    copied = 2 * spec.kv_heads * context * spec.head_dim  # keys and values of one sequence
    return 4 * (2 * scores + copied)


# ---- the operations ----


class ArrayOps:
    """The required operations; the optional ones are left to core. T tokens, H heads of D dimensions, K key heads,
    G = H / K queries to a key head, C tokens of context.
    """

    @hookimpl
    def embed(self, device: ArrayDevice, spec: EmbedSpec) -> Kernel | None:
        def kernel(out: Array, tokens: Array, table: Array) -> None:
            out[...] = table[tokens]

        return kernel

    @hookimpl
    def rmsnorm(self, device: ArrayDevice, spec: RMSNormSpec) -> Kernel | None:
        xp = device.xp

        def kernel(out: Array, x: Array, weight: Array) -> None:
            mean_square = (x * x).mean(axis=-1, keepdims=True)  # [T, 1]
            out[...] = x / xp.sqrt(mean_square + spec.eps) * weight

        return kernel

    @hookimpl
    def matmul(self, device: ArrayDevice, spec: MatmulSpec) -> Kernel | None:
        xp = device.xp

        def kernel(out: Array, x: Array, w: Array, bias: Array | None) -> None:
            if len(x) == 1:  # as a matrix-vector product, which BLAS libraries run at the memory's speed
                xp.matmul(w, x[0], out=out[0])
            else:
                xp.matmul(x, w.T, out=out)
            if bias is not None:
                out += bias

        return kernel

    @hookimpl
    def rope(self, device: ArrayDevice, spec: RopeSpec) -> Kernel | None:
        xp, half = device.xp, len(spec.frequencies)
        frequencies = device.from_host(np.array(spec.frequencies, np.float64))
        table = device.empty((2, spec.max_tokens, 1, half), "float32")  # cosines and sines
        if spec.pairing == "adjacent":
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        else:
            first, second = slice(0, half), slice(half, 2 * half)

        def kernel(x: Array, positions: Array) -> None:
            tokens = len(x)
            heads = x.reshape(tokens, spec.heads, spec.head_dim)
            angles = positions[:, None, None] * frequencies  # in float64: a float32 product is off at position 100k
            cos, sin = table[0, :tokens], table[1, :tokens]  # [T, 1, half]
            cos[...] = xp.cos(angles) * spec.magnitude
            sin[...] = xp.sin(angles) * spec.magnitude
            a, b = heads[..., first], heads[..., second]  # [T, H, half]
            turned = a * cos - b * sin, a * sin + b * cos
            heads[..., first], heads[..., second] = turned

        return kernel

    @hookimpl
    def attention(self, device: ArrayDevice, spec: AttentionSpec) -> Kernel | None:
        places = device.from_host(np.arange(spec.max_blocks * spec.block_size, dtype=np.int32))

        def kernel(out: Array, q: Array, k: Array, v: Array, cache: LayerCache, batch: Batch) -> None:
            slots, positions, tables = _arrays(batch.slots, batch.positions, batch.block_tables)
            _append(cache, k, v, slots[: len(k)])
            starts = device.on_host(batch.query_starts)[: batch.sequences + 1].tolist()
            lengths = device.on_host(batch.context_lengths)[: batch.sequences].tolist()
            for s, (begin, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
                if begin == end:
                    continue
                blocks = tables[s, : -(-length // spec.block_size)]
                keys, values = _context(cache.keys, blocks, length), _context(cache.values, blocks, length)
                step = max(1, SCORE_ELEMENTS // (spec.heads * length))
                for low in range(begin, end, step):
                    here = slice(low, min(low + step, end))
                    query, key = positions[here, None], places[:length]
                    visible = key <= query  # [T, C]
                    if spec.window is not None:
                        visible = visible & (key > query - spec.window)
                    out[here] = _attend(device.xp, spec, q[here], keys, values, visible)
            out[starts[-1] :] = 0  # padding

        return kernel

    @hookimpl
    def swiglu(self, device: ArrayDevice, spec: SwigluSpec) -> Kernel | None:
        xp = device.xp

        def kernel(out: Array, gate: Array, up: Array) -> None:
            small = xp.exp(-xp.abs(gate))  # never overflows; sigmoid(g) is 1 / (1 + e^-g), and e^g / (1 + e^g)
            out[...] = gate * xp.where(gate < 0, small, 1.0) / (1 + small) * up

        return kernel

    @hookimpl
    def add(self, device: ArrayDevice, spec: AddSpec) -> Kernel | None:
        xp = device.xp

        def kernel(out: Array, x: Array, y: Array) -> None:
            xp.add(x, y, out=out)

        return kernel

    @hookimpl
    def gather(self, device: ArrayDevice, spec: GatherSpec) -> Kernel | None:
        def kernel(out: Array, x: Array, rows: Array) -> None:
            out[...] = x[rows]

        return kernel


def _arrays(*tensors: Any) -> tuple[Array, ...]:
    """The batch's tensors are typed as opaque; here they are arrays."""
    return tensors


def _append(cache: LayerCache, k: Array, v: Array, slots: Array) -> None:
    """k, v: [T, K * D]."""
    *_, kv_heads, head_dim = cache.keys.shape
    for kept, new in ((cache.keys, k), (cache.values, v)):
        kept.reshape(-1, kv_heads, head_dim)[slots] = new.reshape(-1, kv_heads, head_dim)


def _context(kept: Array, blocks: Array, length: int) -> Array:
    """One sequence's keys or values [K, C, D]."""
    *_, kv_heads, head_dim = kept.shape
    return kept[blocks].reshape(-1, kv_heads, head_dim)[:length].swapaxes(0, 1)


def _attend(xp: Any, spec: AttentionSpec, q: Array, keys: Array, values: Array, visible: Array) -> Array:
    """softmax(q k^T * scale, where visible) v as [T, H * D]; q [T, H * D], keys and values [K, C, D], visible [T, C].

    Heads that share keys are one product [G * T, D] x [D, C].
    """
    tokens, (kv_heads, context, head_dim), groups = len(q), keys.shape, spec.heads // spec.kv_heads
    queries = xp.moveaxis(q.reshape(tokens, kv_heads, groups, head_dim), 0, 2)  # [K, G, T, D]
    scores = queries.reshape(kv_heads, groups * tokens, head_dim) @ keys.swapaxes(1, 2) * spec.scale
    if spec.soft_cap is not None:
        scores = xp.tanh(scores / spec.soft_cap) * spec.soft_cap
    scores = xp.where(visible, scores.reshape(kv_heads, groups, tokens, context), -math.inf)
    weights = xp.exp(scores - xp.amax(scores, axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = weights.reshape(kv_heads, groups * tokens, context) @ values  # [K, G * T, D]
    return xp.moveaxis(mixed.reshape(kv_heads, groups, tokens, head_dim), 2, 0).reshape(tokens, -1)


# ---- the provider ----


class ArrayProvider:
    """What an entry point names is an object of a subclass; the module is imported when it is first needed."""

    name: str
    summary: str
    requires: str
    api_version: int  # a number that the author writes: the API that the provider was written for
    priority: int
    batch_invariant: bool = False  # most libraries round a product by its shape

    module: ClassVar[str] = "numpy"
    device_type: ClassVar[type[ArrayDevice]] = ArrayDevice
    operations_type: ClassVar[type[ArrayOps]] = ArrayOps

    @cached_property
    def xp(self) -> Any:
        """The module. Raises ProviderUnavailableError where it cannot be imported."""
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            raise ProviderUnavailableError(
                f"{self.module} cannot be imported: {error}. The provider {self.name} needs {self.requires}"
            ) from error

    def devices(self) -> Sequence[DeviceInfo]:
        """The host's processor; a subclass names what its module sees."""
        return [DeviceInfo("cpu", f"{self.module} {self.xp.__version__}", "cpu")]

    def open(self, device: str | None = None, options: DeviceOptions | None = None) -> ArrayDevice:
        """A device by name, the first by default."""
        found = {info.name: info for info in self.devices()}
        if device is not None and device not in found:
            raise ProviderUnavailableError(
                f"provider {self.name} has no device {device!r}; it has {', '.join(found)}: leave out --device"
            )
        info = found[device] if device is not None else next(iter(found.values()))
        return self.device_type(self.xp, info, options or DeviceOptions())

    def operations(self) -> ArrayOps:
        return self.operations_type()
