"""Where launches go: to the queue, or, while a run is recorded, into a command buffer (cl_khr_command_buffer).

pyopencl wraps no command buffers, so their functions are called through ctypes; the signatures are those of the OpenCL
extension specification, section cl_khr_command_buffer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from llorch.providers import ProviderError
from llorch_provider_opencl.runtimes import import_pyopencl

EXTENSION = "cl_khr_command_buffer"

_int, _uint, _ptr = ctypes.c_int32, ctypes.c_uint32, ctypes.c_void_p
_SIGNATURES = {  # result, arguments
    "clCreateCommandBufferKHR": (_ptr, (_uint, _ptr, _ptr, ctypes.POINTER(_int))),
    "clCommandNDRangeKernelKHR": (_int, (*(_ptr,) * 4, _uint, *(_ptr,) * 3, _uint, *(_ptr,) * 3)),
    "clFinalizeCommandBufferKHR": (_int, (_ptr,)),
    "clEnqueueCommandBufferKHR": (_int, (_uint, _ptr, _ptr, _uint, _ptr, _ptr)),
    "clReleaseCommandBufferKHR": (_int, (_ptr,)),
}


class Launcher:
    """`launch(kernel, size, group)` enqueues on the in-order queue, or records while `record` runs."""

    def __init__(self, queue: Any, device: Any) -> None:
        enqueue = import_pyopencl().enqueue_nd_range_kernel
        self._queue = queue
        self._plain = lambda kernel, size, group: enqueue(queue, kernel, size, group)
        self._functions = _functions(device) if EXTENSION in device.extensions.split() else None
        self.launch: Callable[[Any, Sequence[int], Sequence[int] | None], Any] = self._plain

    @property
    def can_record(self) -> bool:
        return self._functions is not None

    def record(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """What `run` launches, as one command; None where the device has no command buffers."""
        if self._functions is None:
            return None
        commands = CommandBuffer(self._functions, self._queue)
        self.launch = commands.add
        try:
            run()
        finally:
            self.launch = self._plain
        commands.finish(keep=run)
        return commands.replay


class CommandBuffer:
    """Launches in their order, with the arguments that their kernels have while they are recorded."""

    def __init__(self, functions: dict[str, Any], queue: Any) -> None:
        self._functions, self._queue = functions, queue
        self._kept: list[Any] = []
        self._last: int | None = None  # the sync point that the next command waits for
        queues, status = (_ptr * 1)(queue.int_ptr), _int()
        self._handle = functions["clCreateCommandBufferKHR"](1, queues, None, ctypes.byref(status))
        _check("clCreateCommandBufferKHR", status.value)

    def add(self, kernel: Any, size: Sequence[int], group: Sequence[int] | None) -> None:
        def sizes(values: Sequence[int] | None) -> Any:
            return None if values is None else (ctypes.c_size_t * len(values))(*values)

        after = None if self._last is None else (_uint * 1)(self._last)
        point = _uint()
        ranges = (len(size), None, sizes(size), sizes(group))
        waits = (0 if after is None else 1, after, ctypes.byref(point), None)
        self._call("clCommandNDRangeKernelKHR", self._handle, None, None, kernel.int_ptr, *ranges, *waits)
        self._last = point.value
        self._kept.append(kernel)

    def finish(self, keep: Any) -> None:
        """Ends the recording. `keep` holds what the commands use."""
        self._kept.append(keep)
        self._call("clFinalizeCommandBufferKHR", self._handle)

    def replay(self) -> None:
        # a command buffer must not be enqueued while it is pending: `read` has waited for the step before
        self._call("clEnqueueCommandBufferKHR", 0, None, self._handle, 0, None, None)

    def _call(self, name: str, *args: Any) -> None:
        _check(name, self._functions[name](*args))

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle:
            self._functions["clReleaseCommandBufferKHR"](handle)


def _functions(device: Any) -> dict[str, Any]:
    # the extension module is linked with the ICD loader, whose symbols are found through it
    find = ctypes.CDLL(import_pyopencl()._cl.__file__).clGetExtensionFunctionAddressForPlatform
    find.restype, find.argtypes = _ptr, (_ptr, ctypes.c_char_p)
    found = {}
    for name, (result, arguments) in _SIGNATURES.items():
        address = find(device.platform.int_ptr, name.encode())
        if not address:
            raise ProviderError(f"{device.name} announces {EXTENSION} but its driver has no {name}: update the driver")
        found[name] = ctypes.CFUNCTYPE(result, *arguments)(address)
    return found


def _check(function: str, status: int) -> None:
    if status:
        raise ProviderError(f"{function} failed with OpenCL status {status}")
