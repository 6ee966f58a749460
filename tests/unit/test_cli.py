"""The `llorch` command: dispatch, errors and their status, reports for people and programs."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from llorch import __version__, cli, machine
from llorch.commands import bench, inspect, providers, run
from llorch.errors import GGUFError, LlorchError, SettingsError
from tests.support import shared
from tests.unit.plugins import install, source


@pytest.fixture(autouse=True)
def _no_settings_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "tracebacks", False)
    for name in os.environ:
        if name.upper().startswith("LLORCH_"):
            monkeypatch.delenv(name)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """`llorch providers` raises what is put in here."""
    errors: list[BaseException] = []

    def main(argv: Sequence[str]) -> int:
        raise errors[0]

    module = ModuleType("llorch.commands.providers")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llorch.commands.providers", module)
    return errors


def llorch(*argv: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llorch", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **kwargs)  # type: ignore[call-overload,no-any-return]


def model() -> str:
    return str(shared("models", "stories260K.gguf"))


# ---- dispatch ----


def test_help_lists_the_commands_within_400_ms() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = llorch("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
    for command, summary in cli.COMMANDS.items():
        assert command in done.stdout
        assert summary in done.stdout
    assert statistics.median(seconds) < 0.4


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from llorch.cli import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"numpy", "pydantic", "rich", "litestar"} & set(done.stdout.split())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_without_numpy(command: str) -> None:
    code = f"import sys; from llorch.cli import main\ntry: main([{command!r}, '--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert f"usage: llorch {command}" in done.stdout
    assert "numpy" not in done.stdout.splitlines()[-1].split()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llorch {__version__}\n"


def test_no_command_shows_the_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: llorch COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("prviders", "unknown command 'prviders'; did you mean providers? See llorch --help"),
        ("--verson", "unknown option '--verson'; did you mean --version? See llorch --help"),
        ("xyz", f"unknown command 'xyz'; commands are {', '.join(cli.COMMANDS)}. See llorch --help"),
    ],
)
def test_an_unknown_command_gives_a_suggestion(argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([argv]) == 2
    assert capsys.readouterr().err == f"llorch: error: {message}\n"


# ---- errors and status ----


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (LlorchError("it broke: mend it"), 1, ["llorch: error: it broke: mend it"]),
        (GGUFError("no such file"), 1, ["llorch: error: no such file"]),
        (SettingsError("--port: no"), 2, ["llorch: error: --port: no"]),
        (
            ZeroDivisionError("oh"),
            70,
            ["llorch: error: ZeroDivisionError: oh", "run again with --debug for the traceback"],
        ),
        (AssertionError(), 70, ["llorch: error: AssertionError", "run again with --debug for the traceback"]),
        (KeyboardInterrupt(), 130, []),
    ],
)
def test_an_error_is_one_or_two_lines_and_a_status(
    failing: list[BaseException],
    error: BaseException,
    status: int,
    lines: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing.append(error)
    assert cli.main(["providers"]) == status
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("argv", [["--debug", "providers"], ["providers", "--debug"]])
def test_debug_anywhere_shows_the_traceback(
    failing: list[BaseException], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(LlorchError("it broke"))
    assert cli.main(argv) == 1
    captured = capsys.readouterr().err
    assert "Traceback (most recent call last)" in captured
    assert captured.endswith("llorch: error: it broke\n")


def test_debug_behind_a_separator_is_text(failing: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    failing.append(LlorchError("it broke"))
    assert cli.main(["providers", "--", "--debug"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_broken_pipe_is_quiet() -> None:
    # the reader is gone before the first line
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "llorch", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_bad_option_ends_the_process_with_2() -> None:
    done = llorch("providers", "--jsn")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "llorch: error: unknown option --jsn; did you mean --json? See llorch providers --help\n"


def test_without_a_model_the_demonstration_runs_and_says_how_to_bring_a_real_one() -> None:
    done = llorch("run", "Once upon a time", "--provider", "numpy-cpu", "--max-tokens", "8")
    assert done.returncode == 0
    assert done.stdout.strip()
    assert "no --model was given: this is llorch-demo" in done.stderr
    assert "--model PATH" in done.stderr


def test_a_named_model_is_no_demonstration() -> None:
    done = llorch("run", "Once", "--model", model(), "--provider", "numpy-cpu", "--max-tokens", "2")
    assert done.returncode == 0
    assert "no --model was given" not in done.stderr


def test_an_unknown_provider_ends_with_1_and_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "Once", "--model", model(), "--provider", "numpy"]) == 1
    assert "Did you mean numpy-cpu?" in capsys.readouterr().err


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
    done = llorch("providers", "--json")
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
    done = llorch("providers")
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


# ---- inspect ----


def test_inspect_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([model(), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["architecture"] == "llama"
    assert report["hyperparameters"]["n_kv_heads"] == 4
    assert report["tensors"] == {
        "count": 47,
        "parameters": 260032,
        "bytes": 1040128,
        "by_type": [{"type": "F32", "count": 47, "parameters": 260032, "bytes": 1040128}],
    }
    assert report["tokenizer"] == {"model": "llama", "kind": "sentencepiece", "vocab_size": 512}
    # keys and values of 5 layers, 4 heads of 8, 512 tokens
    assert report["memory"]["kv_cache"] == [
        {"context": 512, "f32": 2 * 5 * 4 * 8 * 512 * 4, "f16": 2 * 5 * 4 * 8 * 512 * 2}
    ]
    assert report["problems"] == []


def test_inspect_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([model()]) == 0
    text = capsys.readouterr().out
    for part in ("stories260K: llama", "n_layers", "F32", "260,032", "sentencepiece, 512 tokens", "640.0 KiB"):
        assert part in text
    assert "cannot serve" not in text


def test_inspect_tells_what_it_can_of_a_model_that_is_not_served(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(shared("vocabs", "ggml-vocab-qwen2.gguf"))
    assert inspect.main([path]) == 0
    text = capsys.readouterr().out
    assert "qwen2: qwen2" in text
    assert "cannot serve it" in text
    assert "151,936 tokens" in text


def test_inspect_of_something_else_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.gguf").write_text("dear diary")
    assert cli.main(["inspect", str(tmp_path / "notes.gguf")]) == 1
    assert capsys.readouterr().err.startswith("llorch: error: ")
    assert cli.main(["inspect", str(tmp_path / "absent.gguf")]) == 1


# ---- run ----


def test_run_streams_the_text_to_stdout_and_the_rest_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    argv = [
        "Once upon a time",
        "--model",
        model(),
        "--provider",
        "numpy-cpu",
        "--max-tokens",
        "8",
        "--temperature",
        "0",
    ]
    assert run.main(argv) == 0
    captured = capfd.readouterr()
    assert captured.out == ", there was a little girl named L"[: len(captured.out)]
    assert len(captured.out) > 10
    first, *_, last = captured.err.splitlines()
    assert first.startswith("provider numpy-cpu on cpu")
    assert first.endswith("chosen by name")
    assert "tokens, the first after" in last


def test_run_takes_sampling_settings_and_stops(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["Once upon a time", "--model", model(), "--provider", "numpy-cpu", "-n", "60"]
    sampling = ["--temperature", "0.9", "--top-k", "20", "--top-p", "0.9", "--min-p", "0.01", "--seed", "7"]
    run.main([*argv, *sampling, "--repetition-penalty", "1.1"])
    once = capfd.readouterr().out
    run.main([*argv, *sampling, "--repetition-penalty", "1.1"])
    assert capfd.readouterr().out == once
    word = once.split()[4]
    run.main([*argv, *sampling, "--repetition-penalty", "1.1", "--stop", word])
    assert capfd.readouterr().out == once[: once.index(word)]


def test_run_reads_a_prompt_from_standard_input() -> None:
    argv = ["run", "-", "--model", model(), "--provider", "numpy-cpu", "-n", "4", "--temperature", "0"]
    assert llorch(*argv, input="Once upon a time").stdout == ", there was a"


def test_run_ends_cleanly_when_interrupted() -> None:
    argv = ["run", "Once", "--model", model(), "--provider", "numpy-cpu", "-n", "500", "--temperature", "0"]
    command = [sys.executable, "-m", "llorch", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in errors


def test_run_is_quiet_when_its_reader_leaves() -> None:
    argv = ["run", "Once", "--model", model(), "--provider", "numpy-cpu", "-n", "500", "--temperature", "0"]
    command = [sys.executable, "-m", "llorch", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(4)
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert "Error" not in errors


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
