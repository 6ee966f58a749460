"""The kinds of fields that the OpenAI API has and the worker contract has not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llorch.http.fields import Field, Integer, Text, Texts, Violation, is_unicode, kind_of

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 10_000
MAX_PROMPTS = 1024
_NAME = re.compile(r"[^\s<|\\/>]{1,64}")  # OpenAI's rule, which leaves no room for a control token's text


@dataclass(frozen=True, kw_only=True)
class Flag(Field):
    json_type = "boolean"

    @property
    def constraint(self) -> str:
        return "boolean"

    def check(self, value: Any) -> Iterator[Violation]:
        if not isinstance(value, bool):
            yield self.wrong_type(value)


@dataclass(frozen=True, kw_only=True)
class Unsupported(Field):
    """What OpenAI has and llorch has not: refused by name, but for values that ask for nothing."""

    asks_for_nothing: Callable[[Any], bool] = lambda value: not value
    instead: str = "leave it out"

    @property
    def constraint(self) -> str:
        return "unsupported"

    def check(self, value: Any) -> Iterator[Violation]:
        if not self.asks_for_nothing(value):
            yield Violation(self.name, self.constraint, f"is not supported by this worker: {self.instead}")

    def schema(self) -> dict[str, Any]:
        return {"description": f"{self.description} Not supported: refused."}


@dataclass(frozen=True, kw_only=True)
class OrMinusOne(Integer):
    """An integer for which -1 may be sent as well, as to other engines: off, or without a limit."""

    stands_for: int | None = None  # what -1 does

    def check(self, value: Any) -> Iterator[Violation]:
        if value != -1:
            yield from super().check(value)

    def convert(self, value: Any) -> int | None:
        return self.stands_for if value == -1 else super().convert(value)

    def rules(self) -> dict[str, Any]:
        return {"anyOf": [super().rules(), {"enum": [-1]}]}


@dataclass(frozen=True, kw_only=True)
class Stop(Texts):
    """One stop string or a list of them; an empty string is none."""

    def check(self, value: Any) -> Iterator[Violation]:
        if value != "":
            yield from super().check([value] if isinstance(value, str) else value)

    def convert(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            return (value,) if value else ()
        return tuple(value)

    def schema(self) -> dict[str, Any]:
        one = {"type": "string", "maxLength": self.max_length}
        description = f"{self.description} Rule: `{self.constraint}`."
        return {"description": description, "oneOf": [one, {"type": "array", **self.rules()}]}


@dataclass(frozen=True, kw_only=True)
class LogitBias(Field):
    """An object from token ids, as strings, to what is added to their logits."""

    vocab_size: int | None  # None: not known before the model is loaded

    json_type = "object"

    @property
    def constraint(self) -> str:
        return "range(-100.0..=100.0)"

    def check(self, value: Any) -> Iterator[Violation]:
        if not isinstance(value, dict):
            yield self.wrong_type(value, echo=False)
            return
        for key, bias in value.items():
            name = f"{self.name}[{key[:20]}]"
            if not re.fullmatch("[0-9]{1,10}", key) or (self.vocab_size is not None and int(key) >= self.vocab_size):
                last = "VOCAB" if self.vocab_size is None else self.vocab_size - 1
                yield Violation(name, f"token(0..={last})", f"is no token id: they are 0 to {last}")
            elif not isinstance(bias, int | float) or isinstance(bias, bool):
                yield Violation(name, "type(number)", f"must be a number, is {kind_of(bias)}")
            elif not -100 <= bias <= 100:
                yield Violation(name, self.constraint, "must be -100.0 to 100.0")

    def convert(self, value: Any) -> tuple[tuple[int, float], ...]:
        return tuple((int(key), float(bias)) for key, bias in value.items())

    def rules(self) -> dict[str, Any]:
        return {"additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}


@dataclass(frozen=True, kw_only=True)
class StreamOptions(Field):
    json_type = "object"

    @property
    def constraint(self) -> str:
        return "type(object)"

    def check(self, value: Any) -> Iterator[Violation]:
        if not isinstance(value, dict):
            yield self.wrong_type(value)
        elif not isinstance(usage := value.get("include_usage", False), bool | None):
            name = f"{self.name}.include_usage"
            yield Violation(name, "type(boolean)", f"must be a boolean, is {kind_of(usage)}")

    def convert(self, value: Any) -> bool:
        """Whether the usage is asked for."""
        return bool(value.get("include_usage"))

    def rules(self) -> dict[str, Any]:
        return {"properties": {"include_usage": {"type": "boolean", "default": False}}}


@dataclass(frozen=True, kw_only=True)
class Variables(Field):
    """Further names for the chat template, with plain values."""

    json_type = "object"

    @property
    def constraint(self) -> str:
        return "plain_values"

    def check(self, value: Any) -> Iterator[Violation]:
        if not isinstance(value, dict):
            yield self.wrong_type(value, echo=False)
            return
        for key, item in value.items():
            name = f"{self.name}.{key[:40]}"
            if not isinstance(item, str | bool | int | float | None):
                message = f"must be a string, a number, a boolean or null, is {kind_of(item)}"
                yield Violation(name, self.constraint, message)
            elif not (is_unicode(key) and key.isidentifier()) or (isinstance(item, str) and not is_unicode(item)):
                yield Violation(name, "unicode", "is no name with a value that a template could take")


@dataclass(frozen=True, kw_only=True)
class Prompt(Field):
    """A text, a list of token ids, or a list of either."""

    vocab_size: int | None

    @property
    def constraint(self) -> str:
        return "prompt"

    def check(self, value: Any) -> Iterator[Violation]:
        if isinstance(value, str):
            yield from self._check_one(self.name, value)
        elif not isinstance(value, list):
            what = "must be a string, an array of token ids, or an array of either"
            yield Violation(self.name, "type(string)", f"{what}, is {kind_of(value)}")
        elif not value:
            yield Violation(self.name, "non_empty", "must not be empty")
        elif _is_id(value[0]):
            yield from self._check_one(self.name, value)
        elif len(value) > MAX_PROMPTS:
            yield Violation(
                self.name, f"max_count({MAX_PROMPTS})", f"has {len(value)} items, at most {MAX_PROMPTS} are allowed"
            )
        else:
            for i, item in enumerate(value):
                yield from self._check_one(f"{self.name}[{i}]", item)

    def _check_one(self, name: str, value: Any) -> Iterator[Violation]:
        if isinstance(value, str):
            if not is_unicode(value):
                yield Violation(name, "unicode", "holds half of a surrogate pair, which is no character")
        elif not isinstance(value, list):
            yield Violation(name, "type(string)", f"must be a string or an array of token ids, is {kind_of(value)}")
        elif not value:
            yield Violation(name, "non_empty", "must not be empty")
        else:
            size = self.vocab_size
            for i, token in enumerate(value):
                if not _is_id(token):
                    yield Violation(f"{name}[{i}]", "type(integer)", f"must be a token id, is {kind_of(token)}")
                    return
                if token < 0 or (size is not None and token >= size):
                    last = "VOCAB" if size is None else size - 1
                    yield Violation(f"{name}[{i}]", f"token(0..={last})", f"must be a token id, 0 to {last}")
                    return

    def convert(self, value: Any) -> tuple[str | tuple[int, ...], ...]:
        """All prompts, each a text or token ids."""
        if isinstance(value, str):
            return (value,)
        if _is_id(value[0]):
            return (tuple(value),)
        return tuple(item if isinstance(item, str) else tuple(item) for item in value)

    def schema(self) -> dict[str, Any]:
        text = {"type": "string"}
        ids = {"type": "array", "items": {"type": "integer", "minimum": 0}}
        return {
            "description": self.description,
            "oneOf": [text, {"type": "array", "items": {"oneOf": [text, ids]}}, ids],
        }


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Messages(Field):
    """The conversation. Contents that are lists of text parts become one text, a line break between the parts."""

    json_type = "array"

    @property
    def constraint(self) -> str:
        return "non_empty"

    def check(self, value: Any) -> Iterator[Violation]:
        if not isinstance(value, list):
            yield self.wrong_type(value, echo=False)
        elif not value:
            yield Violation(self.name, self.constraint, "must not be empty")
        elif len(value) > MAX_MESSAGES:
            message = f"has {len(value)} items, at most {MAX_MESSAGES} are allowed"
            yield Violation(self.name, f"max_count({MAX_MESSAGES})", message)
        else:
            for i, message in enumerate(value):
                yield from self._check_message(f"{self.name}[{i}]", message)

    def _check_message(self, name: str, message: Any) -> Iterator[Violation]:
        if not isinstance(message, dict):
            yield Violation(name, "type(object)", f"must be an object, is {kind_of(message)}")
            return
        role = message.get("role")
        if role not in ROLES:
            what = "is missing" if role is None else "is not one that there is"
            yield Violation(f"{name}.role", "role", f"{what}: roles are {', '.join(ROLES)}")
        for unsupported in ("tool_calls", "function_call", "audio"):
            if message.get(unsupported):
                yield Violation(f"{name}.{unsupported}", "unsupported", "is not supported by this worker: leave it out")
        for key in ("name", "tool_call_id"):
            given = message.get(key)
            if given is not None and not (isinstance(given, str) and _NAME.fullmatch(given) and is_unicode(given)):
                rule = "must be 1 to 64 characters without spaces, <, |, >, / and \\"
                yield Violation(f"{name}.{key}", "name", rule)
        yield from self._check_content(f"{name}.content", message.get("content"))

    def _check_content(self, name: str, content: Any) -> Iterator[Violation]:
        if isinstance(content, str):
            if not is_unicode(content):
                yield Violation(name, "unicode", "holds half of a surrogate pair, which is no character")
        elif isinstance(content, list) and content:
            for i, part in enumerate(content):
                yield from self._check_part(f"{name}[{i}]", part)
        else:
            what = "is missing" if content is None else "must be a string or a list of text parts"
            yield Violation(name, "type(string)", f"{what}, send a string")

    def _check_part(self, name: str, part: Any) -> Iterator[Violation]:
        if not isinstance(part, dict):
            yield Violation(name, "type(object)", f"must be an object, is {kind_of(part)}")
        elif (kind := part.get("type")) != "text":
            shown = kind[:40] if isinstance(kind, str) else kind_of(kind)
            yield Violation(f"{name}.type", "unsupported", f"is {shown}: this model takes parts of type text only")
        else:
            text = Text(name=f"{name}.text", description="", confidential=True)
            yield from () if part.get("text") == "" else text.check(part.get("text"))

    def convert(self, value: Any) -> tuple[dict[str, str], ...]:
        return tuple(_message(message) for message in value)

    def rules(self) -> dict[str, Any]:
        part = {"type": "object", "required": ["type", "text"], "properties": {"type": _TEXT, "text": _TEXT}}
        content = {"oneOf": [_TEXT, {"type": "array", "minItems": 1, "items": part}]}
        role = {"type": "string", "enum": list(ROLES)}
        message = {"type": "object", "required": ["role", "content"], "properties": {"role": role, "content": content}}
        return {"minItems": 1, "items": message}


_TEXT = {"type": "string"}


def _message(given: dict[str, Any]) -> dict[str, str]:
    content = given["content"]
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    named = {key: given[key] for key in ("name", "tool_call_id") if given.get(key) is not None}
    return {"role": given["role"], "content": text, **named}
