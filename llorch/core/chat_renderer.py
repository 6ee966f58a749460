"""Renders chat templates in a process of their own, which is ended when one takes too long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from llorch.errors import ChatTemplateError, EngineError

SECONDS = 5.0  # an honest template takes a thousandth of that
MEMORY = 256 << 20  # bytes beside Python itself
CHARACTERS = 4 << 20  # of a rendered prompt: a million tokens
START_SECONDS = 60.0
_PROGRAM = Path(__file__).with_name("chat_process.py")


class Renderer:
    """Any number of threads may use one: they take turns. The process starts with the first template."""

    def __init__(self, *, seconds: float = SECONDS, memory: int = MEMORY, characters: int = CHARACTERS) -> None:
        self._seconds, self._memory, self._characters = seconds, memory, characters
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._closed = False

    def compile(self, template: str) -> None:
        """Raises ChatTemplateError, with the line, for a template that jinja2 cannot read."""
        self._ask({"template": template})

    def render(self, template: str, context: dict[str, Any]) -> str:
        """The text of a template. Raises ChatTemplateError where it fails, refuses the messages, or is stopped."""
        return self._ask({"template": template, "context": context})

    def close(self) -> None:
        """Ends the process; nothing can be rendered afterwards."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()  # before its turn comes: whoever has it may be in an endless template
        with self._lock:
            self._end()

    def _ask(self, request: dict[str, Any]) -> str:
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            if self._closed:
                raise EngineError("the model is closed")
            found = self._exchange(line)
        if "error" not in found:
            return found["text"]
        message = found["message"][:1000]
        if found["error"] == "refused":
            raise ChatTemplateError(f"the chat template refuses these messages: {message}")
        if found["error"] == "syntax":
            raise ChatTemplateError(f"the chat template cannot be compiled, {message}")
        raise ChatTemplateError(f"the chat template was stopped: {message}")

    def _exchange(self, line: bytes) -> dict[str, str]:
        process = self._running()
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        found = _answer(process, line, self._seconds, kill)
        if found is not None:
            return found
        status = self._end()
        if late.is_set():
            return {"error": "failed", "message": f"it took longer than {self._seconds:g} s"}
        return {"error": "failed", "message": f"it ended its process (status {status})"}

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, ready for a line; a new one where there is none or it has died."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        # without llorch's own variables, for one of them holds the API keys
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("LLORCH_")}
        limits = [str(self._seconds), str(self._memory), str(self._characters)]
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )
        if _answer(process, b"", START_SECONDS, process.kill) is None:
            assert process.stderr is not None
            process.kill()
            reason = process.stderr.read().decode(errors="replace").strip()
            raise EngineError(f"the process that renders chat templates did not start: {reason[-500:] or 'no reason'}")
        return process

    def _end(self) -> int | None:
        """Ends the process, if there is one; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        status = process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # what was still to be written to it
                continue
        return status


def _answer(process: subprocess.Popen[bytes], line: bytes, seconds: float, kill: Any) -> dict[str, str] | None:
    """Sends a line and waits for one; None where the process ended instead. After `seconds`, `kill` is called."""
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(line)
        process.stdin.flush()
        found = process.stdout.readline()
    except BrokenPipeError:
        return None
    finally:
        timer.cancel()
    if not found.endswith(b"\n"):
        return None
    answer: dict[str, str] = json.loads(found)
    return answer
