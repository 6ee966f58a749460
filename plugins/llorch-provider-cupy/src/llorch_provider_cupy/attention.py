"""Attention over the paged cache: which kernels of kernels/attention.cu a step runs, and how its context is split."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from llorch.providers import AttentionSpec, Batch, Kernel
from llorch_provider_cupy import programs
from llorch_provider_cupy.device import CudaDevice
from llorch_provider_cupy.formats import UNIT
from llorch_provider_cupy.joining import Joinable
from llorch_provider_cupy.launches import Prepared, Work, blocks, f32, i32
from llorch_provider_cupy.memory import LayerCache, Tensor, padded_dim
from llorch_provider_cupy.products import MOST_TOKENS, round_rows, rounded_twin
from llorch_provider_cupy.programs import ATTEND_HEADS

THREADS, WARPS = 128, 4  # as kernels/attention.cu has them
LARGEST_HEAD = 256
BLOCKS_PER_MULTIPROCESSOR = 4  # blocks of decode attention that keep one busy
SHORTEST_SPLIT, MOST_SPLITS = 64, 64
NOT_ROTATED = 0, i32(0), i32(0), f32(0)
PROMPT_ROWS, LARGEST_PROMPT_HEAD = 64, 128  # as kernels/prompt.cu has them: more dimensions need too many registers


def attention(device: CudaDevice, spec: AttentionSpec) -> Kernel | None:
    """Declined where a head has more than LARGEST_HEAD dimensions: its tile would not fit shared memory."""
    return None if spec.head_dim > LARGEST_HEAD else Attention(device, spec)


class Attention(Joinable):
    """No `steps`: which kernels run depends on the batch. What was worked out for one is kept."""

    _turns: Prepared | None = None  # the rotation that it does, or runs first
    _rounds = False  # its result, for the product behind it

    def __init__(self, device: CudaDevice, spec: AttentionSpec) -> None:
        self._device, self._spec = device, spec
        self._per_key = spec.heads // spec.kv_heads
        self._heads_here = next((n for n in ATTEND_HEADS if n >= self._per_key), ATTEND_HEADS[-1])
        self._limit = spec.max_blocks * spec.block_size
        self._kept: dict[tuple[Any, ...], list[Work]] = {}
        floats = max(self._partial_floats(tokens) for tokens in range(1, spec.max_sequences + 1))
        device.reserve("attention", 4 * floats * spec.head_dim)
        device.reserve("softmax", 8 * floats)

    # ---- with its neighbours' work ----

    def gives(self, out: Tensor, *_args: Any) -> Tensor | None:
        """Where units of columns lie within a head."""
        fits = out.shape[0] <= MOST_TOKENS and self._spec.head_dim % UNIT == 0
        return out if fits else None

    def changed(self, *, rounds: bool) -> Attention:  # type: ignore[override]
        return self._variant(_rounds=rounds)

    def after(
        self, rope: Joinable, _out: Tensor, q: Tensor, k: Tensor, _v: Tensor, _cache: LayerCache, batch: Batch
    ) -> Attention | None:
        if not isinstance(rope, Prepared):
            return None
        *rotated, positions = rope.args  # those of this step, where the batch has those of the largest
        same = rotated == [q, k] and positions.address == _address(batch.positions)
        return self._variant(_turns=rope) if same else None

    def _variant(self, **changes: Any) -> Attention:
        found = copy.copy(self)
        vars(found).update(changes, _kept={})
        return found

    # ---- what a step runs ----

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
        results = (out.address, *(rounded_twin(device) if self._rounds else (0, 0)))
        rope = None if self._turns is None else self._turns.rope
        works = [
            self._function(f"attend_{self._heads_here}").work(
                (splits, spec.kv_heads * groups, tokens),
                *(*results, partial, softmax, *pointers, *map(_address, inputs)),
                *(NOT_ROTATED if rope is None else device.rotation(rope)),
                *map(i32, (spec.heads, spec.kv_heads, spec.block_size, spec.max_blocks, length)),
                *self._numbers(),
            )
        ]
        if splits > 1:
            combine = self._function("combine")
            works.append(combine.work((spec.heads, tokens), *results, partial, softmax, i32(spec.heads), i32(splits)))
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
        before = () if self._turns is None else self._turns.works
        after = round_rows(self._device, out) if self._rounds else ()
        return [*before, append, attend, *after]


def _address(tensor: Any) -> int:
    """The batch's tensors are typed as opaque; they are this device's."""
    found: int = tensor.address
    return found
