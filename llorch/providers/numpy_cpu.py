"""numpy-cpu: the plain, readable reference. Every operation, every weight type that the gguf package can expand.

Tensors are NumPy arrays; a kernel is what the contract says, written down. Speed is that of NumPy's float32 BLAS.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import threadpoolctl

from llorch.providers import (
    API_VERSION,
    AddSpec,
    AttentionSpec,
    Batch,
    CacheSpec,
    DeviceInfo,
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
    TopkSpec,
    hookimpl,
)
from llorch.providers.host_memory import host_memory
from llorch.providers.memory_limit import amount

Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.int32]

SLAB_ELEMENTS = 1 << 17  # half a megabyte of float32: the passes of one dequantisation stay in the second-level cache
SCORE_ELEMENTS = 1 << 22  # a long prompt's scores are made in slices of at most this many (16 MiB)

_TYPES = frozenset(t.name for t in gguf.quants._type_traits) | {"F32", "F16"}


class NumpyWeight:
    """A weight as blocks over the file's map, or expanded to float32."""

    def __init__(self, host: HostWeight, expand: bool) -> None:
        self.shape = host.shape
        self._type = gguf.GGMLQuantizationType[host.type]
        self._blocks = host.data.reshape(*host.shape[:-1], -1)
        self.dense: Float | None = None
        if host.type == "F32":
            self.dense = host.data.view(np.float32).reshape(host.shape)
        elif len(host.shape) == 1:
            self.dense = self.rows(slice(None))
        elif expand:
            dense = np.empty(host.shape, np.float32)
            for slab in self._slabs():
                dense[slab] = self.rows(slab)
            self.dense = dense

    @property
    def nbytes(self) -> int:
        return int(self._blocks.nbytes if self.dense is None else self.dense.nbytes)

    @property
    def vector(self) -> Float:
        assert self.dense is not None  # vectors are expanded always
        return self.dense

    def rows(self, which: slice | Int) -> Float:
        """Some rows as float32."""
        if self.dense is not None:
            return self.dense[which]
        values: Float = gguf.quants.dequantize(self._blocks[which], self._type)
        return values

    def _slabs(self) -> list[slice]:
        rows, cols = self.shape
        step = max(1, SLAB_ELEMENTS // cols)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def multiply(self, out: Float, x: Float) -> None:
        """out = x @ w.T; a single row takes BLAS's matrix-vector product, which reads the weights at full bandwidth."""
        if self.dense is None:
            for slab in self._slabs():
                out[:, slab] = x @ self.rows(slab).T
        elif len(x) == 1:
            np.dot(self.dense, x[0], out=out[0])
        else:
            np.matmul(x, self.dense.T, out=out)


class LayerCache:
    """Keys and values of one layer: [kv_heads, blocks, block_size, head_dim], so that a head's are side by side."""

    def __init__(self, spec: CacheSpec) -> None:
        shape = (spec.kv_heads, spec.blocks, spec.block_size, spec.head_dim)
        dtype = {"f32": np.float32, "f16": np.float16}[spec.dtype]
        # zeros, not empty: the system hands out zeroed pages on first touch, so unused blocks cost nothing
        self.keys, self.values = np.zeros(shape, dtype), np.zeros(shape, dtype)

    def append(self, k: Float, v: Float, slots: Int) -> None:
        """k, v: [T, kv_heads * head_dim]."""
        heads, _, _, dim = self.keys.shape
        for cache, new in ((self.keys, k), (self.values, v)):
            cache.reshape(heads, -1, dim)[:, slots] = new.reshape(len(slots), heads, dim).swapaxes(0, 1)

    def read(self, cache: npt.NDArray[Any], table: Int, length: int) -> Float:
        """One sequence's keys or values [kv_heads, length, head_dim]; a view where its blocks lie in a row."""
        heads, _, block_size, dim = cache.shape
        blocks = table[: -(-length // block_size)]
        first = int(blocks[0])
        if np.array_equal(blocks, np.arange(first, first + len(blocks))):
            found = cache[:, first : first + len(blocks)]
        else:
            found = cache[:, blocks]
        return found.reshape(heads, -1, dim)[:, :length].astype(np.float32, copy=False)


class NumpyCache:
    def __init__(self, spec: CacheSpec) -> None:
        self.layers = [LayerCache(spec) for _ in range(spec.layers)]

    def copy(self, src: int, dst: int) -> None:
        for layer in self.layers:
            layer.keys[:, dst] = layer.keys[:, src]
            layer.values[:, dst] = layer.values[:, src]


class NumpyInputs:
    """Host memory is device memory: nothing to upload."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.host = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
        self.device = self.host

    def upload(self) -> None:
        return None


class NumpyDevice:
    weight_types: Mapping[Any, frozenset[str]] = {"embed": _TYPES, "matmul": _TYPES, "vector": _TYPES}
    cache_dtypes = ("f32", "f16")
    block_sizes = (32, 16, 64)
    capture_sizes = ()

    def __init__(self, info: DeviceInfo, options: DeviceOptions) -> None:
        self.info = info
        self._expand: bool | None = None
        self._threads = threadpoolctl.threadpool_limits(options.threads) if options.threads else None

    def expect(self, weights: Sequence[HostWeight]) -> str:
        """Expands matrices to float32 once where half of the free memory holds them."""
        need, allowed = _expanded(weights), self.memory().free // 2
        self._expand = need <= allowed
        if not need:
            return "weights: float32 in the file, used in place"
        how = "expanded to float32 once" if self._expand else "dequantised in slabs for each product"
        return f"weights: {how} (float32 takes {amount(need)}, half the free memory is {amount(allowed)})"

    def memory_need(self, weights: Sequence[HostWeight], cache: CacheSpec, specs: Sequence[OpSpec]) -> MemoryNeed:
        expanded = [w for w in weights if len(w.shape) == 1 or ("matmul" in w.uses and w.type != "F32")]
        if _expanded(weights) > self.memory().free // 2:  # the rule of `expect`
            expanded = [w for w in expanded if len(w.shape) == 1]
        kept = sum(w.nbytes for w in weights) - sum(w.nbytes for w in expanded)
        held = kept + sum(4 * math.prod(w.shape) for w in expanded)
        return MemoryNeed(weights=held, cache=cache.nbytes, scratch=max(map(_temporaries, specs), default=0))

    def weight(self, host_weight: HostWeight) -> NumpyWeight:
        if self._expand is None:
            self.expect([host_weight])
        # a table that is only looked up stays as it is: a few rows a step
        expand = bool(self._expand) and "matmul" in host_weight.uses
        return NumpyWeight(host_weight, expand)

    def weight_bytes(self, weight: NumpyWeight) -> int:
        return weight.nbytes

    def empty(self, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        return np.empty(shape, dtype)

    def rows(self, tensor: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
        return tensor[:n]

    def kv_cache(self, spec: CacheSpec) -> NumpyCache:
        spec.require(self.memory().free)
        return NumpyCache(spec)

    def inputs(self, shapes: Mapping[str, tuple[int, ...]]) -> NumpyInputs:
        return NumpyInputs(shapes)

    def write(self, tensor: npt.NDArray[Any], host: npt.NDArray[Any]) -> None:
        tensor[...] = host

    def read(self, tensor: npt.NDArray[Any], host: npt.NDArray[Any]) -> None:
        host[...] = tensor

    def capture(self, run: Callable[[], None]) -> None:
        return None

    def memory(self) -> MemoryInfo:
        return host_memory()

    def close(self) -> None:
        if self._threads is not None:
            self._threads.restore_original_limits()


def _expanded(weights: Sequence[HostWeight]) -> int:
    """Bytes of the matrices of products as float32, but for those that are float32 in the file."""
    return sum(4 * w.shape[0] * w.shape[1] for w in weights if "matmul" in w.uses and w.type != "F32")


def _temporaries(spec: OpSpec) -> int:
    """Bytes of the expressions of an operation's kernel, about."""
    if isinstance(spec, SwigluSpec):
        return 8 * spec.max_tokens * spec.dim
    if not isinstance(spec, AttentionSpec):
        return 4 * SLAB_ELEMENTS
    context = spec.max_blocks * spec.block_size
    scores = min(spec.max_tokens * spec.heads * context, max(SCORE_ELEMENTS, spec.heads * context))
    copied = 2 * spec.kv_heads * context * spec.head_dim  # keys and values of one sequence
    return 4 * (scores + copied)


class NumpyOps:
    """The factories. Shapes: T tokens, H heads of D dimensions, G queries to a key head, C tokens of context."""

    @hookimpl
    def embed(self, spec: EmbedSpec) -> Kernel:
        def kernel(out: Float, tokens: Int, table: NumpyWeight) -> None:
            out[...] = table.rows(tokens)

        return kernel

    @hookimpl
    def rmsnorm(self, spec: RMSNormSpec) -> Kernel:
        def kernel(out: Float, x: Float, weight: NumpyWeight) -> None:
            mean_square = np.einsum("td,td->t", x, x) / np.float32(spec.dim)
            np.multiply(x, (1 / np.sqrt(mean_square + np.float32(spec.eps)))[:, None], out=out)
            np.multiply(out, weight.vector, out=out)

        return kernel

    @hookimpl
    def matmul(self, spec: MatmulSpec) -> Kernel:
        def kernel(out: Float, x: Float, w: NumpyWeight, bias: NumpyWeight | None) -> None:
            w.multiply(out, x)
            if bias is not None:
                np.add(out, bias.vector, out=out)

        return kernel

    @hookimpl
    def rope(self, spec: RopeSpec) -> Kernel:
        frequencies = np.array(spec.frequencies, np.float64)
        half = len(frequencies)
        if spec.pairing == "adjacent":
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        else:
            first, second = slice(0, half), slice(half, 2 * half)

        def kernel(x: Float, positions: Int) -> None:
            heads = x.reshape(len(x), spec.heads, spec.head_dim)
            angles = positions[:, None] * frequencies  # [T, half], in float64: a float32 product is off at 100k
            cos = (np.cos(angles) * spec.magnitude).astype(np.float32)[:, None]
            sin = (np.sin(angles) * spec.magnitude).astype(np.float32)[:, None]
            a, b = heads[..., first], heads[..., second]  # [T, H, half]
            turned = a * cos - b * sin, a * sin + b * cos
            heads[..., first], heads[..., second] = turned

        return kernel

    @hookimpl
    def attention(self, spec: AttentionSpec) -> Kernel:
        def kernel(out: Float, q: Float, k: Float, v: Float, cache: LayerCache, batch: Batch) -> None:
            tokens, sequences = len(out), batch.sequences
            cache.append(k, v, _array(batch.slots)[:tokens])
            starts = _array(batch.query_starts)[: sequences + 1].tolist()
            lengths = _array(batch.context_lengths)[:sequences].tolist()
            for s, length in enumerate(lengths):
                begin, end = starts[s], starts[s + 1]
                if begin == end:
                    continue
                table = _array(batch.block_tables)[s]
                keys, values = cache.read(cache.keys, table, length), cache.read(cache.values, table, length)
                step = max(1, SCORE_ELEMENTS // (spec.heads * length))
                for low in range(begin, end, step):
                    high = min(low + step, end)
                    _attend(spec, out[low:high], q[low:high], keys, values, length - (end - low))
            out[starts[-1] :] = 0  # padding

        return kernel

    @hookimpl
    def swiglu(self, spec: SwigluSpec) -> Kernel:
        def kernel(out: Float, gate: Float, up: Float) -> None:
            with np.errstate(over="ignore"):  # exp(-gate) may be infinite: gate / inf is the right 0
                np.divide(gate, 1 + np.exp(-gate), out=out)
            np.multiply(out, up, out=out)

        return kernel

    @hookimpl
    def add(self, spec: AddSpec) -> Kernel:
        def kernel(out: Float, x: Float, y: Float) -> None:
            np.add(x, y, out=out)

        return kernel

    @hookimpl
    def gather(self, spec: GatherSpec) -> Kernel:
        def kernel(out: Float, x: Float, rows: Int) -> None:
            np.take(x, rows, axis=0, out=out)

        return kernel

    @hookimpl
    def topk(self, spec: TopkSpec) -> Kernel:
        def kernel(values: Float, ids: Int, logits: Float) -> None:
            for row, chosen in zip(logits, ids, strict=True):
                chosen[...] = _largest(row, spec.k)
            values[...] = np.take_along_axis(logits, ids, axis=1)

        return kernel


def _array(tensor: Any) -> Int:
    """The batch's tensors are typed as opaque; this device's are arrays."""
    array: Int = tensor
    return array


def _attend(spec: AttentionSpec, out: Float, q: Float, keys: Float, values: Float, first: int) -> None:
    """softmax(q k^T * scale + causal mask) v, for queries at positions first, first + 1, ... of one sequence.

    out, q: [T, H * D]; keys, values: [kv_heads, C, D]. Heads that share keys are one product [G * T, D] x [D, C].
    """
    tokens, context, groups = len(q), keys.shape[1], spec.heads // spec.kv_heads
    heads = (tokens, spec.kv_heads, groups, spec.head_dim)
    queries = q.reshape(heads).transpose(1, 2, 0, 3).reshape(spec.kv_heads, groups * tokens, spec.head_dim)
    scores = np.matmul(queries, keys.transpose(0, 2, 1))
    scores *= np.float32(spec.scale)
    if spec.soft_cap is not None:
        np.tanh(scores / np.float32(spec.soft_cap), out=scores)
        scores *= np.float32(spec.soft_cap)
    if tokens > 1 or spec.window is not None:
        query, key = first + np.arange(tokens)[:, None], np.arange(context)
        visible = key <= query if spec.window is None else (key <= query) & (key > query - spec.window)
        grouped = scores.reshape(spec.kv_heads, groups, tokens, context)
        np.copyto(grouped, -np.inf, where=~visible)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    mixed = np.matmul(scores, values).reshape(spec.kv_heads, groups, tokens, spec.head_dim)
    out.reshape(heads)[...] = mixed.transpose(2, 0, 1, 3)


def _largest(row: Float, k: int) -> npt.NDArray[np.int64]:
    """Indices of the k largest, largest first, the lower index first among equals."""
    if k == 1:
        return np.array([row.argmax()])
    least = np.partition(row, -k)[-k]
    above = np.flatnonzero(row > least)
    chosen = np.concatenate([above, np.flatnonzero(row == least)[: k - len(above)]])
    order: npt.NDArray[np.int64] = chosen[np.argsort(-row[chosen], kind="stable")]
    return order


class NumpyProvider:
    name = "numpy-cpu"
    summary = "NumPy on the CPU: the reference, slow and everywhere"
    requires = "nothing"
    api_version = API_VERSION
    priority = 0
    batch_invariant = False  # BLAS rounds by the shape of a product

    def devices(self) -> list[DeviceInfo]:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return [DeviceInfo("cpu", f"NumPy {np.__version__} with {blas}, {cores} cores", "cpu")]

    def open(self, device: str | None = None, options: DeviceOptions | None = None) -> NumpyDevice:
        (cpu,) = self.devices()
        if device not in (None, cpu.name):
            raise ProviderUnavailableError(f"numpy-cpu has no device {device!r}, only 'cpu': leave out --device")
        return NumpyDevice(cpu, options or DeviceOptions())

    def operations(self) -> NumpyOps:
        return NumpyOps()


provider = NumpyProvider()
