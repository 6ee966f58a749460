"""A model's graph bound to a device: weights, cache, plans. Token ids in, logits out."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llorch.core.binder import Binder
from llorch.core.cache import BlockAllocator
from llorch.core.cache_room import fitting_cache, wanted_cache
from llorch.core.config import ModelConfig
from llorch.core.loader import LoadedWeights, architecture
from llorch.core.plan import Graph, Limits
from llorch.core.prefix import PrefixIndex
from llorch.core.runner import Chunk, Runner, batch_shapes, make_batch
from llorch.core.sequences import SequenceCache
from llorch.errors import ContextOverflowError, InvalidRequestError
from llorch.providers.device import CacheSpec, Device, Provider

CANDIDATES = (1, 64)  # sizes of the device's own choice of the largest logits: greedy, and common values of top_k


class BoundModel:
    """One thread at a time may use it: whoever calls holds `turn`."""

    def __init__(
        self,
        config: ModelConfig,
        provider: Provider,
        device: Device,
        weights: LoadedWeights,
        limits: Limits,
        cache_type: str | None,
        *,
        cache_tokens: int | None = None,
        prefix_cache: bool = True,
    ) -> None:
        self.config, self.provider, self.device, self.weights, self.limits = config, provider, device, weights, limits
        self.turn = threading.RLock()
        wanted = wanted_cache(config, limits, device, cache_type, provider.name, cache_tokens)
        self._inputs = device.inputs(batch_shapes(limits, -(-limits.max_context // wanted.block_size)))
        self._batch = make_batch(self._inputs)
        self._logits = np.empty((limits.max_outputs, config.vocab_size), np.float32)
        graph, self.counts = self._bind(wanted, fused=True)
        # the cache comes last: a device that bounds its memory gives it what all else has left
        self.cache_spec = fitting_cache(wanted, device, limits, cache_tokens)
        self._cache = device.kv_cache(self.cache_spec)
        index = PrefixIndex(self.cache_spec.block_size) if prefix_cache else None
        self.allocator = BlockAllocator(self.cache_spec.blocks, self.cache_spec.block_size, index)
        self.sequences = SequenceCache(self.allocator, index, self._cache.copy)
        self.runner = self._runner(graph)
        self._unfused: Runner | None = None

    def _bind(self, cache_spec: CacheSpec, *, fused: bool) -> tuple[Graph, str]:
        binder = Binder(self.device, self.provider.operations(), self.provider.name, fused=fused)
        graph = Graph(binder, self.weights.bound, self.limits, cache_spec, self._inputs, self._batch)
        factors = self.config.rope_scaling.factors(self.weights.host, self.limits.max_context)
        architecture(self.config).build(self.config, graph, factors)
        for k in CANDIDATES:
            if k <= self.config.vocab_size:
                graph.candidates(graph.logits, k)
        return graph, binder.finish()

    def _runner(self, graph: Graph) -> Runner:
        graph.cache = self._cache
        return Runner(self.device, graph, self._logits, self.limits, self.cache_spec.block_size)

    def _unfused_runner(self) -> Runner:
        if self._unfused is None:
            self._unfused = self._runner(self._bind(self.cache_spec, fused=False)[0])
        return self._unfused

    @property
    def device_bytes(self) -> int:
        """Bytes of weights and cache on the device."""
        return self.weights.device_bytes + self.cache_spec.nbytes

    @property
    def cache_line(self) -> str:
        """What the KV cache holds, for the log."""
        spec, limits = self.cache_spec, self.limits
        tokens, size = self.allocator.total * spec.block_size, spec.nbytes / 2**20
        return (
            f"KV cache: {tokens} tokens in blocks of {spec.block_size}, {spec.dtype}, {size:.1f} MiB, for up to "
            f"{limits.max_sequences} sequences of up to {limits.max_context} tokens"
        )

    def check_room(self, prompt_tokens: int) -> None:
        """Raises ContextOverflowError where a prompt leaves no room for one more token."""
        context = self.limits.max_context
        if prompt_tokens >= context:
            more = min(2 * prompt_tokens, self.config.context_length)
            hint = f" or start with --context {more}" if more > prompt_tokens else ""
            raise ContextOverflowError(f"prompt is {prompt_tokens} tokens, the context is {context}: shorten it{hint}")

    def sequence(self, tokens: int) -> Blocks:
        """Cache blocks for this many tokens, for the length of a `with`."""
        if not tokens:
            raise InvalidRequestError("the prompt has no tokens: send at least one")
        if tokens > self.limits.max_context:
            raise ContextOverflowError(
                f"{tokens} tokens are more than the context of {self.limits.max_context}: shorten the prompt"
            )
        return Blocks(self.allocator, tokens)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits [T, vocab] of every position."""
        found = np.empty((len(tokens), self.config.vocab_size), np.float32)
        step = min(self.limits.max_tokens, self.limits.max_outputs)
        with self.turn, self.sequence(len(tokens)) as blocks:
            for start in range(0, len(tokens), step):
                part = tokens[start : start + step]
                chunk = Chunk(part, start, blocks, outputs=len(part))
                found[start : start + len(part)] = self.runner.logits([chunk])
        return found

    def labels(self, *, fused: bool) -> dict[str, str]:
        """The labels of `checkpoints` in the order of the plan, each with its operation."""
        with self.turn:
            return (self.runner if fused else self._unfused_runner()).labels()

    def checkpoints(
        self, tokens: Sequence[int], labels: Sequence[str], *, fused: bool
    ) -> dict[str, npt.NDArray[np.float32]]:
        """What the labelled steps of one forward pass write, read right after each (buffers are reused)."""
        most = min(self.limits.max_tokens, self.limits.max_outputs)
        if not 0 < len(tokens) <= most:
            raise InvalidRequestError(f"checkpoints are of one step: {len(tokens)} tokens given, 1 to {most} fit")
        found: dict[str, npt.NDArray[np.float32]] = {}
        runner = self.runner if fused else self._unfused_runner()
        with self.turn, self.sequence(len(tokens)) as blocks:
            entries = runner.entries([Chunk(tokens, 0, blocks, outputs=len(tokens))])
            known = {label for entry in entries for label, _ in entry.outputs}
            if missing := [label for label in labels if label not in known]:
                raise InvalidRequestError(f"the plan has no label {missing[0]!r}; it has: {', '.join(sorted(known))}")
            for entry in entries:
                runner.run([entry])
                for label, tensor in entry.outputs:
                    if label in labels:
                        found[label] = np.empty(tensor.shape, np.float32)
                        self.device.read(tensor, found[label])
        return found

    # ---- measuring ----

    def time_prefill(self, tokens: int) -> float:
        """Seconds to process a prompt of this many tokens, in chunks as served."""
        ids = self._random_tokens(tokens)
        with self.turn, self.sequence(tokens) as blocks:
            start = time.perf_counter()
            for at in range(0, tokens, self.limits.max_tokens):
                part = ids[at : at + self.limits.max_tokens]
                self.runner.logits([Chunk(part, at, blocks, outputs=int(at + len(part) == tokens))])
            return time.perf_counter() - start

    def time_decode(self, tokens: int, context: int = 0) -> float:
        """Seconds to decode this many tokens of one sequence, one at a time, behind `context` others."""
        ids = self._random_tokens(context + tokens)
        with self.turn, self.sequence(context + tokens) as blocks:
            for at in range(0, context, self.limits.max_tokens):
                part = ids[at : min(at + self.limits.max_tokens, context)]
                self.runner.logits([Chunk(part, at, blocks, outputs=0)])
            start = time.perf_counter()
            for at in range(context, context + tokens):
                self.runner.logits([Chunk(ids[at : at + 1], at, blocks)])
            return time.perf_counter() - start

    def _random_tokens(self, count: int) -> list[int]:
        return [int(t) for t in np.random.default_rng(0).integers(0, self.config.vocab_size, count)]


class Blocks:
    """Cache blocks for the length of a `with`."""

    def __init__(self, allocator: BlockAllocator, tokens: int) -> None:
        self._allocator, self._tokens = allocator, tokens

    def __enter__(self) -> list[int]:
        blocks = self._allocator.allocate(self._allocator.blocks_for(self._tokens))
        if blocks is None:
            raise ContextOverflowError(
                f"{self._tokens} tokens need {self._allocator.blocks_for(self._tokens)} cache blocks, "
                f"{self._allocator.free} are free: wait for running requests, or load with more cache_tokens"
            )
        self._blocks = blocks
        return blocks

    def __exit__(self, *_exc: object) -> None:
        self._allocator.release(self._blocks)
