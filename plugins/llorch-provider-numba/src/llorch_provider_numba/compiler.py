"""From LLVM IR to functions in memory; what was compiled is kept on disk.

A folder of the user's cache holds the kernels of one state of things: its name is a hash of this package's source, the
versions of numba, llvmlite and Python, and the CPU. Another state has another folder, so nothing stale is ever loaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import platformdirs

from llorch.providers import KeptFiles
from llorch_provider_numba import emitter, softmax
from llorch_provider_numba.formats import FORMATS
from llorch_provider_numba.hosts import Host

KEPT_SECONDS = 30 * 86400  # other states' folders are removed when nothing was taken from them for so long

_lock = threading.Lock()
_engines: list[object] = []  # compiled code lives as long as the process


@functools.cache
def kept_files() -> KeptFiles:
    """The folder of this state of things."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    cpu = f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    versions = [metadata.version(name) for name in ("numba", "llvmlite", "numpy")]
    digest.update(repr((*versions, sys.version, platform.machine(), cpu)).encode())
    parent = Path(platformdirs.user_cache_dir("llorch")) / "numba"
    folder = parent / digest.hexdigest()[:16]
    with contextlib.suppress(OSError):  # it is not there yet, or not this user's to change
        os.utime(folder)
        _remove_old(parent, folder)
    return KeptFiles(folder, "of numba-cpu compiles its operations, for half a minute")


def _remove_old(parent: Path, used: Path) -> None:
    for other in parent.iterdir():
        if other != used and other.stat().st_mtime < time.time() - KEPT_SECONDS:
            shutil.rmtree(other, ignore_errors=True)  # another process may be removing it too


@functools.cache
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def native_machine() -> llvm.TargetMachine:
    """The CPU this runs on."""
    return _machine(llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())


def target_machine(host: Host) -> llvm.TargetMachine:
    return _machine(host.cpu, host.features) if host.cpu else native_machine()


def _machine(cpu: str, features: str) -> llvm.TargetMachine:
    _initialize()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(cpu=cpu, features=features, opt=2, jit=True, codemodel="jitdefault")


def optimised(text: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    """IR after LLVM's standard passes; what is meant to be unrolled is written so."""
    module = llvm.parse_assembly(text)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return module


@functools.cache
def product_kernels(type_name: str, host: Host) -> dict[int, int]:
    """Addresses of a weight type's kernels, by the tokens of a tile."""
    form = FORMATS[type_name]
    names = {t: emitter.kernel_name(form, t) for t in host.tiles}
    return _addresses(type_name, f"products of {type_name}", host, names, emitter.product_module, form, host)


@functools.cache
def softmax_kernels(host: Host) -> dict[int, int]:
    """Addresses of the softmax's kernels, by the rows of a tile."""
    names = {rows: softmax.kernel_name(rows) for rows in host.tiles}
    return _addresses("softmax", "the softmax", host, names, softmax.softmax_module, host.tiles)


def _addresses(
    file: str, what: str, host: Host, names: dict[int, str], module: Callable[..., Any], *arguments: Any
) -> dict[int, int]:
    def compiled() -> bytes:
        machine = target_machine(host)
        text = str(module(*arguments, llvm.get_process_triple()))
        found: bytes = machine.emit_object(optimised(text, machine))
        return found

    engine = loaded(kept(f"{file}-{host.name}.o", f"{what} for {host.name}", compiled))
    return {size: engine.get_function_address(name) for size, name in names.items()}


def loaded(content: bytes) -> Any:
    """An engine that has the addresses of an object's functions."""
    with _lock:
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), native_machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(content))
        engine.finalize_object()
        _engines.append(engine)
    return engine


def kept(name: str, what: str, make: Callable[[], bytes]) -> bytes:
    """A file of the cache, made first where it is not there: the first start says at what it takes a while."""
    return kept_files().get(name, make, f"numba-cpu compiles {what}")
