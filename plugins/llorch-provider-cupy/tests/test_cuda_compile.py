"""Every kernel compiled by NVRTC for every kind of card, with no spills and no more registers than its blocks allow.

Needs nvidia-cuda-nvrtc-cu12 and cuda-pathfinder (90 MB, the extra [nvrtc]), which `make setup` does not install and
`.ci/run` does, in an environment of its own.
"""

from __future__ import annotations

import importlib.util
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from llorch_provider_cupy import programs
from llorch_provider_cupy.compiler import Binaries, Nvrtc, cuda_library
from llorch_provider_cupy.formats import FORMATS
from llorch_provider_cupy.programs import Program

from llorch.errors import ProviderError, ProviderUnavailableError

CAPABILITIES = ((7, 0), (8, 0), (8, 9), (9, 0), (12, 0))
MOST_REGISTERS = 255  # of a thread
REGISTERS = 65536  # of a multiprocessor, on all of these cards
THREADS = {
    "rows": 512,
    "rope": 64,
    "topk": 1024,
    "attention": 128,
    "products": 256,
    "prompt": 128,
}  # the largest block of each

PROGRAMS = [
    *map(programs.program, ("rows", "rope", "topk")),
    *(programs.attention(head_dim, dtype) for head_dim, dtype in ((80, "f32"), (128, "f16"), (256, "f16"))),
    *map(programs.products, FORMATS),
]
ON_TENSOR_CORES = [programs.prompt(head_dim) for head_dim in (64, 80, 128)]  # from 8.0 on


@pytest.fixture(scope="session")
def nvrtc() -> Nvrtc:
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("NVRTC is not installed: pip install 'llorch-provider-cupy[nvrtc]'")
    try:
        return Nvrtc(cuda_library("nvrtc"))
    except ProviderUnavailableError as error:
        pytest.skip(f"NVRTC is not installed: {error}")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel."""

    registers: int
    stack: int  # bytes
    spills: int  # bytes of stores and loads


def usage(log: str) -> dict[str, Usage]:
    """By kernel, from what `--ptxas-options=-v` prints."""
    found: dict[str, Usage] = {}
    name, stack, spills = "", 0, 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            found[name] = Usage(int(match[1]), stack, spills)
    return found


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"{c[0]}.{c[1]}")
def test_every_kernel_compiles_without_spills(nvrtc: Nvrtc, capability: tuple[int, int]) -> None:
    target = nvrtc.target(capability)
    assert target == f"sm_{capability[0]}{capability[1]}"

    def compiled(program: Program) -> tuple[bytes, str]:
        return nvrtc.compile(program, target, "--ptxas-options=-v")

    chosen = PROGRAMS + (ON_TENSOR_CORES if capability >= (8, 0) else [])
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(compiled, chosen))
    for program, (binary, log) in zip(chosen, results, strict=True):
        assert binary[:4] == b"\x7fELF"
        used = usage(log)
        assert used.keys() == set(program.kernels), str(program)
        for name, kernel in used.items():
            assert (kernel.stack, kernel.spills) == (0, 0), f"{name} of {program} spills on {target}: {kernel}"
            most = min(MOST_REGISTERS, REGISTERS // THREADS[program.name])
            assert kernel.registers <= most, f"{name} of {program} on {target}: {kernel}"


class Starved(Program):
    """A program whose kernels are promised two blocks of 1,024 threads on a multiprocessor: 32 registers each."""

    @property
    def source(self) -> str:
        return super().source.replace("__launch_bounds__(threads, resident)", "__launch_bounds__(1024, 2)")


def test_a_kernel_that_spills_is_seen(nvrtc: Nvrtc) -> None:
    """The negative twin: the same reading of the log finds the spills of kernels that are denied registers."""
    starved = Starved("products", (("TYPE_Q5_K", 1),))
    _, log = nvrtc.compile(starved, "sm_90", "--ptxas-options=-v")
    assert usage(log)["product_8"].spills > 0


def test_a_kernel_that_does_not_compile_shows_the_compilers_lines(nvrtc: Nvrtc) -> None:
    wrong = programs.program("products", {"TYPE_NOTHING": 1})
    with pytest.raises(ProviderError, match=r"does not compile products with .*TYPE_NOTHING") as error:
        nvrtc.compile(wrong, "sm_90")
    assert re.search(r"weights\.cuh\(\d+\): error: identifier \"QUANT_BYTES\" is undefined", str(error.value))


def test_cards_that_nvrtc_does_not_know(nvrtc: Nvrtc) -> None:
    newest = nvrtc.architectures[-1]
    assert nvrtc.target((99, 0)) == f"compute_{newest}"  # its driver finishes what it gets
    text, _ = nvrtc.compile(programs.program("rope"), f"compute_{newest}")
    assert b".target" in text
    with pytest.raises(ProviderUnavailableError, match=r"the card has 1\.0"):
        nvrtc.target((1, 0))


def test_binaries_are_kept_by_all_that_they_depend_on(
    nvrtc: Nvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Binaries(nvrtc, tmp_path)
    first = kept.get(programs.program("rope"), (9, 0))
    kept.get(programs.program("rope"), (8, 0))
    kept.get(programs.program("rope", {"OTHER": 1}), (9, 0))
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(nvrtc, "compile", lambda *_: pytest.fail("it compiles again"))
    assert Binaries(nvrtc, tmp_path).get(programs.program("rope"), (9, 0)) == first
