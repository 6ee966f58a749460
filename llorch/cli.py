"""The `llorch` command: finds the command's module and turns errors into one or two lines and an exit status.

Only the standard library is imported here, so that `llorch --help` answers at once.

Exit status: 0 done, 1 an error llorch knows, 2 wrong usage or settings, 70 an error it does not know (a bug),
130 interrupted, 141 the reader of a pipe went away.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from llorch import __version__
from llorch.errors import KernelError, LlorchError, SettingsError

COMMANDS = {  # the name, with underscores, is also that of the module in llorch.commands
    "serve": "serve a model over HTTP",
    "run": "generate text from a prompt, streamed to the terminal",
    "chat": "chat with a model in the terminal",
    "providers": "list compute providers: what works here, what does not and why",
    "inspect": "show what is in a GGUF file and how much memory it needs",
    "bench": "measure prefill and decode speed against the machine's limit",
    "compare": "find the first value of a model that two providers compute differently",
    "new-provider": "write the package of a new compute provider, which passes the conformance suite",
    "completion": "print a script with which bash, zsh or fish completes all of this",
}

tracebacks = False  # set by --debug, wherever it stands, and by the setting `debug`


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    global tracebacks
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a model may say what an old locale cannot
    tracebacks = "--debug" in _before_separator(arguments)
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()  # a pipe that broke is noticed here, not in the interpreter's shutdown
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # what is still buffered would fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KernelError as error:  # its author wants to see more
        return _report(_with_hint(str(error)), 1)
    except LlorchError as error:
        return _report(str(error), 2 if isinstance(error, SettingsError) else 1)
    except Exception as error:  # noqa: BLE001  the last line of defence: a bug is reported, not swallowed
        name = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _report(_with_hint(name), 70)


def _dispatch(arguments: list[str]) -> int:
    flags: list[str] = []
    while arguments and arguments[0] == "--debug":
        flags.append(arguments.pop(0))
    if not arguments:
        print(_help(), file=sys.stderr)
        return 2
    command, *rest = arguments
    if command == "help" and rest:
        command, rest = rest[0], ["--help"]
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command == "--version":
        print(f"llorch {__version__}")
        return 0
    if command not in COMMANDS:
        raise SettingsError(_unknown(command))
    module = importlib.import_module(f"llorch.commands.{command.replace('-', '_')}")
    return int(module.main([*flags, *rest]))


def _unknown(command: str) -> str:
    what = "option" if command.startswith("-") else "command"
    close = difflib.get_close_matches(command, [*COMMANDS, "help", "--help", "--version", "--debug"], n=1)
    hint = f"did you mean {close[0]}?" if close else f"commands are {', '.join(COMMANDS)}."
    return f"unknown {what} {command!r}; {hint} See llorch --help"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "usage: llorch COMMAND [options]",
        "",
        "An LLM inference worker whose compute backend is a pip-installable plugin.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()),
        "",
        "options:",
        "  -h, --help  show this; after a command: its options, as `llorch help COMMAND` does",
        "  --version   show the version",
        "  --debug     show the traceback of an error",
        "",
        "Options may also be set as LLORCH_* variables or in llorch.toml in the working directory.",
    ]
    return "\n".join(lines)


def _before_separator(arguments: list[str]) -> list[str]:
    """The arguments before `--`, behind which everything is taken literally."""
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _report(message: str, status: int) -> int:
    """Called while an exception is handled."""
    if tracebacks:
        traceback.print_exc()
    print(f"{_red('llorch: error:')} {message}", file=sys.stderr)
    return status


def _with_hint(message: str) -> str:
    return message if tracebacks else f"{message}\nrun again with --debug for the traceback"


def _red(text: str) -> str:
    """Red where standard error is a terminal with colours, by the rules of the other commands."""
    if not sys.stderr.isatty() and not os.environ.get("FORCE_COLOR"):
        return text  # most errors: rich is not imported for them
    from rich.console import Console

    terminal = Console(stderr=True)
    with terminal.capture() as styled:
        terminal.print(text, style="bold red", end="", markup=False, highlight=False)
    return styled.get()
