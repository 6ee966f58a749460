"""Where settings come from beside the command line: variables of the environment, and llorch.toml."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args

import pydantic_settings as ps
from pydantic.fields import FieldInfo

from llorch import cli
from llorch.errors import SettingsError

ENV_PREFIX = "LLORCH_"
TOML = "llorch.toml"
CONFIG = "config"  # the setting that names another file
# of llorch.testing.faulty, of the tests and of the emulated card, of examples/clients
OTHER_VARIABLES = {"faults", "shared", "emulator_races", "url", "key"}
# what Kubernetes sets in every pod beside a Service whose name is "llorch" or begins with "llorch-": NAME=VALUE
SERVICE_LINK = re.compile(r"(\w+_)?(service_(host|port\w*)=.*|port_\d+_(tcp|udp|sctp)\w*=.*|port=(tcp|udp|sctp)://.*)")
OWN_CUTOFF, CUTOFF = 0.7, 0.6  # of difflib's ratio


def fields_of(settings: type[ps.BaseSettings]) -> dict[str, FieldInfo]:
    """The fields by the name a user writes, with underscores."""
    named = settings.model_fields.items()
    return {info.validation_alias if isinstance(info.validation_alias, str) else name: info for name, info in named}


def known_keys() -> set[str]:
    """The fields of every command's settings."""
    from llorch.settings import CommandSettings  # which imports this module

    for name in cli.COMMANDS:
        importlib.import_module(f"llorch.commands.{name.replace('-', '_')}")

    def fields(settings: type[CommandSettings]) -> Iterator[str]:
        yield from fields_of(settings)
        for derived in settings.__subclasses__():
            yield from fields(derived)

    return set(fields(CommandSettings))


def suggest(name: str, known: Sequence[str], cutoff: float = CUTOFF) -> str:
    """`; did you mean ...?`, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def _meant(key: str, own: Collection[str], known: Collection[str]) -> str:
    """A suggestion: the running command's own settings before those of others."""
    return suggest(key, sorted(own), OWN_CUTOFF) or suggest(key, sorted(known))


# ---- variables ----


def variables() -> dict[str, str]:
    """llorch's variables that are set: names as they are written, by the setting's."""
    upper = {name: name.upper() for name in os.environ}
    return {u.removeprefix(ENV_PREFIX).lower(): name for name, u in upper.items() if u.startswith(ENV_PREFIX)}


def check_variables(settings: type[ps.BaseSettings], given: Collection[str]) -> None:
    """Raises SettingsError for a variable that is empty or misspelt: keys that were meant must not be left out.

    `given`: what the command line says in any case.
    """
    own, there = fields_of(settings), variables()
    for key, name in there.items():
        if key in own and key not in given and not os.environ[name]:
            raise SettingsError(f"{name} is empty: give it a value, or unset it")
    if foreign := there.keys() - own.keys() - OTHER_VARIABLES:
        known = known_keys()
        for key in sorted(foreign - known):
            if not _is_anothers(key, os.environ[there[key]]):
                raise SettingsError(f"{there[key]} is no setting{_variable_hint(key, own, known)}")


def _variable_hint(key: str, own: Collection[str], known: Collection[str]) -> str:
    matched = _meant(key, own, known)
    if not matched:
        return "; unset it, or see --help of the command for what there is"
    return re.sub(r"mean (\w+)", lambda found: f"mean {ENV_PREFIX}{found[1].upper()}", matched)


def _is_anothers(key: str, value: str) -> bool:
    """A provider's own, LLORCH_NUMBA_ISA of numba-cpu; or one that nobody set by hand."""
    first_words = {re.split(r"[-_]", point.name)[0].lower() for point in entry_points(group="llorch.providers")}
    return key.split("_")[0] in first_words or SERVICE_LINK.fullmatch(f"{key}={value}") is not None


# ---- llorch.toml ----


def config_file(named: object) -> Path | None:
    """The file that is read: the one named, else llorch.toml where there is one."""
    if named:
        return Path(str(named))
    return Path(TOML) if Path(TOML).exists() else None


class TomlSource(ps.InitSettingsSource):
    """What the file says for a command; keys of other commands are passed over."""

    def __call__(self) -> dict[str, Any]:
        path = config_file(self.current_state.get(CONFIG))
        return {} if path is None else toml_values(self.settings_cls, path)


def toml_values(settings: type[ps.BaseSettings], path: Path) -> dict[str, Any]:
    """Raises SettingsError where the file cannot be read or has a key that is no setting's."""
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"{path} cannot be read: {reason}") from error
    fields = fields_of(settings)
    own = fields.keys() - {CONFIG}
    written = {key.replace("-", "_"): key for key in data}
    if foreign := written.keys() - own:
        known = known_keys() - {CONFIG} | own
        for key in foreign - known:
            hint = _meant(key, own, known) or "; keys are the options of the commands, such as model or cache_type"
            raise SettingsError(f"{path}: unknown key {written[key]!r}{hint}")
    return {key: _plain(data[name], fields[key]) for key, name in written.items() if key in own}


def _plain(value: object, field: FieldInfo) -> object:
    """true is no number, though Python and pydantic take it for 1."""
    kinds = {field.annotation, *get_args(field.annotation)}
    return str(value).lower() if isinstance(value, bool) and kinds & {int, float} else value
