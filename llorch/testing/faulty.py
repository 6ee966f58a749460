"""The provider `faulty`: numpy-cpu that fails when it is told to. No list shows it, and `auto` never takes it.

LLORCH_FAULTS holds faults, separated by commas, each `KIND@STEP` or `KIND#TOKEN`: in that step of the device, counted
from 1 when it is opened and once each, or in every step that holds that token. Kinds:

    raise       a kernel raises
    die         a kernel ends its thread (SystemExit)
    memory      the device is out of memory
    stall=S     a kernel does not return for S seconds
    nan         keys, values and logits of a token are NaN: with a token, of the sequence that holds it; with a step, of
                the last token in it
    pace=S      a kernel takes S seconds for each token of the step (KIND alone: in every step)

For example `LLORCH_FAULTS=raise@40,memory#300`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llorch.providers import DeviceMemoryError, EmbedSpec, Kernel, hookimpl
from llorch.providers.numpy_cpu import NumpyOps, NumpyProvider

VARIABLE = "LLORCH_FAULTS"
KINDS = ("raise", "die", "memory", "stall", "nan", "pace")
_FAULT = re.compile(r"(?P<kind>[a-z]+)(=(?P<seconds>[0-9.]+))?(@(?P<step>[0-9]+)|#(?P<token>[0-9]+))?")


class InjectedError(RuntimeError):
    """A failure that was asked for."""


@dataclass(frozen=True)
class Fault:
    kind: str
    seconds: float = 0.0
    step: int | None = None
    token: int | None = None

    def meets(self, step: int, tokens: Any) -> bool:
        if self.step is None and self.token is None:
            return True
        return step == self.step or (self.token is not None and self.token in tokens)


def parse(text: str) -> list[Fault]:
    """Raises ValueError for what is no fault."""
    faults = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _FAULT.fullmatch(part)
        if match is None or match["kind"] not in KINDS:
            raise ValueError(f"{VARIABLE}: {part!r} is no fault: write KIND@STEP or KIND#TOKEN, of {', '.join(KINDS)}")
        numbers = {name: None if match[name] is None else int(match[name]) for name in ("step", "token")}
        faults.append(Fault(match["kind"], float(match["seconds"] or 0), numbers["step"], numbers["token"]))
    return faults


class FaultyOps(NumpyOps):
    """Faults happen in the first operation of a step: the lookup of its tokens."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults, self._step = faults, 0

    @hookimpl
    def embed(self, spec: EmbedSpec) -> Kernel:
        plain = super().embed(spec)

        def kernel(out: Any, tokens: Any, table: Any) -> None:
            self._step += 1
            plain(out, tokens, table)
            for fault in self._faults:
                if fault.meets(self._step, tokens):
                    self._happen(fault, out, tokens)

        return kernel

    def _happen(self, fault: Fault, out: Any, tokens: Any) -> None:
        match fault.kind:
            case "raise":
                raise InjectedError(f"the kernel was told to raise in step {self._step}")
            case "die":
                raise SystemExit(f"the kernel was told to end its thread in step {self._step}")
            case "memory":
                raise DeviceMemoryError(f"the device was told to be out of memory in step {self._step}")
            case "stall":
                time.sleep(fault.seconds)
            case "pace":
                time.sleep(fault.seconds * len(tokens))
            case "nan" if fault.token is None:
                out[-1] = float("nan")
            case "nan":
                out[tokens == fault.token] = float("nan")


class FaultyProvider(NumpyProvider):
    name = "faulty"
    summary = "numpy-cpu with faults, for tests"
    priority = -1

    def operations(self) -> FaultyOps:
        return FaultyOps(parse(os.environ.get(VARIABLE, "")))


provider = FaultyProvider()
