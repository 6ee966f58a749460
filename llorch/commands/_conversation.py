"""The messages of a chat, and how much of the context they take."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llorch.errors import ContextOverflowError, InvalidRequestError, SettingsError

if TYPE_CHECKING:
    from llorch import LLM

MAX_FILE_BYTES = 16 << 20
ROLES = ("system", "user", "assistant")

Message = dict[str, str]


class Conversation:
    """System text, and messages of the user and the model in turns: what is rendered for each answer."""

    def __init__(self, llm: LLM, system: str | None = None) -> None:
        """Raises ChatTemplateError where the model's template takes no system text."""
        self._llm = llm
        self.system: str | None = None
        self.turns: list[Message] = []
        self.unanswered: str | None = None  # the last message where nothing came of it
        self.used = 0  # tokens of the context, as of the last answer
        self._files: set[Path] = set()  # what this chat has saved or loaded, and may write over
        if system:
            self.set_system(system)

    @property
    def messages(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of the conversation with `text` as its next message.

        Raises ChatTemplateError, and ContextOverflowError where the context has no room for an answer.
        """
        ids = tuple(self._llm.chat.prompt([*self.messages, {"role": "user", "content": text}]))
        context, longest = self._llm.context, self._llm.config.context_length
        if len(ids) < context:
            return ids
        what = "the conversation with this message" if self.turns else "the message"
        ways = "/reset starts a new conversation" if self.turns else "send a shorter one"
        more = f", or start llorch chat with --context {min(longest, 2 * len(ids))}" if longest > len(ids) else ""
        raise ContextOverflowError(f"{what} is {len(ids)} tokens, the context is {context}: {ways}{more}")

    def add(self, text: str, answer: str, used: int) -> None:
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self.used, self.unanswered = used, None

    def take_back(self) -> tuple[str, list[Message]]:
        """Removes the last message and its answer; the message, and what was removed.

        Raises InvalidRequestError where there is none.
        """
        if self.unanswered is not None:
            return self.unanswered, []
        if not self.turns:
            raise InvalidRequestError("there is no message to answer again: type one")
        removed, self.turns = self.turns[-2:], self.turns[:-2]
        return removed[0]["content"], removed

    def reset(self) -> None:
        """Forgets all but the system text."""
        self.turns, self.unanswered, self.used = [], None, 0

    def set_system(self, text: str | None) -> None:
        """Raises ChatTemplateError, and changes nothing, where the template refuses it."""
        before, self.system = self.system, text or None
        try:
            self.used = self._count()
        except Exception:
            self.system = before
            raise

    def save(self, path: Path) -> None:
        """Writes the messages as JSON. Raises SettingsError where that cannot be, or the file is not this chat's."""
        turns = [{"role": "user", "content": self.unanswered}] if self.unanswered is not None else []
        report = {"model": self._llm.config.name, "messages": [*self.messages, *turns]}
        try:
            if path.exists() and path.resolve() not in self._files:
                raise SettingsError(f"{path} exists already: give another name, or remove it")
            _write(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror}; give another name") from error
        self._files.add(path.resolve())

    def load(self, path: Path) -> None:
        """Takes the messages of a file that `save` wrote, or of a request to /v1/chat/completions, instead of these.

        Raises SettingsError, or ChatTemplateError where the template refuses them, and changes nothing.
        """
        system, turns, last = _split(_read(path), path)
        before = self.system, self.turns, self.unanswered
        self.system, self.turns, self.unanswered = system, turns, last
        try:
            self.used = self._count()
        except Exception:
            self.system, self.turns, self.unanswered = before
            raise
        self._files.add(path.resolve())

    def _count(self) -> int:
        """Tokens of the messages; a template is tried with a message where there is none, as most want one."""
        chat = self._llm.chat
        if not self.turns:
            chat.render([*self.messages, {"role": "user", "content": "x"}])
            return 0
        return len(chat.prompt(self.messages, add_generation_prompt=False))


def _write(path: Path, text: str) -> None:
    """All or nothing: what the file held stays where the disk is full."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            partial.replace(path)
        except OSError:
            partial.unlink()
            raise


def _read(path: Path) -> Any:
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise SettingsError(f"{path} has {size} bytes, at most {MAX_FILE_BYTES} are read")
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path} is not JSON in UTF-8 ({error}): give a file that /save wrote") from error


def _split(data: Any, path: Path) -> tuple[str | None, list[Message], str | None]:
    """System text, turns of user and assistant, and a last message without an answer."""
    found = data.get("messages") if isinstance(data, Mapping) else data
    if not isinstance(found, list) or not found:
        raise SettingsError(f'{path} has no list "messages": give a file that /save wrote')
    messages = [_message(item, f"{path}: message {i + 1} of {len(found)}") for i, item in enumerate(found)]
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    for i, message in enumerate(messages):
        if message["role"] != (expected := ROLES[1 + i % 2]):
            number = i + 1 + (system is not None)
            raise SettingsError(
                f"{path}: message {number} of {len(found)}: expected role {expected!r}, not {message['role']!r}"
            )
    last = messages.pop()["content"] if len(messages) % 2 else None
    return system, messages, last


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping) or item.get("role") not in ROLES or not isinstance(item.get("content"), str):
        raise SettingsError(f'{where}: expected a "role" of {", ".join(ROLES)} and a text "content"')
    return {"role": item["role"], "content": item["content"]}
