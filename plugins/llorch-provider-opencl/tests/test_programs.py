"""Binaries are kept on disk under all that they depend on; compile errors show the compiler's lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llorch_provider_opencl.programs import Programs

from llorch.errors import ProviderError

CODE = "__kernel void twice(__global float *x) { x[get_global_id(0)] *= FACTOR; }"

BUILD = """
import sys
from pathlib import Path
from llorch_provider_opencl import provider
from llorch_provider_opencl.programs import Programs
d = provider.open()
Programs(d.context, d._device, folder=Path(sys.argv[1])).get(sys.argv[2], {"FACTOR": 2.0})
"""


def programs(device: Any, folder: Path) -> Programs:
    return Programs(device.context, device._device, folder=folder)


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

    assert Programs(device.context, Updated(), folder=tmp_path).path(CODE, "") != found.path(CODE, "")


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


@pytest.mark.filterwarnings("ignore")
def test_a_compile_error_shows_the_compilers_lines(device: Any, tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="does not compile") as error:
        programs(device, tmp_path).get("__kernel void broken() {\n  undeclared_name = 1;\n}", {})
    assert "undeclared_name" in str(error.value)
    assert not list(tmp_path.iterdir())
