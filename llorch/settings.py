"""Settings of the commands: each is one pydantic-settings field.

Its value comes from the command line (`--cache-type f16`), else the environment (`LLORCH_CACHE_TYPE=f16`), else
`llorch.toml` in the working directory (`cache_type = "f16"`), else the default.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import pydantic_settings as ps
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError
from pydantic_core import PydanticUndefined

from llorch import cli
from llorch.demo import DEMO_MODEL
from llorch.errors import SettingsError
from llorch.setting_errors import Origins, expected
from llorch.setting_sources import (
    CONFIG,
    ENV_PREFIX,
    TOML,
    TomlSource,
    check_variables,
    config_file,
    fields_of,
    suggest,
    variables,
)

_NONE = "\0"  # what pydantic-settings reads as None; a prompt or name may well be "null", but no argument holds a NUL
_METAVARS = {"int": "N", "float": "X", "str": "TEXT", "list[str]": "TEXT"}
_EPILOG = (
    f"An option is also an environment variable (--cache-type: {ENV_PREFIX}CACHE_TYPE) "
    f"and a key of {TOML} in the working directory (cache_type); the command line counts most, {TOML} least."
)


def _split(value: object) -> object:
    """`a,b` of a variable as a list; a JSON list where a value holds a comma. Options and llorch.toml give lists."""
    if not isinstance(value, str):
        return value
    if value.startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"expected values separated by commas, or a JSON list ({error})") from error
    return [item for item in value.split(",") if item]


def _memory(value: object) -> object:
    """Checks an amount of memory, which stays as it was written."""
    if value is not None:
        from llorch.providers.memory_limit import MemoryLimit

        MemoryLimit.parse(str(value))
    return value if value is None else str(value)


def _path(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("expected a path")
    return value


NamedPath = Annotated[Path, BeforeValidator(_path)]
"""A path that is not empty: pydantic takes "" for the working directory."""

GpuMemory = Annotated[str | None, BeforeValidator(_memory)]

StringList = Annotated[list[str], ps.NoDecode, BeforeValidator(_split)]
"""A repeatable option, `--stop A --stop B`, each value taken literally; `LLORCH_STOP=A,B` or a JSON list."""


class CommandSettings(ps.BaseSettings):
    """Base of every command's settings. The docstring of a subclass is the command's description in --help."""

    model_config = ps.SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_prefix_target="all",  # names given as validation_alias too
        cli_kebab_case=True,
        cli_implicit_flags="dual",
        cli_hide_none_type=True,
        cli_parse_none_str=_NONE,
        hide_input_in_errors=True,  # a traceback must not show a key
    )

    debug: bool = Field(False, description="show the traceback of an error")
    config: NamedPath | None = Field(None, description=f"file to read instead of {TOML} in the working directory")

    _origins: Origins | None = PrivateAttr(None)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[ps.BaseSettings],
        init_settings: ps.PydanticBaseSettingsSource,
        env_settings: ps.PydanticBaseSettingsSource,
        dotenv_settings: ps.PydanticBaseSettingsSource,
        file_secret_settings: ps.PydanticBaseSettingsSource,
    ) -> tuple[ps.PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlSource(settings_cls, {})

    @property
    def file(self) -> Path | None:
        """The file that was read; None where there was none."""
        return None if self._origins is None else self._origins.file

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Adds to a SettingsError, which may come long after the settings were read, where the setting was written."""
        try:
            yield
        except SettingsError as error:
            if self._origins is None or error.setting not in self.model_fields_set:
                raise
            raise SettingsError(self._origins.with_origin(error.setting, str(error))) from error


class ReportSettings(CommandSettings):
    """What every command that prints a report takes."""

    as_json: bool = Field(False, validation_alias="json", description="print JSON, for programs")


class ModelSettings(CommandSettings):
    """What every command that loads a model takes."""

    model: NamedPath = Field(
        DEMO_MODEL,
        description="GGUF file, or hf:OWNER/REPO[:FILE or QUANT] to download; a small demonstration model by default",
    )
    provider: str = Field("auto", description="compute provider; `llorch providers` lists them")
    device: str | None = Field(None, description="one of the provider's devices, its best by default")
    context: int | None = Field(None, ge=2, description="most tokens of a sequence, the model's own limit by default")
    cache_type: Literal["f32", "f16"] | None = Field(None, description="KV cache type, the provider's by default")
    cache_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of all sequences that the KV cache holds, by default those of every place, or what half of "
        "the free memory holds",
    )
    prefix_cache: bool = Field(True, description="share what is computed of prompts that begin alike")
    parallel: int = Field(8, ge=1, le=4096, description="sequences that run together")
    chunk: int = Field(512, ge=1, description="most prompt tokens of one step")
    threads: int | None = Field(None, ge=1, description="CPU threads, the provider's choice by default")
    gpu_memory: GpuMemory = Field(
        None, description="most of the GPU's memory to take, 20GiB or 90%; the cache gets what weights leave"
    )
    prefill_weights: Literal["half"] | None = Field(
        None, description="half: keep weights expanded beside the quantised ones, for faster prompts"
    )

    @property
    def is_demo(self) -> bool:
        """Whether no model was named, and the packaged one is taken."""
        return "model" not in self.model_fields_set

    def load_options(self) -> dict[str, Any]:
        """These settings as keywords of llorch.load, but for the model itself."""
        others = {"model", *CommandSettings.model_fields}
        return {name: getattr(self, name) for name in ModelSettings.model_fields if name not in others}


class ChatModelSettings(ModelSettings):
    """What every command takes that loads a model to talk with it."""

    chat_template: str | None = Field(
        None, description="jinja2 file, or the name of one of the model's templates, instead of its default"
    )

    def load_options(self) -> dict[str, Any]:
        return super().load_options() | {"chat_template": self.chat_template}


Settings = TypeVar("Settings", bound=CommandSettings)


def parse(settings: type[Settings], argv: Sequence[str], prog: str) -> Settings:
    """Reads a command's settings; `--help` prints and raises SystemExit(0).

    Raises SettingsError with a line for each of the first two mistakes: the setting as it was written, its value,
    and what is allowed.
    """
    parser, source = _prepared(settings, prog)
    try:
        source(args=list(argv))
        check_variables(settings, parser.given)
        origins = Origins(parser, argv, config_file(parser.config or os.environ.get(variables().get(CONFIG, ""))))
        keywords: dict[str, Any] = {"_cli_settings_source": source}  # unpacked, as type checkers know the fields alone
        found = settings(**keywords)
    except ValidationError as error:
        lines = [origins.explain(settings, details) for details in error.errors()]
        more = [f"and {len(lines) - 2} more"] if len(lines) > 2 else []
        raise SettingsError("\n".join(lines[:2] + more)) from error
    except ps.SettingsError as error:
        raise SettingsError(str(error)) from error
    found._origins = origins
    cli.tracebacks = cli.tracebacks or found.debug
    return found


def command_parser(command: str) -> argparse.ArgumentParser:
    """The parser of a command's options, for those who read it rather than parse with it."""
    module = importlib.import_module(f"llorch.commands.{command.replace('-', '_')}")
    settings = getattr(module, "".join(word.title() for word in command.split("-")) + "Settings")
    return _prepared(settings, f"llorch {command}")[0]


def _prepared(settings: type[CommandSettings], prog: str) -> tuple[CommandParser, ps.CliSettingsSource[Any]]:
    """A parser with the settings' options, and the source that reads settings through it."""
    parser = CommandParser(prog, settings.__doc__)
    source: ps.CliSettingsSource[Any] = ps.CliSettingsSource(
        settings,
        root_parser=parser,
        parse_args_method=CommandParser.parse_literally,
        add_argument_method=CommandParser.add_setting,
    )
    return parser, source


def assign(settings: CommandSettings, field: str, text: str) -> None:
    """Changes one setting to what a text says, as its variable would. Raises SettingsError with what is allowed."""
    try:
        settings.__pydantic_validator__.validate_assignment(settings, field, text)
    except ValidationError as error:
        info = type(settings).model_fields[field]
        raise SettingsError(f"{field}: {expected(info, error.errors()[0])}, not {text!r}") from error


class CommandParser(argparse.ArgumentParser):
    """argparse under pydantic-settings, with the project's errors and a help text without its type names."""

    def __init__(self, prog: str, description: str | None) -> None:
        self.names: dict[str, list[str]] = {}  # field: its options, or the positional's name
        self.given: set[str] = set()  # fields on the command line
        self.config: str | None = None  # the file that it names
        super().__init__(
            prog=prog, description=description, epilog=_EPILOG, allow_abbrev=False, formatter_class=_help_formatter
        )
        # a command's own options come first, those it shares with others below
        model, general = self.add_argument_group("model options"), self.add_argument_group("general options")
        self._groups = dict.fromkeys(fields_of(ChatModelSettings), model) | dict.fromkeys(
            fields_of(ReportSettings), general
        )

    def add_setting(self, *names: str, **kwargs: Any) -> argparse.Action:
        positional = not names[0].startswith("-")
        self.names[kwargs.get("dest", names[0])] = [kwargs["metavar"]] if positional else list(names)
        for nothing in (_NONE, "False", "[]", str(DEMO_MODEL)):
            kwargs["help"] = kwargs["help"].replace(f" (default: {nothing})", "")
        if positional:
            kwargs["nargs"] = "?"  # it may come from the environment; pydantic says where it is missing
        elif "metavar" in kwargs:
            metavar = kwargs["metavar"]
            kwargs["metavar"] = _METAVARS.get(metavar, metavar if "{" in metavar else metavar.upper())
        group = self if positional else self._groups.get(kwargs["dest"], self)
        return group.add_argument(*names, **kwargs)

    def parse_literally(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """Repeated options become JSON: pydantic-settings would split at commas, strip spaces and read escapes."""
        found = self.parse_args(args, namespace)
        self.given = {name for name, value in vars(found).items() if value is not PydanticUndefined}
        self.config = getattr(found, CONFIG) if CONFIG in self.given else None
        for name, value in vars(found).items():
            if isinstance(value, list):
                setattr(found, name, json.dumps(value))
        return found

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown == message:
            raise SettingsError(f"{message.removeprefix('argument ')}. See {self.prog} --help")
        first = unknown.split()[0].split("=")[0]
        if not first.startswith("-"):
            raise SettingsError(f"unexpected argument {first!r}. See {self.prog} --help")
        options = [name for names in self.names.values() for name in names]
        hint = suggest(first, options) or "."
        raise SettingsError(f"unknown option {first}{hint} See {self.prog} --help")


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=32)
