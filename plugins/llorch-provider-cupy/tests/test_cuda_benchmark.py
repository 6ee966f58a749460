"""benchmarks/gpu.py from end to end over the emulated card: every measurement runs, what it prints is whole.

Its figures mean nothing there. PyTorch's part is left out: it is no dependency of the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NO_COMPILER
from emulator.runtime import compiler

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu.py"
SMALL = "--shape tiny --context 24 --prompt 32 --sequences 3 --steps 2 --passes 1 --size 64 --without-torch"


@pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)
def test_the_whole_benchmark_runs(site: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(site), str(Path(__file__).parent)])
    result = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--provider", "cuda-emulated", *SMALL.split()]
    command += ["--models", str(tmp_path), "--json", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "failed" not in done.stderr
    found = json.loads(result.read_text())
    assert found.keys() == {"rates", "Q4_0", "Q8_0", "F16", "together"}
    assert all(found[kind][test] > 0 for kind in ("Q4_0", "Q8_0", "F16") for test in ("decode", "prefill"))
    steps = found["Q4_0"]["steps"]
    assert {label: count for label, (_, count) in steps.items() if count > 1} == dict.fromkeys(
        ("attn_norm", "attn_q", "q_rope", "attention", "attn_output", "ffn_norm", "ffn_swiglu", "ffn_down"), 2
    )
    for line in ("decode 1 at 24", "prefill 32", "decode 3 at 24", "a decode step, planned and measured", "ffn_swiglu"):
        assert line in done.stdout
