"""What memory a model will take on a device, from its file's header: before anything is loaded.

The graph is built as it will be, over sizes alone. That gives the activations, and the call sites, of which a provider
that has `memory_need` says what scratch memory they share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from llorch.core.binder import Binder
from llorch.core.bound import CANDIDATES
from llorch.core.cache_room import wanted_cache
from llorch.core.config import ModelConfig
from llorch.core.gguf import GGUFFile
from llorch.core.loader import architecture, expected_weights
from llorch.core.plan import BoundWeight, Graph, Limits
from llorch.core.runner import batch_shapes, make_batch
from llorch.errors import DeviceMemoryError
from llorch.providers.device import CacheSpec, Device, HostWeight, MemoryNeed, Provider
from llorch.providers.memory_limit import amount
from llorch.providers.spec import OPTIONAL, REQUIRED, OpSpec, hookimpl


@dataclass(frozen=True)
class Forecast:
    """Bytes. `exact`: the provider says itself what it will hold; else weights and cache are counted as in the file."""

    weights: int
    cache: int
    working: int  # activations, logits, the inputs of a step, scratch memory
    exact: bool

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working


class Forecaster:
    """Forecasts for a file on an opened device, for any limits."""

    def __init__(self, file: GGUFFile, config: ModelConfig, provider: Provider, device: Device) -> None:
        """Raises ModelError or BindError where `load_weights` would, but for what is wrong within the weights."""
        self._config, self._provider, self._device = config, provider, device
        self._weights = expected_weights(file, config, device)

    def forecast(self, limits: Limits, cache_type: str | None = None, cache_tokens: int | None = None) -> Forecast:
        """With a cache of `cache_tokens` tokens, of a context for each sequence where None.

        Raises SettingsError for a cache type that the device has not, or fewer tokens than a context.
        """
        spec = wanted_cache(self._config, limits, self._device, cache_type, self._provider.name, cache_tokens)
        sizes, specs = _Sizes(), list[OpSpec]()
        self._build(limits, spec, sizes, specs)
        ask: Callable[[Sequence[HostWeight], CacheSpec, Sequence[OpSpec]], MemoryNeed] | None
        ask = getattr(self._device, "memory_need", None)
        if ask is None:
            need = MemoryNeed(weights=sum(w.nbytes for w in self._weights), cache=spec.nbytes, scratch=0)
        else:
            need = ask(self._weights, spec, specs)
        return Forecast(need.weights, need.cache, sizes.nbytes + need.scratch, exact=ask is not None)

    def longest_context(self, limits: Limits, cache_type: str | None, room: int) -> int:
        """The longest context, in whole blocks or the model's own, that takes at most `room` bytes; 0 for none."""
        block = self._device.block_sizes[0]

        def fits(context: int) -> bool:
            return self.forecast(with_context(limits, context), cache_type).total <= room

        longest = self._config.context_length
        if fits(longest):
            return longest
        low, high = 0, -(-longest // block)  # in blocks: the first fits, the second does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * block) else (low, middle)
        return low * block

    def check(self, limits: Limits, cache_type: str | None, cache_tokens: int | None = None) -> None:
        """Raises DeviceMemoryError where the weights and the cache that was asked for cannot fit the device.

        Where no size was asked for, a cache of one whole context is enough: more sequences than that take turns.
        """
        one = replace(limits, max_sequences=1)
        need, room = self.forecast(one, cache_type, cache_tokens), self._device.memory()
        if need.total <= room.free:
            return
        longest = self.longest_context(one, cache_type, room.free)
        held = replace(limits, max_context=2)
        if cache_tokens is not None and longest >= limits.max_context:
            remedy = f"start with a smaller --cache-tokens; {limits.max_context}, one context, would fit"
        elif longest > 1:
            remedy = f"start with --context {longest}, which would fit"
        else:
            remedy = f"no context fits, as all but the cache takes {amount(self.forecast(held, cache_type).total)}"
            remedy += ": use a more strongly quantised model, or a device with more memory"
        holds = "one sequence" if cache_tokens is None else f"{cache_tokens} tokens"
        raise DeviceMemoryError(
            f"{self._config.name} with a context of {limits.max_context} tokens needs {amount(need.total)} on "
            f"{self._provider.name} {self._device.info.name} (weights {amount(need.weights)}, KV cache of "
            f"{holds} {amount(need.cache)}, working memory {amount(need.working)}), {amount(room.free)} of "
            f"{amount(room.total)} are free: {remedy}"
        )

    def _build(self, limits: Limits, spec: CacheSpec, sizes: _Sizes, specs: list[OpSpec]) -> None:
        config, device = self._config, cast(Any, sizes)
        binder = Binder(device, _stand_ins(self._provider.operations(), specs), self._provider.name)
        inputs = cast(Any, sizes.inputs(batch_shapes(limits, -(-limits.max_context // spec.block_size))))
        weights = {w.name: BoundWeight(None, w.type, w.shape) for w in self._weights}
        graph = Graph(binder, weights, limits, spec, inputs, make_batch(inputs))
        architecture(config).build(config, graph, self._factors)
        for k in CANDIDATES:
            if k <= config.vocab_size:
                graph.candidates(graph.logits, k)
        sizes.empty((limits.max_outputs, config.vocab_size), "float32")  # the host's copy of the logits

    @cached_property
    def _factors(self) -> np.ndarray | None:
        """Stand-ins for the file's RoPE factors: their values do not change a size."""
        ones = np.ones(self._config.rope_dim // 2, np.float32)
        names = ("rope_factors_long.weight", "rope_factors_short.weight")
        return self._config.rope_scaling.factors(dict.fromkeys(names, ones), self._config.context_length)


def with_context(limits: Limits, context: int) -> Limits:
    """The limits of the same load with another context: no step is longer than one."""
    tokens = max(min(limits.max_tokens, context), limits.max_sequences)
    return replace(limits, max_context=context, max_tokens=tokens)


@dataclass(frozen=True)
class _Shape:
    """A tensor that is nowhere."""

    shape: tuple[int, ...]
    dtype: str


class _Sizes:
    """A device as far as a graph needs one to be built: it counts bytes and allocates none."""

    def __init__(self) -> None:
        self.nbytes = 0

    def empty(self, shape: tuple[int, ...], dtype: str) -> _Shape:
        self.nbytes += np.dtype(dtype).itemsize * prod(shape)
        return _Shape(shape, dtype)

    def rows(self, tensor: _Shape, n: int) -> _Shape:
        return replace(tensor, shape=(n, *tensor.shape[1:]))

    def inputs(self, shapes: Mapping[str, tuple[int, ...]]) -> SimpleNamespace:
        return SimpleNamespace(device={name: self.empty(shape, "int32") for name, shape in shapes.items()})


def _stand_ins(operations: object, specs: list[OpSpec]) -> object:
    """Factories for what the provider offers, whose kernels do nothing; they note the sites that they are asked for."""

    @hookimpl
    def factory(spec: Any) -> Callable[..., None]:
        specs.append(spec)
        return _nothing

    return SimpleNamespace(**{name: factory for name in REQUIRED + OPTIONAL if hasattr(operations, name)})


def _nothing(*_args: Any) -> None:
    return None
