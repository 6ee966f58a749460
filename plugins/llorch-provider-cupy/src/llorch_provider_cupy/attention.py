"""Attention over the paged cache: which kernels of kernels/attention.cu a step runs, and how its context is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llorch.providers import AttentionSpec, Batch, Kernel
from llorch_provider_cupy import programs
from llorch_provider_cupy.device import CudaDevice
from llorch_provider_cupy.launches import Work, blocks, f32, i32
from llorch_provider_cupy.memory import LayerCache, Tensor, padded_dim
from llorch_provider_cupy.programs import ATTEND_HEADS

THREADS, WARPS = 128, 4  # as kernels/attention.cu has them
LARGEST_HEAD = 256
BLOCKS_PER_MULTIPROCESSOR = 4  # blocks of decode attention that keep one busy
SHORTEST_SPLIT, MOST_SPLITS = 64, 64
PROMPT_ROWS, LARGEST_PROMPT_HEAD = 64, 128  # as kernels/prompt.cu has them: more dimensions need too many registers


def attention(device: CudaDevice, spec: AttentionSpec) -> Kernel | None:
    """Declined where a head has more than LARGEST_HEAD dimensions: its tile would not fit shared memory."""
    return None if spec.head_dim > LARGEST_HEAD else Attention(device, spec)


class Attention:
    """No `steps`: which kernels run depends on the batch. What was worked out for one is kept."""

    def __init__(self, device: CudaDevice, spec: AttentionSpec) -> None:
        self._device, self._spec = device, spec
        self._per_key = spec.heads // spec.kv_heads
        self._heads_here = next((n for n in ATTEND_HEADS if n >= self._per_key), ATTEND_HEADS[-1])
        self._limit = spec.max_blocks * spec.block_size
        self._kept: dict[tuple[Any, ...], list[Work]] = {}
        floats = max(self._partial_floats(tokens) for tokens in range(1, spec.max_sequences + 1))
        device.reserve("attention", 4 * floats * spec.head_dim)
        device.reserve("softmax", 8 * floats)

    def _partial_floats(self, tokens: int) -> int:
        splits, _ = self.splits(tokens, self._limit)
        return tokens * self._spec.heads * splits

    def splits(self, tokens: int, context: int) -> tuple[int, int]:
        """(splits, tokens of a split) for a context of at most so many tokens: enough blocks for the whole card."""
        spec = self._spec
        wanted = BLOCKS_PER_MULTIPROCESSOR * self._device.properties.multiprocessors
        groups = tokens * spec.kv_heads * blocks(self._per_key, self._heads_here)
        most = min(blocks(wanted, groups), blocks(context, SHORTEST_SPLIT), MOST_SPLITS)
        length = blocks(blocks(context, most), 32) * 32
        return blocks(context, length), length

    def __call__(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, batch: Batch) -> None:
        tokens = out.shape[0]
        one_each = batch.max_query == 1
        # by powers of two, as core bounds it in captured steps: a captured step rounds as a plain one
        context = min(1 << (batch.max_context - 1).bit_length(), self._limit) if one_each else 0
        key = (out.address, q.address, k.address, v.address, cache.keys.address, tokens, context)
        if key not in self._kept:
            make: Callable[..., list[Work]] = self._decode if one_each else self._rows
            self._kept[key] = make(out, q, k, v, cache, batch, context)
        for work in self._kept[key]:
            work()

    @property
    def _on_tensor_cores(self) -> bool:
        """Where it is asked for, and the card, the cache and the heads allow it."""
        capable = self._device.properties.compute_capability >= (8, 0)
        fits = self._spec.cache_dtype == "f16" and self._spec.head_dim <= LARGEST_PROMPT_HEAD
        return self._device.prompts_on_tensor_cores and capable and fits

    def _function(self, name: str) -> Any:
        program = programs.attention(self._spec.head_dim, self._spec.cache_dtype)
        return self._device.function(program, name, THREADS)

    def _numbers(self) -> tuple[Any, ...]:
        spec = self._spec
        return i32(spec.window or 0), f32(spec.scale), f32(spec.soft_cap or 0.0)

    def _decode(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, batch: Batch, context: int
    ) -> list[Work]:
        spec, tokens, device = self._spec, out.shape[0], self._device
        splits, length = self.splits(tokens, context)
        groups = blocks(self._per_key, self._heads_here)
        partial, softmax = device.scratch("attention").address, device.scratch("softmax").address
        inputs = (batch.slots, batch.positions, batch.sequence_ids, batch.block_tables)
        pointers = [_address(t) for t in (q, k, v)] + [cache.keys.address, cache.values.address]
        works = [
            self._function(f"attend_{self._heads_here}").work(
                (splits, spec.kv_heads * groups, tokens),
                *(out.address, partial, softmax, *pointers, *map(_address, inputs)),
                *map(i32, (spec.heads, spec.kv_heads, spec.block_size, spec.max_blocks, length)),
                *self._numbers(),
            )
        ]
        if splits > 1:
            combine = self._function("combine")
            numbers = i32(spec.heads), i32(splits)
            works.append(combine.work((spec.heads, tokens), out.address, partial, softmax, *numbers))
        return works

    def _rows(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, batch: Batch, _context: int
    ) -> list[Work]:
        spec, tokens = self._spec, out.shape[0]
        kept = cache.keys.address, cache.values.address
        append = self._function("append").work(
            (spec.kv_heads, tokens),
            *(*kept, k.address, v.address, _address(batch.slots), i32(spec.kv_heads), i32(spec.block_size)),
        )
        rows, function = WARPS * (2 if padded_dim(spec.head_dim) > 128 else 4), self._function("attend_rows")
        if self._on_tensor_cores:
            rows = PROMPT_ROWS
            function = self._device.function(programs.prompt(spec.head_dim), "attend_prompt", THREADS)
        inputs = (batch.positions, batch.sequence_ids, batch.block_tables)
        attend = function.work(
            (blocks(tokens, rows), spec.heads),
            *(out.address, q.address, *kept, *map(_address, inputs)),
            *map(i32, (tokens, spec.heads, spec.kv_heads, spec.block_size, spec.max_blocks)),
            *self._numbers(),
        )
        return [append, attend]


def _address(tensor: Any) -> int:
    """The batch's tensors are typed as opaque; they are this device's."""
    found: int = tensor.address
    return found
