"""The commands of docs/gpu-status.md: over the emulated card, and on a real one where there is one.

Figures of the emulated card mean nothing; what is shown is that the commands run and that what they print is whole. The
page's second and third block, wheels for a machine without a network, are run in tests/packages.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llorch.errors import LlorchError
from llorch.providers import registry
from tests.snippets import Reader, blocks_of
from tests.support import ROOT

PAGE = ROOT / "docs" / "gpu-status.md"
EMULATOR = ROOT / "plugins" / "llorch-provider-cupy" / "tests" / "emulator"
SMALL = "--provider cuda-emulated --shape tiny --context 24 --prompt 32 --sequences 3 --steps 2 --passes 1 --size 64"
IN_A_LAYER = ("attn_norm", "attn_q", "attention", "attn_output", "ffn_norm", "ffn_swiglu", "ffn_down")


def scripts() -> list[str]:
    found = [text for language, text in blocks_of(PAGE) if language == "sh"]
    assert len(found) == 4, "a block of the page that no test knows"
    return found


FIRST_RUN, MAKE_WHEELS, FROM_WHEELS, WHAT_IS_OFF = scripts()


def put_emulator(folder: Path) -> None:
    """The emulated provider as an installed one, for processes that have the folder on their path."""
    if shutil.which("g++") is None:
        pytest.skip("the emulated card needs g++: apt install g++")
    (folder / "emulator").symlink_to(EMULATOR)
    info = folder / "cuda_emulated-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cuda-emulated\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[llorch.providers]\ncuda-emulated = emulator.provider:provider\n")


def why_no_card() -> str | None:
    try:
        registry.choose("cupy-cuda")[0].devices()
    except LlorchError as error:
        return str(error)
    return None


@pytest.fixture
def cloner(tmp_path: Path) -> Iterator[Reader]:
    """In a clone of the repository; what would go beside it goes into a folder."""
    found = Reader(ROOT, tmp_path)
    found.environment |= {"TMPDIR": str(tmp_path)}  # where the benchmark's models go
    yield found
    found.close()


@pytest.mark.parametrize("text", [FIRST_RUN, WHAT_IS_OFF], ids=["first run", "what is off"])
def test_without_a_card_the_commands_end_with_the_reason(cloner: Reader, text: str) -> None:
    if (reason := why_no_card()) is None:
        pytest.skip("there is a card: the commands run")
    status, said = cloner.script_status(text, {"RESULTS": str(cloner.scratch)})
    assert status == 1
    assert said.splitlines()[-1] == f"no card can be used, nothing else is tried: {reason}"


def test_the_commands_run_over_the_emulated_card(cloner: Reader) -> None:
    put_emulator(cloner.scratch)
    cloner.environment |= {"PROVIDER": "cuda-emulated", "PARTS": "providers rope compare_one_token text"}
    variables = {"RESULTS": str(cloner.scratch / "results"), "SIZES": f"{SMALL} --without-torch"}
    status, said = cloner.script_status(FIRST_RUN, variables)
    assert status == 0, said
    assert [line.split()[:2] for line in said.splitlines() if line.startswith("ok ")] == [
        ["ok", "providers"], ["ok", "rope"], ["ok", "compare_one_token"], ["ok", "text"],
    ]  # fmt: skip
    assert "0 parts failed" in said
    found = json.loads((cloner.scratch / "results" / "gpu.json").read_text())
    assert found.keys() == {"rates", "Q4_0", "Q8_0", "F16", "together"}
    assert all(found[kind][test] > 0 for kind in ("Q4_0", "Q8_0", "F16") for test in ("decode", "prefill"))
    steps = found["Q4_0"]["steps"]
    assert {label: count for label, (_, count) in steps.items() if count > 1} == dict.fromkeys(IN_A_LAYER, 2)
    for line in ("decode 1 at 24", "prefill 32", "decode 3 at 24", "a decode step, planned and measured", "ffn_swiglu"):
        assert line in said


def test_a_misspelt_part_does_not_pass_for_one_that_is_right(cloner: Reader) -> None:
    put_emulator(cloner.scratch)
    cloner.environment |= {"PROVIDER": "cuda-emulated"}
    status, said = cloner.script_status(WHAT_IS_OFF, {"RESULTS": str(cloner.scratch / "results"), "PARTS": "attenton"})
    assert status == 1
    assert said.splitlines()[-2:] == ["FAILED attenton: there is no such part here", "1 parts failed: attenton"]


@pytest.mark.parametrize("text", [FIRST_RUN, WHAT_IS_OFF], ids=["first run", "what is off"])
def test_the_commands_run_on_a_card(cloner: Reader, text: str) -> None:
    if (reason := why_no_card()) is not None:
        pytest.skip(f"no CUDA device: {reason}")
    sizes = os.environ.get("SIZES", "--shape tinyllama --without-torch")
    cloner.script(text, {"RESULTS": str(cloner.scratch), "SIZES": sizes})
