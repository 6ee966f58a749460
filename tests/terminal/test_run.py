"""`llorch run`: the text, how it is chosen, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llorch.commands import run
from tests.terminal.terminal import finished, llorch, model, screen


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
    assert finished(*argv, input="Once upon a time").stdout == ", there was a"


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


def test_run_on_a_terminal_keeps_words_whole(tmp_path: Path) -> None:
    argv = ["Once upon a time", "--model", model(), "--provider", "numpy-cpu", "-n", "60", "--temperature", "0"]
    text = finished("run", *argv).stdout
    with llorch(tmp_path, "run", *argv, columns=40) as terminal:
        assert terminal.wait() == 0
    lines = screen(terminal.raw)
    first = next(i for i, line in enumerate(lines) if line.startswith(text[:10]))
    last = next(i for i, line in enumerate(lines) if line.startswith("60 tokens"))
    assert " ".join(lines[first:last]).split() == text.split()
    assert all(len(line) < 40 for line in lines[first:last])
