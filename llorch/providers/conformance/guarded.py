"""A wrapper around a device whose tensors raise on any host access: only `read` and `write` see their contents.

Core and the suite run whole models through it, so nothing outside a kernel can have looked at device memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import pluggy

from llorch.providers.device import Batch, CacheSpec, Device, HostWeight, Inputs, Provider
from llorch.providers.spec import OPTIONAL, REQUIRED, Kernel, LayerOps, Step, hookimpl

_TENSORS = ("positions", "slots", "sequence_ids", "block_tables", "query_starts", "context_lengths")


class Opaque:
    """What core gets in a tensor's place: its shape and dtype, and nothing else."""

    def __init__(self, real: Any) -> None:
        self._real = real

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._real.shape)

    @property
    def dtype(self) -> Any:
        return self._real.dtype

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise AssertionError("device memory was touched from the host outside read and write")

    __array__ = __len__ = __iter__ = __getitem__ = __setitem__ = __buffer__ = __float__ = __int__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __matmul__ = __bool__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()


def reveal(value: Any) -> Any:
    """The real thing behind a wrapper, for the provider's own code."""
    if isinstance(value, Opaque):
        return value._real
    if isinstance(value, Batch):
        real = {name: reveal(getattr(value, name)) for name in _TENSORS}
        ints = (value.tokens, value.sequences, value.max_query, value.max_context)
        return Batch(**real, tokens=ints[0], sequences=ints[1], max_query=ints[2], max_context=ints[3])
    return value


class GuardedDevice:
    """Passes everything on; hides what is device memory. Counts `empty`, so that a test can see allocations."""

    def __init__(self, real: Device) -> None:
        self._real, self.allocations = real, 0

    def __getattr__(self, name: str) -> Any:  # info, weight_types, memory, expect, close, ...
        return getattr(self._real, name)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Opaque:
        self.allocations += 1
        return Opaque(self._real.empty(shape, dtype))

    def rows(self, tensor: Any, n: int) -> Opaque:
        return Opaque(self._real.rows(reveal(tensor), n))

    def weight(self, host_weight: HostWeight) -> Opaque:
        return Opaque(self._real.weight(host_weight))

    def weight_bytes(self, weight: Any) -> int:
        return self._real.weight_bytes(reveal(weight))

    def held_bytes(self, weight: Any) -> int:
        held: Callable[[Any], int] = getattr(self._real, "held_bytes", self._real.weight_bytes)
        return held(reveal(weight))

    def kv_cache(self, spec: CacheSpec) -> Any:
        real = self._real.kv_cache(spec)
        return SimpleNamespace(layers=[Opaque(layer) for layer in real.layers], copy=real.copy)

    def inputs(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        real: Inputs = self._real.inputs(shapes)
        hidden = {name: Opaque(tensor) for name, tensor in real.device.items()}
        return SimpleNamespace(host=real.host, device=hidden, upload=real.upload)

    def write(self, tensor: Any, host: Any) -> None:
        self._real.write(reveal(tensor), host)

    def read(self, tensor: Any, host: Any) -> None:
        self._real.read(reveal(tensor), host)

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        return self._real.capture(run)


class _GuardedOperations:
    """The provider's factories, whose kernels see the real tensors."""

    def __init__(self, operations: object) -> None:
        self._manager = pluggy.PluginManager("llorch")
        self._manager.add_hookspecs(LayerOps)
        self._manager.register(operations)


def _factory(operation: str) -> Callable[..., Any]:
    def factory(self: _GuardedOperations, device: Any, spec: Any) -> Kernel | None:
        kernel = getattr(self._manager.hook, operation)(device=device._real, spec=spec)
        return None if kernel is None else _guard(kernel)

    factory.__name__ = operation
    return hookimpl(factory)


for _name in (*REQUIRED, *OPTIONAL):
    setattr(_GuardedOperations, _name, _factory(_name))


def _guard(kernel: Kernel) -> Kernel:
    def guarded(*args: Any) -> None:
        kernel(*map(reveal, args))

    steps: Callable[..., Sequence[Step]] | None = getattr(kernel, "steps", None)
    if steps is not None:
        guarded.steps = lambda *args: [  # type: ignore[attr-defined]
            Step(_guard(step.kernel) if step.kernel is not kernel else guarded, step.args, step.spec)
            for step in steps(*map(reveal, args))
        ]
    return guarded


class GuardedProvider:
    """A provider whose devices are guarded."""

    def __init__(self, real: Provider) -> None:
        self._real = real
        self.opened: list[GuardedDevice] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def open(self, device: str | None = None, options: Any = None) -> GuardedDevice:
        self.opened.append(GuardedDevice(self._real.open(device, options)))
        return self.opened[-1]

    def operations(self) -> _GuardedOperations:
        return _GuardedOperations(self._real.operations())
