"""`llorch serve` at a terminal: a bar while it loads, then short lines."""

from __future__ import annotations

from pathlib import Path

from tests.server.process import paced
from tests.terminal.terminal import CTRL_C, llorch

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def test_a_bar_shows_the_load_and_lines_what_follows(endless: Path, tmp_path: Path) -> None:
    opened = tmp_path / "open"
    env = {**paced(tmp_path), "PACED_OPEN_WHEN": str(opened)}
    options = ("--model", str(endless), "--provider", "paced", "--port", "0")
    with llorch(tmp_path, "serve", *options, env=env, columns=120) as terminal:
        terminal.expect("starting")
        opened.touch()
        terminal.expect("ready")
        terminal.expect("uri=http://127.0.0.1:")
        terminal.type(CTRL_C)
        assert terminal.wait() == 0
        assert '{"' not in terminal.raw  # JSON is for programs


def test_a_load_that_is_interrupted_gives_the_cursor_back(endless: Path, tmp_path: Path) -> None:
    env = {**paced(tmp_path), "PACED_OPEN_WHEN": str(tmp_path / "never")}
    options = ("--model", str(endless), "--provider", "paced", "--port", "0")
    with llorch(tmp_path, "serve", *options, env=env) as terminal:
        terminal.expect("starting")
        terminal.type(CTRL_C)
        terminal.wait()
        assert terminal.raw.rindex(SHOW_CURSOR) > terminal.raw.rindex(HIDE_CURSOR)
