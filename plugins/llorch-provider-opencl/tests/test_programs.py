"""Binaries are kept on disk under all that they depend on; compile errors show the compiler's lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llorch_provider_opencl.programs import Programs

from llorch.errors import ProviderError
from llorch.providers import KeptFiles

CODE = "__kernel void twice(__global float *x) { x[get_global_id(0)] *= FACTOR; }"

BUILD = """
import sys
from pathlib import Path
from llorch_provider_opencl import provider
from llorch.providers import KeptFiles
from llorch_provider_opencl.programs import Programs
d = provider.open()
Programs(d.context, d._device, kept=KeptFiles(Path(sys.argv[1]), "")).get(sys.argv[2], {"FACTOR": 2.0})
"""

USE = f"""
import numpy as np
from llorch_provider_opencl import provider
from llorch_provider_opencl.programs import Programs
d = provider.open()
import pyopencl as cl
x = np.array([6], np.float32)
buffer = cl.Buffer(d.context, cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR, hostbuf=x)
queue = cl.CommandQueue(d.context)
Programs(d.context, d._device).get({CODE!r}, {{"FACTOR": 2.0}}).twice(queue, (1,), None, buffer)
cl.enqueue_copy(queue, x, buffer)
print(x[0])
"""


def programs(device: Any, folder: Path) -> Programs:
    return Programs(device.context, device._device, kept=KeptFiles(folder, ""))


def test_a_second_process_takes_the_binary(device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(device, tmp_path).get(CODE, {"FACTOR": 2.0})
    assert len(list(tmp_path.iterdir())) == 1
    later = programs(device, tmp_path)
    monkeypatch.setattr(later, "_compile", lambda *_: pytest.fail("it compiles again"))
    later.get(CODE, {"FACTOR": 2.0})


def test_source_options_and_driver_have_binaries_of_their_own(device: Any, tmp_path: Path) -> None:
    found = programs(device, tmp_path)
    found.get(CODE, {"FACTOR": 2.0})
    found.get(CODE, {"FACTOR": 3.0})
    found.get(CODE + " ", {"FACTOR": 2.0})
    assert len(list(tmp_path.iterdir())) == 3

    class Updated:
        driver_version = "another"

        def __getattr__(self, name: str) -> Any:
            return getattr(device._device, name)

    assert Programs(device.context, Updated()).file(CODE, "") != found.file(CODE, "")


def test_a_damaged_binary_is_built_anew(device: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    programs(device, tmp_path).get(CODE, {"FACTOR": 2.0})
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(b"damaged")
    programs(device, tmp_path).get(CODE, {"FACTOR": 2.0})
    assert "built anew" in caplog.text
    assert len(path.read_bytes()) == len(content)


def test_processes_that_build_at_once_leave_one_whole_binary(device: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(tmp_path), CODE]
    running = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".bin"]
    programs(device, tmp_path).get(CODE, {"FACTOR": 2.0})


@pytest.mark.usefixtures("device")
def test_without_a_folder_to_keep_them_in_it_works_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "12.0\n"
    assert done.stderr.count("nothing can be kept in") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # the temporary one is gone


@pytest.mark.filterwarnings("ignore")
def test_a_compile_error_shows_the_compilers_lines(device: Any, tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="does not compile") as error:
        programs(device, tmp_path).get("__kernel void broken() {\n  undeclared_name = 1;\n}", {})
    assert "undeclared_name" in str(error.value)
    assert not list(tmp_path.iterdir())
