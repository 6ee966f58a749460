"""From a kernel of the contract to launches on a queue.

A site says, for the tensors of a call, which kernels run over which ranges (`launches`). Called directly, it sets
the arguments of kernel objects that it shares between calls; for a plan, `steps` gives kernel objects of their own,
whose arguments are set once: the hot loop then only enqueues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llorch.providers import OpSpec, Step
from llorch_provider_opencl.recording import Launcher


class Launch(NamedTuple):
    """`make` returns a new kernel object. `group` None leaves the work-groups to the driver."""

    make: Callable[[], Any]
    size: tuple[int, ...]
    group: tuple[int, ...] | None
    args: tuple[Any, ...]


class Site:
    """A kernel of the contract."""

    def __init__(self, launcher: Launcher, spec: OpSpec, launches: Callable[..., Sequence[Launch]]) -> None:
        self._launcher, self._spec, self._launches = launcher, spec, launches
        self._kernels: dict[Callable[[], Any], Any] = {}

    def __call__(self, *args: Any) -> None:
        for launch in self._launches(*args):
            kernel = self._kernels.get(launch.make)
            if kernel is None:
                kernel = self._kernels[launch.make] = launch.make()
            kernel.set_args(*launch.args)
            self._launcher.launch(kernel, launch.size, launch.group)

    def steps(self, *args: Any) -> Sequence[Step]:
        """Launches with their arguments set. The last carries the site's spec: what it writes is there after it."""
        return [Step(_prebound(self._launcher, self._launches(*args), args), (), self._spec)]


def _prebound(launcher: Launcher, launches: Sequence[Launch], kept: tuple[Any, ...]) -> Callable[[], None]:
    ready = []
    for launch in launches:
        kernel = launch.make()
        kernel.set_args(*launch.args)
        ready.append((kernel, launch.size, launch.group))

    def run() -> None:
        for kernel, size, group in ready:
            launcher.launch(kernel, size, group)

    run.tensors = kept  # type: ignore[attr-defined]  # a kernel object does not keep its buffers alive
    return run
