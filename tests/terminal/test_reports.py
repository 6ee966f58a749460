"""`llorch providers` and `llorch bench`: reports for people and for programs."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from llorch import machine
from llorch.commands import bench, providers
from llorch.errors import SettingsError
from tests.terminal.terminal import finished, model
from tests.unit.plugins import install, source

# ---- providers ----


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each state."""
    site = tmp_path / "site"
    site.mkdir()
    install(site, "cli-fast", source("cli-fast", priority=99))
    install(site, "cli-card", source("cli-card", devices="raise ProviderUnavailableError('no card: plug one in')"))
    install(site, "cli-crash", "import no_such_vendor_library")
    install(site, "cli-newer", "class P:\n    api_version = 99\n\nprovider = P()\n")
    install(site, "cli-twin", source("cli-twin"), distribution="cli-twin-a")
    install(site, "cli-twin", source("cli-twin"), distribution="cli-twin-b", version="2.0")
    monkeypatch.setenv("PYTHONPATH", str(site))


@pytest.mark.usefixtures("plugins")
def test_providers_json_has_every_state() -> None:
    done = finished("providers", "--json")
    assert done.returncode == 0
    found = {row["name"]: row for row in json.loads(done.stdout)}
    states = {name: row["state"] for name, row in found.items() if name == "numpy-cpu" or name.startswith("cli-")}
    assert states == {
        "numpy-cpu": "ok",
        "cli-fast": "ok",
        "cli-card": "absent",
        "cli-crash": "broken",
        "cli-newer": "broken",
        "cli-twin": "broken",
    }
    assert found["cli-fast"]["devices"] == [{"name": "dev:0", "description": "a device", "memory_architecture": "cpu"}]
    assert found["cli-card"]["reason"] == "no card: plug one in"
    assert "no_such_vendor_library" in found["cli-crash"]["reason"]


@pytest.mark.usefixtures("plugins")
def test_providers_table_has_every_state_and_no_colour_in_a_pipe() -> None:
    done = finished("providers")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    for text in ("cli-fast", "no card: plug one in", "no_such_vendor_library", "provider API 99", "cli-twin-b 2.0"):
        assert text in done.stdout


def test_colours_follow_no_color(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    providers.main([])
    assert "\x1b[32m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    providers.main([])
    assert "\x1b[32m" not in capsys.readouterr().out


# ---- bench ----


def test_bench_json_is_one_object_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "MATRIX_ROWS", 64)
    argv = ["--model", model(), "--provider", "numpy-cpu,numpy-cpu", "-p", "16", "-n", "8", "-r", "3", "--json"]
    assert bench.main(argv) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["test"] for row in rows] == ["pp16", "tg8"] * 2
    for row in rows:
        assert (row["provider"], row["device"], row["model"]) == ("numpy-cpu", "cpu", "stories260K")
        assert row["repetitions"] == len(row["samples"]) == 3
        assert row["tokens_per_second"] == sorted(row["samples"])[1]
        assert row["stdev"] == pytest.approx(statistics.stdev(row["samples"]))
        assert row["load_seconds"] > 0
        assert row["bandwidth_gb_s"] == max(row["read_gb_s"], row["matvec_gb_s"]) > 0
    prefill, decode, *_ = rows
    assert prefill["limit_tokens_per_second"] is None
    # all matrices but the embedding table, which is tied here and so is one of them
    assert decode["bytes_per_token"] == pytest.approx(1040128, rel=0.02)
    limit = decode["bandwidth_gb_s"] * 1e9 / decode["bytes_per_token"]
    assert decode["limit_tokens_per_second"] == pytest.approx(limit)
    assert decode["share_of_limit"] == pytest.approx(decode["tokens_per_second"] / limit)


def test_bench_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "MATRIX_ROWS", 64)
    assert bench.main(["--model", model(), "--provider", "numpy-cpu", "-p", "4", "-n", "4", "-r", "1"]) == 0
    text = capsys.readouterr().out
    for part in ("numpy-cpu", "pp4", "tg4", "tokens/s", "memory reads", "the limit is"):
        assert part in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-p", "513"], "-p is 513, the model's context is 512: give a smaller -p"),
        (["-n", "513"], "-n is 513, the model's context is 512: give a smaller -n"),
        (["--context", "64"], "-p is 512, --context is 64: give a smaller -p"),
        (["-p", "0", "-n", "0"], "-p and -n are both 0: there is nothing to measure"),
        (["--provider", ","], "--provider: expected names separated by commas, not ','"),
    ],
)
def test_bench_says_what_cannot_be_measured(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        bench.main(["--model", model(), *argv])
    assert str(caught.value) == message


def test_peak_memory_counts_from_the_reset() -> None:
    if machine.peak_memory() is None:
        pytest.skip("this system does not tell a process its peak memory")
    # in a process of its own: the system may take pages of a large one away meanwhile
    code = """
from llorch import machine
machine.reset_peak_memory()
before = machine.peak_memory()
block = b"x" * (64 << 20)
print((machine.peak_memory() - before) >> 20)
del block
machine.reset_peak_memory()
print((machine.peak_memory() - before) >> 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with_block, after_reset = map(int, done.stdout.split())
    assert with_block >= 48
    assert after_reset < 32
