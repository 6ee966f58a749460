"""`llorch completion SHELL`: a script with which a shell completes commands, options and their values by itself.

It calls no llorch, so that a press of Tab costs nothing. The names of providers are those installed when it is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, Literal, cast, get_args

from pydantic import Field
from pydantic_settings import CliPositionalArg

from llorch import cli
from llorch.settings import CommandSettings, command_parser, parse

Shell = Literal["bash", "zsh", "fish"]


class CompletionSettings(CommandSettings):
    """Print a completion script. In ~/.bashrc: eval "$(llorch completion bash)"; in ~/.zshrc, behind compinit:
    eval "$(llorch completion zsh)"; in ~/.config/fish/config.fish: llorch completion fish | source."""

    shell: CliPositionalArg[Shell] = Field(description="bash, zsh or fish", examples=["bash"])


def main(argv: Sequence[str]) -> int:
    settings = parse(CompletionSettings, argv, "llorch completion")
    print(script(settings.shell))
    return 0


def script(shell: Shell) -> str:
    """The script of a shell, with every command and option of this version."""
    import shtab  # here, with the rest that --help has no need of

    return str(shtab.complete(_parser(), shell))


def _parser() -> argparse.ArgumentParser:
    """All commands as one argparse parser, whose actions say what may stand behind them."""
    root = argparse.ArgumentParser("llorch")
    root.add_argument("--version", action="store_true", help="show the version")
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    made = cast(type[argparse.ArgumentParser], _command)  # argparse only calls it
    commands = root.add_subparsers(dest="command", metavar="COMMAND", parser_class=made)
    for name, summary in {**cli.COMMANDS, "help": "show the options of a command"}.items():
        commands.add_parser(name, help=summary)
    return root


def _command(*, prog: str, **_keywords: Any) -> argparse.ArgumentParser:
    """The parser of one command, as add_parser asks for it."""
    name = prog.split()[-1]
    if name == "help":
        parser = argparse.ArgumentParser(prog)
        parser.add_argument("name", nargs="?", choices=list(cli.COMMANDS))
        return parser
    parser, values, completers = command_parser(name), _values(), _completers()
    parser.description = cli.COMMANDS[name]  # what fish shows beside the name
    for action in parser._actions:
        if action.dest in completers:
            action.complete = completers[action.dest]  # type: ignore[attr-defined]  # where shtab looks for it
        elif action.dest in values:
            action.choices = values[action.dest]
        elif isinstance(action.metavar, str) and action.metavar.startswith("{"):
            action.choices = action.metavar.strip("{}").split(",")
    return parser


def _values() -> dict[str, Sequence[str]]:
    """What may stand behind an option, by its field."""
    # the group's name is that in llorch.providers.registry, whose import takes longer than all of this
    providers = sorted(entry_points(group="llorch.providers").names)
    return {"provider": ["auto", *providers], "shell": get_args(Shell)}


def _completers() -> dict[str, Any]:
    """What shtab completes by looking at files, by field."""
    import shtab

    models = shtab.glob("*.gguf", "*.GGUF")
    return {"model": models, "chat_template": shtab.FILE, "path": shtab.DIRECTORY}
