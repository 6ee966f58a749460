"""Validation errors as a user reads them: the setting as it was written, its value, and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pydantic_settings as ps
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from llorch.setting_sources import ENV_PREFIX, TOML, fields_of, variables

if TYPE_CHECKING:
    from llorch.settings import CommandParser

_NOUNS = {int: "a whole number", float: "a number", bool: "true or false"}


class Origins:
    """Where each setting was written, and how: what a user has to look at."""

    def __init__(self, parser: CommandParser, argv: Sequence[str], file: Path | None) -> None:
        self.file = file
        self._parser, self._argv = parser, argv

    def of(self, field: str) -> str:
        """The option, variable or key as it was written."""
        names = self._parser.names[field]
        if field in self._parser.given:
            options = [*names, *(f"--no-{name.removeprefix('--')}" for name in names)]
            there = (
                o for o in options for a in self._argv if a.split("=")[0] == o or (len(o) == 2 and a.startswith(o))
            )
            return next(there, names[0])
        return ENV_PREFIX + field.upper() if field in variables() else f"{field} in {self.file}"

    def with_origin(self, field: str, message: str) -> str:
        """The message, behind it where the setting comes from and what counts more."""
        option = self._parser.names[field][0]
        origin = self.of(field)
        return f"{message} ({origin})" if origin == option else f"{message} ({origin}; {option} counts more)"

    def explain(self, settings: type[ps.BaseSettings], details: ErrorDetails) -> str:
        """A line for a mistake that pydantic has found."""
        if not details["loc"]:  # a rule over several settings says itself which
            return _reason(details)
        field = str(details["loc"][0])
        info = fields_of(settings)[field]
        name = self._parser.names[field][0]
        if details["type"] == "missing":
            before = name if name.startswith("-") else self._parser.prog
            example = f", for example {before} {info.examples[0]}" if info.examples else ""
            return f"{name} is missing{example} (or set {ENV_PREFIX}{field.upper()}, or {field} in {TOML})"
        value = "" if "Secret" in repr(info.annotation) else f", not {details['input']!r}"
        return f"{self.of(field)}: {expected(info, details)}{value}"


def _reason(details: ErrorDetails) -> str:
    """The message of a validator's own ValueError, else pydantic's."""
    return str(details.get("ctx", {}).get("error", details["msg"]))


def expected(info: FieldInfo, details: ErrorDetails) -> str:
    if details["type"] == "value_error":
        return _reason(details)
    if details["type"] == "literal_error":
        return f"expected {details['ctx']['expected']}"
    noun = next((noun for kind, noun in _NOUNS.items() if kind in (info.annotation, *get_args(info.annotation))), None)
    if noun is None:
        return details["msg"].replace("Input should be", "expected")
    return f"expected {noun}{_bounds(info)}"


def _bounds(info: FieldInfo) -> str:
    """The field's limits in words."""
    words = []
    for rule in info.metadata:
        match rule:
            case Ge(low):
                words.append(f"at least {low}")
            case Gt(low):
                words.append(f"above {low}")
            case Le(high):
                words.append(f"at most {high}")
            case Lt(high):
                words.append(f"below {high}")
    return f", {' and '.join(words)}" if words else ""
