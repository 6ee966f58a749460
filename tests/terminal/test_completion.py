"""Shell completion, asked of a real bash."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llorch import cli
from llorch.commands import completion
from llorch.settings import command_parser

Complete = Callable[..., list[str]]

# what bash does at Tab: the words so far, the last of them unfinished
ASK = """
source "$1"; shift
COMP_WORDS=(llorch "$@"); COMP_CWORD=$#; COMP_LINE="${COMP_WORDS[*]}"; COMP_POINT=${#COMP_LINE}
_shtab_llorch
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash() -> str:
    found = shutil.which("bash")
    if found is None:
        pytest.skip("there is no bash on this machine")
    return found


@pytest.fixture(scope="module")
def complete(bash: str, tmp_path_factory: pytest.TempPathFactory) -> Complete:
    folder = tmp_path_factory.mktemp("completion")
    (folder / "llorch.bash").write_text(completion.script("bash"))
    (folder / "small.gguf").touch()
    (folder / "notes.txt").touch()

    def complete(*words: str) -> list[str]:
        # an empty PATH: completing runs no program, llorch and Python neither
        done = subprocess.run(
            [bash, "--norc", "-c", ASK, "ask", str(folder / "llorch.bash"), *words],
            cwd=folder,
            env={"PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stderr.replace("bash: compopt: not currently executing completion function\n", "") == ""
        return done.stdout.split()

    return complete


def test_commands(complete: Complete) -> None:
    assert complete("") == [*cli.COMMANDS, "help"]
    assert complete("ch") == ["chat"]
    assert complete("zzz") == []


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_options_of_every_command(complete: Complete, command: str) -> None:
    options = [name for action in command_parser(command)._actions for name in action.option_strings]
    assert complete(command, "--") == [name for name in options if name.startswith("--")]
    assert len(options) > 2


def test_values(complete: Complete) -> None:
    assert complete("serve", "--log-level", "") == ["debug", "info", "warning", "error"]
    assert complete("run", "--provider", "numpy") == ["numpy-cpu"]
    assert complete("chat", "--provider", "a") == ["auto"]
    assert complete("completion", "") == ["bash", "zsh", "fish"]
    assert complete("help", "pro") == ["providers"]


def test_model_files(complete: Complete) -> None:
    assert complete("inspect", "") == ["small.gguf"]
    assert complete("run", "Once", "--model", "sm") == ["small.gguf"]


@pytest.mark.parametrize(("shell", "check"), [("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute")])
def test_every_script_is_well_formed(shell: completion.Shell, check: str, tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(completion.script(shell))
    assert all(f"{command}" in path.read_text() for command in cli.COMMANDS)
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} on this machine to read it")
    subprocess.run([shell, check, str(path)], timeout=60, check=True)
