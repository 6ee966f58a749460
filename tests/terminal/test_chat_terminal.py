"""`llorch chat` as a user has it: keys typed at a real terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.process import eventually, paced
from tests.terminal.terminal import CTRL_C, CTRL_D, TAB, UP, Terminal, llorch

Start = Callable[..., Terminal]


@pytest.fixture
def start(endless: Path, tmp_path: Path) -> Start:
    """`llorch chat` with the endless model, a token each 20 ms."""

    def start(*options: str, **env: str) -> Terminal:
        pace = {"PACED_STEP_SECONDS": "0.02", **paced(tmp_path), **env}
        return llorch(tmp_path, "chat", "--model", str(endless), "--provider", "paced", *options, env=pace)

    return start


def test_ctrl_c_stops_an_answer_and_what_was_said_stays(start: Start, tmp_path: Path) -> None:
    with start() as terminal:
        terminal.expect("> ")
        terminal.type("hello\n")
        terminal.expect(" na no na")
        terminal.type(CTRL_C)
        terminal.expect("tokens/s; context ")
        terminal.expect("> ")
        terminal.type("/save chat.json\n")
        terminal.expect("saved 2 messages to chat.json")
        terminal.type("/quit\n")
        assert terminal.wait() == 0
    user, assistant = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert user == {"role": "user", "content": "hello"}
    words = assistant["content"].split()
    assert 3 <= len(words) < 500  # the context ends it at 512
    assert words == ["na", "no"] * (len(words) // 2) + ["na"] * (len(words) % 2)


def test_ctrl_c_before_the_first_word_leaves_no_half_of_a_turn(start: Start, tmp_path: Path) -> None:
    stall, reached = tmp_path / "stall", tmp_path / "stall.reached"
    with start("--chunk", "1", PACED_STALL_WHEN=str(stall)) as terminal:
        terminal.expect("> ")
        stall.touch()
        terminal.type("hello\n")
        eventually(reached.exists, seconds=60, what="the step that stalls")
        terminal.type(CTRL_C)
        terminal.expect("^C")
        stall.unlink()
        terminal.expect("nothing was said")
        terminal.type("/history\n")
        terminal.expect("nothing has been said yet")
        terminal.type("/retry\n")
        terminal.expect(" na no")


def test_ctrl_c_twice_ends_even_where_a_step_hangs(start: Start, tmp_path: Path) -> None:
    stall, reached = tmp_path / "stall", tmp_path / "stall.reached"
    with start(PACED_STALL_WHEN=str(stall)) as terminal:
        terminal.expect("> ")
        stall.touch()
        terminal.type("hello\n")
        eventually(reached.exists, seconds=60, what="the step that stalls")
        terminal.type(CTRL_C)
        terminal.expect("^C")
        terminal.type(CTRL_C)
        assert terminal.wait() == 130
        assert "Traceback" not in terminal.shown


def test_ctrl_c_twice_at_the_prompt_leaves(start: Start) -> None:
    with start() as terminal:
        terminal.expect("> ")
        terminal.type("not sent")
        terminal.expect("not sent")
        terminal.interrupt_prompt()
        terminal.expect("Ctrl-C again or Ctrl-D leaves")
        terminal.expect("> ")
        terminal.type("/history\n")  # so the next Ctrl-C is a first one again
        terminal.expect("nothing has been said yet")
        terminal.expect("> ")
        terminal.interrupt_prompt()
        terminal.expect("Ctrl-C again or Ctrl-D leaves")
        terminal.expect("> ")
        terminal.interrupt_prompt()
        assert terminal.wait() == 130


def test_ctrl_d_leaves(start: Start) -> None:
    with start() as terminal:
        terminal.expect("> ")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0


def test_lines_are_edited_completed_and_remembered(start: Start) -> None:
    with start() as terminal:
        terminal.expect("> ")
        terminal.type("/set top" + 3 * TAB)  # what they share, and then both
        terminal.expect("top_k ")
        terminal.expect("top_p ")
        terminal.type("k 7\n")
        terminal.expect("top_k 7")
        terminal.type(UP + "5\n")
        terminal.expect("top_k 75")
        terminal.type("/his" + TAB + "\n")
        terminal.expect("nothing has been said yet")


def test_several_lines_are_one_message(start: Start, tmp_path: Path) -> None:
    with start("--max-tokens", "1") as terminal:
        terminal.expect("> ")
        terminal.type('one \\\ntwo\n"""\n/etc\n\nhosts"""\n')
        terminal.expect("cut at max_tokens 1")
        terminal.expect("cut at max_tokens 1")
        terminal.type("/save chat.json\n")
        terminal.expect("saved 4 messages")
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["one \ntwo", "/etc\n\nhosts"]


def test_pasted_lines_are_one_message(start: Start, tmp_path: Path) -> None:
    with start("--max-tokens", "1") as terminal:
        terminal.expect("> ")
        terminal.type("\x1b[200~one\ntwo\x1b[201~\n")  # as a terminal marks what is pasted
        terminal.expect("cut at max_tokens 1")
        terminal.type("/save chat.json\n")
        terminal.expect("saved 2 messages")
    assert json.loads((tmp_path / "chat.json").read_text())["messages"][0]["content"] == "one\ntwo"


@pytest.mark.parametrize(("env", "colourful"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_are_for_terminals_that_have_them(start: Start, env: dict[str, str], colourful: bool) -> None:
    with start("--max-tokens", "1", **env) as terminal:
        terminal.expect("> ")
        terminal.type("hello\n")
        terminal.expect("cut at max_tokens 1")
        terminal.expect("> ")  # a Ctrl-D before the prompt is lost to the terminal's line mode
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
        assert ("\x1b[33m" in terminal.raw) is colourful
        assert ("\x1b[2m" in terminal.raw) is colourful or "NO_COLOR" in env  # dim is no colour
