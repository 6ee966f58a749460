"""The kinds of fields that a request body may have: each checks a value, and describes itself in /docs."""

from __future__ import annotations

import difflib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llorch.errors import InvalidRequestError

MAX_REPORTED = 100  # a megabyte of unknown fields must not become fifteen of errors
MAX_ECHOED_CHARACTERS = 100

_OMITTED: Any = object()


@dataclass(frozen=True)
class Violation:
    """One rule of the contract that a body breaks. The message follows the field's name.

    `value` is left out where it may hold text of a prompt.
    """

    field: str
    constraint: str
    message: str
    value: Any = _OMITTED

    def to_wire(self) -> dict[str, Any]:
        name = _printable(self.field)
        wire = {"field": name, "constraint": self.constraint, "message": f"{name} {self.message}"}
        if self.value is not _OMITTED and (echo := _echo(self.value)) is not _OMITTED:
            wire["value"] = echo
        return wire


class BodyError(InvalidRequestError):
    """A request body breaks the contract; carries every violation."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field} {v.message}" for v in self.violations))


# ---- kinds of fields ----


@dataclass(frozen=True, kw_only=True)
class Field(ABC):
    """A field of a body: its rule, and how /docs describes it."""

    name: str
    description: str
    required: bool = False
    default: Any = _OMITTED

    json_type = ""

    @property
    @abstractmethod
    def constraint(self) -> str:
        """The rule's name, as violations and /docs give it."""

    @abstractmethod
    def check(self, value: Any) -> Iterator[Violation]:
        """The rules that a value breaks."""

    def convert(self, value: Any) -> Any:
        """The value as llorch uses it, once it is known to be right."""
        return value

    def rules(self) -> dict[str, Any]:
        """JSON Schema of the rules, beside the type."""
        return {}

    def schema(self) -> dict[str, Any]:
        """JSON Schema (the dialect of OpenAPI 3.0)."""
        schema = {"type": self.json_type, "description": f"{self.description} Rule: `{self.constraint}`."}
        if self.default is not _OMITTED:
            schema["default"] = self.default
        return schema | self.rules()

    def wrong_type(self, value: Any, name: str | None = None, *, echo: bool = True) -> Violation:
        return Violation(
            name or self.name,
            f"type({self.json_type})",
            f"must be {_ARTICLES[self.json_type]}, is {kind_of(value)}",
            value if echo else _OMITTED,
        )


@dataclass(frozen=True, kw_only=True)
class Text(Field):
    max_length: int | None = None
    confidential: bool = False  # its value is never sent back

    json_type = "string"

    @property
    def constraint(self) -> str:
        return "non_empty" if self.max_length is None else f"length(1..={self.max_length})"

    def check(self, value: Any) -> Iterator[Violation]:
        if not isinstance(value, str):
            yield self.wrong_type(value, echo=not self.confidential)
        elif not value:
            yield Violation(self.name, self.constraint, "must not be empty", _OMITTED if self.confidential else value)
        elif self.max_length is not None and len(value) > self.max_length:
            yield Violation(
                self.name, self.constraint, f"is {len(value)} characters long, at most {self.max_length} are allowed"
            )
        elif not is_unicode(value):
            yield Violation(self.name, "unicode", "holds half of a surrogate pair, which is no character")

    def rules(self) -> dict[str, Any]:
        return {"minLength": 1} | ({} if self.max_length is None else {"maxLength": self.max_length})


@dataclass(frozen=True, kw_only=True)
class Integer(Field):
    low: int
    high: int | None  # None: not known before the model is loaded
    nullable: bool = False

    json_type = "integer"

    @property
    def constraint(self) -> str:
        return f"range({self.low}..={'VOCAB' if self.high is None else self.high})"

    def check(self, value: Any) -> Iterator[Violation]:
        if value is None and self.nullable:
            return
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # as JSON Schema has it, 2.0 is an integer
        if not isinstance(value, int) or isinstance(value, bool):
            yield self.wrong_type(value)
        elif value < self.low or (self.high is not None and value > self.high):
            yield Violation(self.name, self.constraint, f"must be {self.low} to {self.high}, is {_short(value)}", value)

    def convert(self, value: Any) -> int | None:
        return None if value is None else int(value)

    def rules(self) -> dict[str, Any]:
        rules: dict[str, Any] = {"minimum": self.low}
        if self.high is not None:
            rules["maximum"] = self.high
        return rules | ({"nullable": True} if self.nullable else {})


@dataclass(frozen=True, kw_only=True)
class Number(Field):
    low: float
    high: float
    zero_refused: bool = False

    json_type = "number"

    @property
    def constraint(self) -> str:
        return f"range({self.low!r}..={self.high!r})"

    def check(self, value: Any) -> Iterator[Violation]:
        if not isinstance(value, int | float) or isinstance(value, bool):
            yield self.wrong_type(value)
        elif not self.low <= value <= self.high:  # False for NaN too
            yield Violation(
                self.name, self.constraint, f"must be {self.low!r} to {self.high!r}, is {_short(value)}", value
            )
        elif self.zero_refused and value == 0:
            yield Violation(self.name, self.constraint, "must be above 0, is 0", value)

    def convert(self, value: Any) -> float:
        return float(value)

    def rules(self) -> dict[str, Any]:
        return {"minimum": self.low, "maximum": self.high} | ({"exclusiveMinimum": True} if self.zero_refused else {})


@dataclass(frozen=True, kw_only=True)
class Texts(Field):
    """A list of strings, whose text is never sent back."""

    max_count: int
    max_length: int

    json_type = "array"

    @property
    def constraint(self) -> str:
        return f"max_count({self.max_count})"

    def check(self, value: Any) -> Iterator[Violation]:
        if not isinstance(value, list):
            yield self.wrong_type(value, echo=False)
            return
        if len(value) > self.max_count:
            yield Violation(self.name, self.constraint, f"has {len(value)} items, at most {self.max_count} are allowed")
        for i, item in enumerate(value[:MAX_REPORTED]):
            yield from self._check_item(f"{self.name}[{i}]", item)

    def _check_item(self, name: str, item: Any) -> Iterator[Violation]:
        if not isinstance(item, str):
            yield Violation(name, "type(string)", f"must be a string, is {kind_of(item)}")
        elif not item:
            yield Violation(name, "non_empty", "must not be empty")
        elif len(item) > self.max_length:
            yield Violation(
                name,
                f"max_length({self.max_length})",
                f"is {len(item)} characters long, at most {self.max_length} are allowed",
            )
        elif not is_unicode(item):
            yield Violation(name, "unicode", "holds half of a surrogate pair, which is no character")

    def convert(self, value: Any) -> tuple[str, ...]:
        return tuple(value)

    def rules(self) -> dict[str, Any]:
        item = {"type": "string", "minLength": 1, "maxLength": self.max_length}
        return {"items": item, "maxItems": self.max_count}


# ---- a body ----


def parse_body(body: bytes, fields: Sequence[Field]) -> dict[str, Any]:
    """The fields a JSON body holds, converted. Raises BodyError with every violation at once."""
    given = json_object(body)
    return checked(given, fields, _unknown(given, [known.name for known in fields]))


def checked(given: dict[str, Any], fields: Sequence[Field], more: Iterable[Violation] = ()) -> dict[str, Any]:
    """Those of the fields that are given, converted. Raises BodyError with every violation, `more` at the end."""
    violations: list[Violation] = []
    for known in fields:
        if known.name in given:
            violations += known.check(given[known.name])
        elif known.required:
            violations.append(Violation(known.name, "required", "is missing"))
    violations += more
    if violations:
        raise BodyError(violations)
    return {known.name: known.convert(given[known.name]) for known in fields if known.name in given}


def json_object(body: bytes) -> dict[str, Any]:
    """What a body holds, not yet checked. Raises BodyError where it is no JSON object."""
    if not body:
        raise BodyError([Violation("body", "json", "is empty, send a JSON object")])
    try:
        given = json.loads(body.decode("utf-8"))
    except json.JSONDecodeError as error:
        message = f"is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise BodyError([Violation("body", "json", message)]) from error
    except UnicodeDecodeError as error:
        message = f"is not UTF-8: {error.reason} at byte {error.start}"
        raise BodyError([Violation("body", "json", message)]) from error
    except RecursionError as error:
        raise BodyError([Violation("body", "json", "is nested too deeply")]) from error
    except ValueError as error:  # an integer of thousands of digits
        raise BodyError([Violation("body", "json", "holds a number with too many digits")]) from error
    if not isinstance(given, dict):
        raise BodyError([Violation("body", "type(object)", f"must be an object, is {kind_of(given)}")])
    return given


def _unknown(given: dict[str, Any], known: list[str]) -> Iterator[Violation]:
    unknown = [name for name in given if name not in known]
    for name in unknown[:MAX_REPORTED]:
        close = difflib.get_close_matches(name[:MAX_ECHOED_CHARACTERS], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        yield Violation(name[:MAX_ECHOED_CHARACTERS], "unknown_field", f"is not a field of this request: {hint}")
    if len(unknown) > MAX_REPORTED:
        yield Violation("body", "unknown_field", f"holds {len(unknown)} unknown fields, {MAX_REPORTED} are listed")


# ---- words ----

_ARTICLES = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "array": "an array",
    "boolean": "a boolean",
    "object": "an object",
}


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array"}
    return names.get(type(value), "an object")


def _short(number: float) -> str:
    """A number for a message, which never grows with what the client sent."""
    if isinstance(number, float) and not math.isfinite(number):
        return json.dumps(number)  # NaN, Infinity, -Infinity: Python's json reads them, though JSON has them not
    text = str(number)
    return text if len(text) <= 24 else f"{text[:6]}... ({len(text)} digits)"


def _echo(value: Any) -> Any:
    """A value as it can be sent back: JSON has neither NaN nor Infinity, and long ones are left out."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError):  # NaN within a list, half a surrogate pair, deep nesting
        return _OMITTED
    return value if len(text) <= MAX_ECHOED_CHARACTERS else _OMITTED


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
