"""The `llorch` command: dispatch, errors and their status, reports for people and programs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from llorch import __version__, cli
from llorch.commands import inspect
from llorch.errors import GGUFError, KernelError, LlorchError, SettingsError
from tests.support import shared


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


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help"]) == 0
    assert capsys.readouterr().out.startswith("usage: llorch COMMAND")
    with pytest.raises(SystemExit):
        cli.main(["help", "inspect"])
    assert capsys.readouterr().out.startswith("usage: llorch inspect")
    assert cli.main(["help", "inspct"]) == 2
    assert "did you mean inspect?" in capsys.readouterr().err


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
        (KernelError("rope raised"), 1, ["llorch: error: rope raised", "run again with --debug for the traceback"]),
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


def test_the_label_of_an_error_is_red_where_there_are_colours(
    failing: list[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(LlorchError("it broke [mend it]"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    cli.main(["providers"])
    assert capsys.readouterr().err == "\x1b[1;31mllorch: error:\x1b[0m it broke [mend it]\n"
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(["providers"])
    assert "\x1b[31m" not in capsys.readouterr().err


def test_what_a_locale_cannot_say_is_spelt_out() -> None:
    code = "from llorch.cli import main; main(['--version']); print('caf\u00e9 \U0001f600')"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=env)
    assert done.stdout.splitlines()[1] == "caf\\xe9 \\U0001f600"


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
    assert report["tokenizer"] == {"model": "llama", "kind": "sentencepiece", "pre": None, "vocab_size": 512}
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
