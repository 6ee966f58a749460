"""Compiled functions, called from Python. Numba is needed to make them, not to run them.

Numba turns Python into LLVM IR; machine code is made of that once and kept (compiler.py). A start that finds it there
imports no Numba, which would take longer than reading a small model.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable

import llvmlite.binding as llvm

from llorch_provider_numba import compiler

# name -> the module it is in, what the first start says; all take seven int64 and return one
ENTRIES = {
    "drive": ("interpreter", "the operations, which takes half a minute"),
    "repack": ("repack", "the repacking of quantised weights"),
    "repack_plain": ("repack", "the repacking of float weights"),
}
ARGUMENTS = 7


@functools.cache
def entry(name: str) -> Callable[..., int]:
    """A function of ENTRIES, compiled first where the cache has none. The GIL is free while it runs."""
    module, what = ENTRIES[name]
    content = compiler.kept(f"{name}.o", what, lambda: _compiled(module, name))
    address = compiler.loaded(content).get_function_address(name)
    # Numba's convention: a status, and where the result and an exception go
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * ARGUMENTS)
    function = kind(address)

    def call(*arguments: int) -> int:
        result, raised = ctypes.c_int64(), ctypes.c_void_p()
        status = function(ctypes.byref(result), ctypes.byref(raised), *arguments)
        assert status == 0, f"{name} ended with status {status}: none of its operations raises"
        return result.value

    return call


def _compiled(module_name: str, name: str) -> bytes:
    """The function's machine code, with all it calls."""
    from numba import types

    function = getattr(importlib.import_module(f"llorch_provider_numba.{module_name}"), name)
    signature = (types.int64,) * ARGUMENTS
    function.compile(signature)
    found = function.overloads[signature]
    module = llvm.parse_assembly(found.library.get_llvm_str())
    for each in module.functions:
        if each.name == found.fndesc.llvm_func_name:
            each.name = name
        elif not each.is_declaration:
            each.linkage = "internal"  # the way for Python to call it is not needed here, nor what that refers to
    machine = compiler.native_machine()
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=0)))
    content: bytes = machine.emit_object(module)
    return content
