"""Binds operations to a device's kernels: once per call site, at load."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pluggy

from llorch.errors import BindError, LlorchError
from llorch.providers.decompose import Decomposed, Decompositions
from llorch.providers.device import Device
from llorch.providers.hooks import register
from llorch.providers.spec import OPTIONAL, Kernel, OpSpec, Tensor


class Binder:
    """One plugin manager per opened device, holding the provider's operations and core's decompositions.

    With `fused=False` the provider is not asked for optional operations, so that every label of the graph exists.
    """

    def __init__(self, device: Device, operations: object, provider: str, *, fused: bool = True) -> None:
        self.device, self.provider = device, provider
        self.bound, self.fused, self.decomposed = 0, 0, 0
        self.declined: list[tuple[str, OpSpec]] = []
        self._operations, self._ask_optional = operations, fused
        self._scratch: dict[tuple[str, int], Tensor] = {}
        self._manager = self._register(operations)

    def _register(self, operations: object) -> pluggy.PluginManager:
        manager = register(operations, self.provider)
        manager.register(Decompositions(self), name="decompositions")
        return manager

    def bind(self, operation: str, spec: OpSpec) -> Kernel:
        """The kernel of one call site. A required operation that is declined is recorded; `finish` raises for all."""
        kernel = self._ask(operation, spec)
        if kernel is None:
            self.declined.append((operation, spec))
            return _declined
        if not callable(kernel):
            raise BindError(
                f"provider {self.provider}: {operation} at {spec.label} returned {type(kernel).__name__}, not a kernel"
            )
        if isinstance(kernel, Decomposed):
            self.decomposed += 1
        else:
            self.bound += 1
            self.fused += operation in OPTIONAL
        bound: Kernel = kernel
        return bound

    def bind_if_offered(self, operation: str, spec: OpSpec) -> Kernel | None:
        """For an optional operation that no others can stand for: None where it is declined, which is counted."""
        if not self._ask_optional or self._ask(operation, spec) is None:
            self.decomposed += 1
            return None
        return self.bind(operation, spec)

    def _ask(self, operation: str, spec: OpSpec) -> Any:
        hook = getattr(self._manager.hook, operation)
        if operation in OPTIONAL and not self._ask_optional:
            hook = self._manager.subset_hook_caller(operation, remove_plugins=[self._operations])
        try:
            return hook(device=self.device, spec=spec)
        except LlorchError:
            raise
        except Exception as error:
            raise BindError(
                f"provider {self.provider}: its factory for {operation} at {spec.label} raised "
                f"{type(error).__name__}: {error} ({spec})"
            ) from error

    def scratch(self, name: str, rows: int, cols: int) -> Tensor:
        """Float32 memory shared by all sites that ask for the name; one arena serves every layer."""
        tensor = self._scratch.get((name, cols))
        if tensor is None or tensor.shape[0] < rows:
            tensor = self._scratch[name, cols] = self.device.empty((rows, cols), "float32")
        return tensor

    def finish(self) -> str:
        """The start line's counts. Raises BindError, listing every required operation that was declined."""
        if self.declined:
            sites = Counter(operation for operation, _ in self.declined)
            first = dict(reversed(self.declined))
            lines = [
                f"{op} ({n} sites, first {first[op].label}: {first[op]}), {self._why(op)}" for op, n in sites.items()
            ]
            raise BindError(
                f"provider {self.provider} declines {len(self.declined)} required operations of this model: "
                f"{'; '.join(lines)}. Choose another with --provider, see `llorch providers`"
            )
        total = self.bound
        return f"{self.bound} of {total} operations bound ({self.fused} fused, {self.decomposed} decomposed)"

    def _why(self, operation: str) -> str:
        """A factory that says no looks like one that forgot to say yes."""
        asked: bool = bool(getattr(self._manager.hook, operation).get_hookimpls())
        return "where its factory returned None (a forgotten `return`?)" if asked else "for which it has no factory"


def _declined(*_args: Any) -> None:
    raise BindError("a declined operation was called: the binder was not finished")
