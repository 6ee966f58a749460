"""What a user may type in `llorch chat` besides messages: /help, /reset and so on."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llorch.commands._generation import SamplingSettings
from llorch.commands._terminal import printable
from llorch.errors import SettingsError
from llorch.setting_sources import suggest
from llorch.settings import CommandSettings, assign

if TYPE_CHECKING:
    from llorch.commands.chat import ChatSession

SETTABLE = [name for name in SamplingSettings.model_fields if name not in CommandSettings.model_fields]
SETTABLE.append("max_tokens")
DEFAULT, NONE = "default", "none"


@dataclass(frozen=True)
class ChatCommand:
    argument: str  # as /help writes it
    summary: str
    run: Callable[[ChatSession, str], None]


def _help(session: ChatSession, _argument: str) -> None:
    usages = [f"{name} {command.argument}".rstrip() for name, command in COMMANDS.items()]
    width = max(map(len, usages))
    for usage, command in zip(usages, COMMANDS.values(), strict=True):
        session.say(f"{usage:<{width}}  {command.summary}", "")
    session.say("Ctrl-C stops an answer; a second one, or Ctrl-D, leaves.", "")
    session.say('A line that ends with \\ goes on in the next; lines between """ and """ are one message.', "")


def _reset(session: ChatSession, _argument: str) -> None:
    session.conversation.reset()
    kept = "; the system text stays" if session.conversation.system else ""
    session.say(f"a new conversation{kept}")


def _system(session: ChatSession, text: str) -> None:
    conversation = session.conversation
    if not text:
        session.say(f"system text: {conversation.system or 'none'}", "")
        return
    conversation.set_system(None if text == NONE else text)
    session.say(f"system text {'set' if conversation.system else 'removed'}; it counts from the next message on")


def _retry(session: ChatSession, _argument: str) -> None:
    session.retry()


def _set(session: ChatSession, argument: str) -> None:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name, value, settings = name.replace("-", "_"), value.strip(), session.settings
    if name and name not in SETTABLE:
        hint = suggest(name, SETTABLE) or f"; settings are {', '.join(SETTABLE)}"
        raise SettingsError(f"unknown setting {name}{hint}")
    if value == DEFAULT:
        setattr(settings, name, type(settings).model_fields[name].get_default(call_default_factory=True))
    elif value:
        assign(settings, name, value)
    for field in [name] if name else SETTABLE:
        found = getattr(settings, field)
        session.say(f"{field} {'not set' if found in (None, []) else found}", "")


def _save(session: ChatSession, argument: str) -> None:
    path = _path("/save", argument)
    session.conversation.save(path)
    session.say(f"saved {_count(session)} to {path}")


def _load(session: ChatSession, argument: str) -> None:
    path, conversation = _path("/load", argument), session.conversation
    conversation.load(path)
    session.say(f"loaded {_count(session)} from {path}; context {session.usage(conversation.used)}")
    if conversation.unanswered is not None:
        session.say("the last message has no answer: /retry asks it")


def _history(session: ChatSession, _argument: str) -> None:
    messages = session.conversation.messages
    if not messages:
        session.say("nothing has been said yet")
    for message in messages:
        session.say(f"{message['role']}: {printable(message['content'])}", "")


def _quit(session: ChatSession, _argument: str) -> None:
    session.over = True


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise SettingsError(f"{command} needs a file, for example {command} chat.json")
    return Path(argument).expanduser()


def _count(session: ChatSession) -> str:
    conversation = session.conversation
    count = len(conversation.messages) + (conversation.unanswered is not None)
    return "1 message" if count == 1 else f"{count} messages"


COMMANDS = {
    "/help": ChatCommand("", "this list", _help),
    "/reset": ChatCommand("", "forget the conversation, but not the system text and the settings", _reset),
    "/system": ChatCommand("[TEXT]", f"show or change the system text; /system {NONE} removes it", _system),
    "/retry": ChatCommand("", "answer the last message again", _retry),
    "/set": ChatCommand("[NAME [VALUE]]", f"show or change a setting, as in /set temperature 0.7 (or {DEFAULT})", _set),
    "/history": ChatCommand("", "show the conversation", _history),
    "/save": ChatCommand("FILE", "write the conversation to a file, as JSON", _save),
    "/load": ChatCommand("FILE", "go on with a conversation from a file", _load),
    "/quit": ChatCommand("", "leave", _quit),
}
ALIASES = {"/exit": "/quit", "/bye": "/quit", "/?": "/help"}


def complete(line: str) -> Sequence[str]:
    """What the last word of a line may become: commands, settings, files."""
    name, *rest = line.split(" ")
    if not rest:
        return [f"{command} " for command in COMMANDS if name and command.startswith(name)]
    if len(rest) == 1 and name == "/set":
        return [f"{setting} " for setting in SETTABLE if setting.startswith(rest[0])]
    if len(rest) == 1 and name in ("/save", "/load"):
        return [f"{path}/" if Path(path).is_dir() else path for path in sorted(glob.glob(f"{glob.escape(rest[0])}*"))]
    return []
