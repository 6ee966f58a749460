"""The emulator finds what a card would not tell: the suite over it proves nothing otherwise."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
from emulator.runtime import NO_COMPILER, EmulatorError, HostRuntime, build, compiler
from llorch_provider_cupy.programs import Program, program

pytestmark = pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)


@dataclass(frozen=True)
class Written(Program):
    """A program of one kernel, `kernel(int *out)`, whose body a test gives."""

    body: str = ""

    @property
    def kernels(self) -> tuple[str, ...]:
        return ("kernel",)

    @property
    def source(self) -> str:
        return program("rope").source + f"\nKERNEL(64) kernel(int *out) {{ {self.body} }}\n"


def run(body: str, threads: int = 64, size: int = 64, *, blocks: int = 1, races: bool = False) -> list[np.ndarray]:
    """Two launches, which the emulator runs in opposite orders."""
    card, found = HostRuntime(races=races), []
    memory = card.allocate(4 * size)
    function = card.function(Written("rope", (), body), "kernel")
    for _ in range(2):
        card.upload(memory.address, np.full(size, -1, np.int32))
        card.launch(function, (blocks, 1, 1), threads, (np.uint64(memory.address),))
        found.append(np.empty(size, np.int32))
        card.download(found[-1], memory.address)
    return found


def test_threads_share_memory_and_wait_for_each_other() -> None:
    first, second = run(
        "SHARED(int, all, 64); all[threadIdx.x] = threadIdx.x; "
        "__syncthreads(); out[threadIdx.x] = all[63 - threadIdx.x];"
    )
    assert first.tolist() == second.tolist() == list(range(63, -1, -1))


def test_a_missing_barrier_gives_different_results() -> None:
    first, second = run(
        "SHARED(int, all, 64); all[threadIdx.x] = threadIdx.x; out[threadIdx.x] = all[63 - threadIdx.x];"
    )
    assert first.tolist() != second.tolist()


def test_shuffles_are_of_a_warp() -> None:
    first, _ = run("out[threadIdx.x] = __shfl_xor_sync(ALL_LANES, (int)threadIdx.x, 1);")
    assert first.tolist() == [i ^ 1 for i in range(64)]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("out[64] = 1;", "written outside"),
        ("out[-1] = 1;", "written outside"),
        ("SHARED(int, all, 8); SHARED(int, more, 8); all[8] = more[0] = 0;", "behind an array in shared memory"),
        ("if (threadIdx.x < 7) __syncthreads();", "wait for others that have returned"),
        ("if (threadIdx.x < 7) {\n__syncthreads(); } else {\n__syncthreads(); }", "different barriers"),
        ("if (threadIdx.x % 2) return; out[0] = __shfl_sync(ALL_LANES, 1, 0);", "wait for others that have returned"),
    ],
)
def test_what_a_kernel_must_not_do_is_an_error(body: str, what: str) -> None:
    with pytest.raises(EmulatorError, match=what):
        run(body)


SHARE = "SHARED(int, all, 64); all[threadIdx.x] = threadIdx.x; "
OWN_SLOT = "out[blockIdx.x * 32 + threadIdx.x]"


@pytest.mark.parametrize(
    ("body", "blocks", "threads"),
    [
        (SHARE + "__syncthreads(); out[threadIdx.x] = all[63 - threadIdx.x];", 1, 64),
        (SHARE + "__syncwarp(); out[threadIdx.x] = all[threadIdx.x ^ 1];", 1, 64),
        (SHARE + "out[threadIdx.x] = all[threadIdx.x];", 1, 64),
        (f"{OWN_SLOT} = {OWN_SLOT} + 1;", 2, 32),
        # each block has shared memory of its own
        ("SHARED(int, all, 64); all[0] = 1; out[blockIdx.x] = all[0];", 64, 1),
    ],
)
def test_accesses_with_an_order_are_no_race(body: str, blocks: int, threads: int) -> None:
    run(body, threads, blocks=blocks, races=True)


@pytest.mark.parametrize(
    ("body", "blocks", "what"),
    [
        (SHARE + "out[threadIdx.x] = all[threadIdx.x ^ 1];", 1, r"shared memory: thread \d+ of block 0 (reads|writes)"),
        (SHARE + "__syncwarp(); out[threadIdx.x] = all[threadIdx.x ^ 32];", 1, "shared memory"),
        # a shuffle orders no memory
        (SHARE + "__shfl_sync(ALL_LANES, 1, 0); out[threadIdx.x] = all[threadIdx.x ^ 1];", 1, "shared memory"),
        # what is read may not be overwritten before a barrier
        (SHARE + "__syncthreads(); const int x = all[threadIdx.x ^ 1]; all[threadIdx.x] = x;", 1, "shared memory"),
        (SHARE + "__syncthreads(); out[all[threadIdx.x] / 2] = 1;", 1, "global memory: .* writes .* has written"),
        ("out[threadIdx.x] = 1;", 2, "thread 0 of block . writes what thread 0 of block . has written"),
        ("if (blockIdx.x) out[0] = 1; else if (out[0] == 7) out[1] = 1;", 2, "global memory"),
        ("if (threadIdx.x / 32 == blockIdx.x) ((unsigned char *)out)[threadIdx.x % 32] = 1;", 2, "global memory"),
    ],
)
def test_a_race_is_an_error(body: str, blocks: int, what: str) -> None:
    with pytest.raises(EmulatorError, match=what):
        run(body, blocks=blocks, races=True)


def test_arguments_of_other_sizes_are_an_error() -> None:
    card = HostRuntime()
    function = card.function(Written("rope", (), "out[0] = 1;"), "kernel")
    with pytest.raises(EmulatorError, match="arguments are not those"):
        card.launch(function, (1, 1, 1), 64, (np.int32(0),))


def test_memory_starts_as_nan() -> None:
    card, found = HostRuntime(), np.empty(4, np.float32)
    memory = card.allocate(16)
    card.download(found, memory.address)
    assert np.isnan(found).all()


def test_a_program_is_a_library_with_all_its_kernels() -> None:
    rows = program("rows")
    library = build(rows)
    assert isinstance(library, ctypes.CDLL)
    assert all(hasattr(library, f"run_{name}") for name in rows.kernels)


def test_a_product_on_tensor_cores_is_that_of_its_matrices() -> None:
    """Fragments are filled here entry by entry: element i of a lane's a, b and d lies where the PTX ISA says."""
    a, b = (np.arange(n).reshape(-1, w).astype(np.float32) % 7 - 3 for n, w in ((256, 16), (128, 8)))
    body = """
        const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
        unsigned a[4], b[2];
        for (int i = 0; i < 4; i++) {
            const int row = group + i % 2 * 8, column = 2 * t + i / 2 * 8;
            a[i] = to_half((row * 16 + column) % 7 - 3) | (unsigned)to_half((row * 16 + column + 1) % 7 - 3) << 16;
        }
        for (int i = 0; i < 2; i++) {
            const int row = 2 * t + i * 8;
            b[i] = to_half((row * 8 + group) % 7 - 3) | (unsigned)to_half(((row + 1) * 8 + group) % 7 - 3) << 16;
        }
        float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        mma_16_8_16(d, a, b[0], b[1]);
        for (int i = 0; i < 4; i++) out[(group + i / 2 * 8) * 8 + 2 * t + i % 2] = (int)d[i];
    """
    for found in run(body, threads=32, size=128):
        np.testing.assert_array_equal(found.reshape(16, 8), a @ b + 1)
