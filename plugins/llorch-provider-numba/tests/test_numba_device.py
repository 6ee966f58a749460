"""What the conformance suite cannot see: threads that sleep, the cache of kernels, memory, mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from llorch_provider_numba import compiler, hosts, pool, provider
from llorch_provider_numba.memory import LINE, Arena

from llorch.errors import DeviceMemoryError, ProviderUnavailableError
from llorch.providers import CacheSpec, DeviceOptions


def test_idle_threads_sleep() -> None:
    opened = provider.open(None, DeviceOptions(threads=3))
    try:
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.1
    finally:
        opened.close()


def test_a_container_limit_is_respected(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert pool._container_limit(tmp_path) == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert pool._container_limit(tmp_path) is None
    assert 1 <= pool.default_threads() <= (os.cpu_count() or 1)


def test_a_cache_that_does_not_fit_is_an_error_with_both_sizes() -> None:
    spec = CacheSpec(layers=64, kv_heads=64, head_dim=128, block_size=32, blocks=1 << 20, dtype="f32")
    opened = provider.open()
    with pytest.raises(DeviceMemoryError, match=r"needs \d+\.\d+ GiB, \d+\.\d+ GiB are free.*--context"):
        opened.kv_cache(spec)
    opened.close()


def test_an_array_of_another_shape_is_refused() -> None:
    opened = provider.open()
    tensor = opened.empty((2, 3), "float32")
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 3\)"):
        opened.write(tensor, np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="int32"):
        opened.read(tensor, np.zeros((2, 3), np.int32))
    opened.close()


def test_an_unknown_device_is_an_error() -> None:
    with pytest.raises(ProviderUnavailableError, match="no device 'gpu'"):
        provider.open("gpu")


def test_first_runs_at_once_compile_into_one_cache(tmp_path: Path) -> None:
    code = (
        "from llorch_provider_numba import compiler, hosts;print(len(compiler.product_kernels('Q4_0', hosts.choose())))"
    )
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    run = [sys.executable, "-c", code]
    started = [subprocess.Popen(run, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert int(out) == len(hosts.choose().tiles)
    again = subprocess.run(run, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert "compiles" not in again.stderr
    (folder,) = (tmp_path / "llorch" / "numba").iterdir()
    assert [path.name for path in folder.iterdir()] == [f"Q4_0-{hosts.choose().name}.o"]


def test_a_later_start_loads_no_numba() -> None:
    code = (
        "import sys; from llorch_provider_numba import provider; provider.open().close(); print('numba' in sys.modules)"
    )
    run = [sys.executable, "-c", code]
    subprocess.run(run, check=True, timeout=240)  # compiles what is not there yet
    again = subprocess.run(run, check=True, timeout=60, capture_output=True, text=True)
    assert again.stdout.strip() == "False"


def test_weights_lie_side_by_side() -> None:
    arena = Arena(5000)
    first, second, outside = arena.take(100), arena.take(4000), arena.take(2000)
    assert second.ctypes.data - first.ctypes.data == 128
    assert not 0 <= outside.ctypes.data - first.ctypes.data < 5000
    assert all(part.ctypes.data % LINE == 0 for part in (first, second, outside))


@pytest.mark.parametrize("what", ["version", "cpu", "source"])
def test_another_state_of_things_has_another_folder(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = compiler.kept_files().folder
    if what == "version":
        monkeypatch.setattr(compiler.metadata, "version", lambda name: "0")
    elif what == "cpu":
        monkeypatch.setattr(compiler.llvm, "get_host_cpu_name", lambda: "another")
    else:
        (tmp_path / "compiler.py").write_text("another")
        monkeypatch.setattr(compiler, "__file__", str(tmp_path / "compiler.py"))
    compiler.kept_files.cache_clear()
    try:
        assert compiler.kept_files().folder != here
    finally:
        compiler.kept_files.cache_clear()
