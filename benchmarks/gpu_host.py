"""What the host does for a decode step of cupy-cuda: the whole engine over a card that does nothing. Needs no GPU.

    python benchmarks/gpu_host.py [model.gguf] [--sequences 64]

CUDA's own calls come on top of it. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llorch_provider_cupy.device import CudaDevice
from llorch_provider_cupy.placed import Operations
from llorch_provider_cupy.runtime import Properties

import llorch
from llorch.core.requests import Request, SamplingParams
from llorch.providers import API_VERSION, DeviceInfo, registry

DEMO = Path(llorch.__file__).with_name("demo") / "llorch-demo.gguf"
INFO = DeviceInfo("idle:0", "a card that does nothing", "cuda")


class IdleMemory:
    def __init__(self, nbytes: int) -> None:
        self._memory = np.empty(nbytes, np.uint8)
        self.address, self.nbytes = self._memory.ctypes.data, nbytes

    def release(self) -> None:
        """It goes with this object."""


class IdleRuntime:
    """`Runtime` whose work is done at once, as nothing; what is read from it are always the same candidates."""

    properties = Properties("idle", (9, 0), 132, 1)

    def allocate(self, nbytes: int) -> IdleMemory:
        return IdleMemory(nbytes)

    def send(self, address: int, host: np.ndarray) -> None:
        host.copy()  # as into a staging buffer

    def download(self, host: np.ndarray, address: int) -> None:
        host[...] = np.arange(host.shape[-1], 0, -1) + 300

    def function(self, program: Any, name: str) -> str:
        return name

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return lambda: None

    def memory(self) -> tuple[int, int]:
        return 80 << 30, 80 << 30

    def _nothing(self, *_args: Any) -> None:
        pass

    upload = copy = transfer = launch = gemm = close = _nothing


class IdleProvider:
    name, summary, requires = "idle", "cupy-cuda over a card that does nothing", "nothing"
    api_version, priority, batch_invariant, rounds_activations = API_VERSION, 0, False, True

    def devices(self) -> list[DeviceInfo]:
        return [INFO]

    def open(self, device: str | None = None, options: Any = None) -> CudaDevice:
        return CudaDevice(IdleRuntime(), INFO)  # type: ignore[arg-type]

    def operations(self) -> Operations:
        return Operations()


def step_seconds(llm: llorch.LLM, sequences: int, tokens: int) -> float:
    """Of one step of so many sequences that decode."""
    engine = llm.engine()
    sampling = SamplingParams(temperature=0.0)
    for i in range(sequences):
        request = Request(job_id=str(i), prompt=(1, 300 + i), max_tokens=tokens, ignore_eos=True, sampling=sampling)
        engine.submit(request, lambda _event: None)
    for _ in range(4):  # the prompts, and what is recorded at first
        engine.step()
    steps, begin = 0, time.perf_counter()
    while engine.step():
        steps += 1
    return (time.perf_counter() - begin) / steps


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    registry.choose = lambda _name: (IdleProvider(), "there is no card in it")  # type: ignore[assignment,return-value]
    with llorch.load(arguments.model, parallel=arguments.sequences) as llm:
        for sequences in sorted({1, arguments.sequences}):
            found = [step_seconds(llm, sequences, arguments.tokens) for _ in range(arguments.rounds)]
            low, middle, high = (1e6 * each for each in (min(found), statistics.median(found), max(found)))
            print(f"{sequences:>3} sequences: {middle:.0f} us a step ({low:.0f} to {high:.0f})")


if __name__ == "__main__":
    main()
