"""Chat templates: from messages to the token ids that a model was trained to answer.

A template is a jinja2 program in the model file (`tokenizer.chat_template`). It writes control tokens between the
messages; what a message itself holds never becomes one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from llorch.core.chat_renderer import Renderer
from llorch.core.gguf import GGUFFile
from llorch.core.tokenizer import Tokenizer
from llorch.errors import ChatTemplateError, InvalidRequestError, SettingsError

KEY = "tokenizer.chat_template"
NAMES = "tokenizer.chat_templates"
DEFAULT = "default"
MAX_FILE_BYTES = 1 << 20  # the longest templates in use have 30,000
GUARD = "\ufdd0"  # a noncharacter: Unicode keeps it for programs' own use, no text holds it

_RESERVED = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents"})
_NO_TEMPLATE = (
    "this model has no chat template: send a prompt that you have rendered yourself to /v1/completions, "
    "or start llorch with --chat-template FILE"
)

Message = Mapping[str, Any]


class Chat:
    """The chat templates of a model, and their use. Any number of threads may use one; `close` ends its process."""

    def __init__(self, tokenizer: Tokenizer, templates: Mapping[str, str], override: str | None = None) -> None:
        """`override` is a template to use instead of the file's own."""
        self._tokenizer, self._templates = tokenizer, dict(templates)
        self._override = override
        self._guards = _Guards(tokenizer.control_texts)
        self._renderer = Renderer()

    @classmethod
    def from_gguf(cls, file: GGUFFile, tokenizer: Tokenizer, chosen: str | Path | None = None) -> Chat:
        """The templates in a file. `chosen` is a file with another one, or the name of one of them.

        Raises GGUFError for metadata of a wrong type, SettingsError for a choice that is neither, cannot be read or
        does not compile.
        """
        templates = _templates(file)
        if chosen is None:
            return cls(tokenizer, templates)
        known = not Path(chosen).exists() and str(chosen) in templates
        chat = cls(tokenizer, templates, templates[str(chosen)] if known else _read(Path(chosen), templates))
        if problem := chat.problem():
            chat.close()
            raise SettingsError(f"--chat-template {chosen}: {problem}")
        return chat

    @property
    def names(self) -> list[str]:
        """The templates in the model file."""
        return list(self._templates)

    @property
    def available(self) -> bool:
        """Whether there is a template to render messages with."""
        return self._override is not None or DEFAULT in self._templates or len(self._templates) == 1

    def problem(self) -> str | None:
        """Why messages cannot be rendered, for one who starts llorch; None where they can. Compiles the template."""
        try:
            self._renderer.compile(self._template())
        except ChatTemplateError as error:
            return str(error)
        return None

    def prompt(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, variables: Message | None = None
    ) -> list[int]:
        """Token ids of a conversation, BOS included; arguments and errors as for `render`."""
        return self.encode(self.render(messages, add_generation_prompt=add_generation_prompt, variables=variables))

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, variables: Message | None = None
    ) -> str:
        """The text of a conversation, for `encode` alone: texts of control tokens in messages are broken by GUARD.

        A message has `role` and `content`, a string, and may have what else the template reads. `variables` are further
        names for the template, such as enable_thinking. The role `developer` becomes `system` in a template that does
        not know it. Raises ChatTemplateError where there is no template, or it refuses the messages, fails or is
        stopped.
        """
        template = self._template()
        knows_developer = "developer" in template
        if strange := _RESERVED & (variables or {}).keys():
            raise InvalidRequestError(f"the template variable {min(strange)} is llorch's own: leave it out")
        context = {
            **self._guards.protect(dict(variables or {})),
            "messages": [self._protected(message, knows_developer) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._text(self._tokenizer.bos_id),
            "eos_token": self._text(self._tokenizer.eos_id),
            "tools": None,
            "documents": None,
        }
        return self._renderer.render(template, context)

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a text from `render`, BOS included."""
        return self._tokenizer.encode_prompt(rendered, guard=GUARD)

    def close(self) -> None:
        """Ends the process that renders; nothing can be rendered afterwards."""
        self._renderer.close()

    def _template(self) -> str:
        if self._override is not None:
            return self._override
        if not self._templates:
            raise ChatTemplateError(_NO_TEMPLATE)
        if DEFAULT in self._templates:
            return self._templates[DEFAULT]
        if len(self._templates) == 1:
            return next(iter(self._templates.values()))
        names = ", ".join(self._templates)
        raise ChatTemplateError(
            f"this model has no default among its chat templates ({names}): start llorch with --chat-template NAME"
        )

    def _protected(self, message: Message, knows_developer: bool) -> Message:
        found: dict[str, Any] = self._guards.protect(dict(message))
        role = message.get("role")
        return {**found, "role": "system" if role == "developer" and not knows_developer else role}

    def _text(self, token: int | None) -> str:
        return "" if token is None else self._tokenizer.text(token)


def _templates(file: GGUFFile) -> dict[str, str]:
    """The templates in a file by name; `tokenizer.chat_template` itself is the default."""
    found = {}
    default = file.get(KEY, str, None)
    if default is not None:
        found[DEFAULT] = default
    named = set(file.get(NAMES, list, [])) | {
        key.removeprefix(f"{KEY}.") for key in file.metadata if key.startswith(f"{KEY}.")
    }
    for name in sorted(named):
        template = file.get(f"{KEY}.{name}", str, None)
        if template is not None:
            found.setdefault(name, template)
    return found


def _read(path: Path, templates: Collection[str]) -> str:
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise SettingsError(f"--chat-template {path} has {size} bytes, at most {MAX_FILE_BYTES} are read")
        return path.read_text("utf-8")
    except OSError as error:
        names = f", nor one of the model's templates ({', '.join(templates)})" if templates else ""
        raise SettingsError(f"--chat-template {path} is no file that can be read ({error.strerror}){names}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"--chat-template {path} is not UTF-8: {error.reason} at byte {error.start}; give a jinja2 template"
        ) from error


class _Guards:
    """Breaks the texts of control tokens with GUARD, which the tokenizer takes out again once it has split at them.

    The texts a template compares or strips are left as they are as far as can be: only what would be read as a control
    token changes, and ends of strings that could become one together with what the template writes beside them.
    """

    def __init__(self, texts: Collection[str]) -> None:
        self._texts = texts = [text for text in texts if GUARD not in text]
        self._beginnings = {text[:n] for text in texts for n in range(1, len(text))}
        self._endings = {text[n:] for text in texts for n in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)

    def protect(self, value: Any) -> Any:
        """The same JSON value, each of its strings protected; keys are as they were."""
        if isinstance(value, str):
            return self._string(value)
        if isinstance(value, Mapping):
            return {key: self.protect(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(item) for item in value]
        return value

    def _string(self, text: str) -> str:
        text = text.replace(GUARD, "")
        for control in self._texts:
            while control in text:  # again: an occurrence may overlap the one before it
                text = text.replace(control, control[0] + GUARD + control[1:])
        core = text.strip()
        if not core:
            return text
        lengths = range(1, min(self._longest, len(core)) + 1)
        before = GUARD if any(core[:n] in self._endings for n in lengths) else ""
        after = GUARD if any(core[-n:] in self._beginnings for n in lengths) else ""
        start = text.index(core)
        return f"{text[:start]}{before}{core}{after}{text[start + len(core) :]}"
