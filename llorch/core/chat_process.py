"""The process that renders chat templates. `chat_renderer.py` starts it; nothing imports it.

A template is a program from a model file. jinja2's sandbox keeps it from Python's internals but not from looping for
ever or filling the memory, and no thread can be stopped in the middle of `"x" * 10**9`: a process can. Its address
space is limited here, its time by a timer whose signal ends it (and by the parent, which kills it).

One JSON object a line each way: {"template", "context"} in, {"text"} or {"error", "message"} out; without a context the
template is only compiled. The first line out, {"ready"}, comes when all is imported. The arguments are the limits:
seconds, bytes, characters.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Refusal(TemplateError):
    """What a template says of messages that it does not take, with raise_exception."""


class TooLongError(Exception):
    pass


class GenerationTag(Extension):
    """`{% generation %}`: marks the assistant's words for training. Here its body is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> None:
    raise Refusal(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """json.dumps, where jinja2's own filter escapes for HTML: models were trained on the former."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """As Hugging Face's apply_chat_template sets it up, which templates are written for."""
    extensions = ["jinja2.ext.loopcontrols", GenerationTag]
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    found.filters["tojson"] = _tojson
    found.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return found


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    return environment().from_string(source)


def render(source: str, context: dict[str, Any], characters: int) -> str:
    """Raises TooLongError as soon as more than this many characters have come."""
    pieces, length = [], 0
    for piece in _compiled(source).generate(context):
        length += len(piece)
        if length > characters:
            raise TooLongError(f"it writes more than {characters:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(request: dict[str, Any], characters: int, memory: int) -> dict[str, str]:
    try:
        if "context" not in request:
            _compiled(request["template"])
            return {"text": ""}
        return {"text": render(request["template"], request["context"], characters)}
    except Refusal as error:
        return {"error": "refused", "message": str(error)}
    except TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {error.message}"}
    except SecurityError as error:
        return {"error": "failed", "message": f"it reaches for what the sandbox forbids: {error}"}
    except TooLongError as error:
        return {"error": "failed", "message": str(error)}
    except MemoryError:
        return {"error": "failed", "message": f"it needs more than {memory >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "failed", "message": "it calls itself too deeply"}
    except Exception as error:  # noqa: BLE001 -- a template may raise what Python can raise, and all of it is told
        return {"error": "failed", "message": f"{type(error).__name__}: {error}"}


def limit_memory(size: int) -> None:
    """Lets this process take `size` bytes more than it has. Systems without such a limit have that of time."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        most = pages * resource.getpagesize() + size
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        return


def timer() -> Callable[[float], object]:
    """Sets an alarm that ends the process, 0 takes it back. A parent kills a process that is late, if it lives."""
    if not hasattr(signal, "setitimer"):
        return lambda seconds: None
    return partial(signal.setitimer, signal.ITIMER_REAL)


def main() -> None:
    seconds, memory, characters = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    alarm, out = timer(), sys.stdout.buffer
    environment()
    limit_memory(memory)
    out.write(b'{"ready": ""}\n')
    out.flush()
    for line in sys.stdin.buffer:
        alarm(seconds + 1)
        found = json.dumps(answer(json.loads(line), characters, memory)).encode()
        alarm(0)
        out.write(found + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
