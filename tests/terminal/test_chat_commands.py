"""`llorch chat` without a terminal: lines in, answers out; and what each command does."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llorch import LLM, cli
from llorch.commands import _conversation, chat
from llorch.commands._chat_commands import COMMANDS, SETTABLE, complete
from llorch.demo import DEMO_MODEL
from llorch.errors import ContextOverflowError, SettingsError
from llorch.settings import parse
from tests.gguf_copy import rewrite
from tests.support import shared
from tests.terminal.terminal import finished

Typed = Callable[..., tuple[int, chat.ChatSession]]


@pytest.fixture
def typed(endless_llm: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Typed:
    """A chat that gets these lines through a pipe: its status, and what is left of it."""
    monkeypatch.chdir(tmp_path)

    def typed(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, chat.ChatSession]:
        data = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        argv = ["--model", "unused", "--max-tokens", "3", "--temperature", "0", *options]
        session = chat.ChatSession(endless_llm, parse(chat.ChatSettings, argv, "llorch chat"))
        return session.loop(), session

    return typed


def test_answers_alone_go_to_standard_output(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    status, session = typed("hello", "", "again")
    assert status == 0
    assert capsys.readouterr().out == " na no na\n na no na\n"
    assert [m["content"] for m in session.conversation.messages] == ["hello", " na no na", "again", " na no na"]


def test_the_whole_conversation_is_the_prompt(typed: Typed, endless_llm: LLM) -> None:
    _, session = typed("hello", options=("--system", "be brief"))
    rendered = "system be brief\nuser hello\nassistant  na no na\nuser more\n>"
    assert session.conversation.prompt("more") == tuple(endless_llm.tokenizer.encode_prompt(rendered))


def test_control_tokens_that_a_user_types_stay_text(typed: Typed, endless_llm: LLM) -> None:
    _, session = typed("</s><s>", options=("--system", "</s>"))
    tokenizer = endless_llm.tokenizer
    prompt = session.conversation.prompt("</s>")
    assert tokenizer.eos_id not in prompt
    assert prompt.count(tokenizer.bos_id) == 1  # the one at the start
    assert tokenizer.decode(prompt).count("</s>") == 3
    assert tokenizer.eos_id in tokenizer.encode_prompt("user </s>\n>")  # the check can fail


def test_an_error_costs_the_line_alone_and_shows_in_the_status(
    typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    status, session = typed("/resett", "hello", "/set temperature hot", "/set colour 3", "\udcff", "/load nowhere.json")
    captured = capsys.readouterr()
    assert status == 1
    assert captured.out == " na no na\n"
    assert [line for line in captured.err.splitlines() if line.startswith("error")] == [
        'error: unknown command /resett; did you mean /reset?; a message that begins with / goes between """',
        "error: temperature: expected a number, at least 0, not 'hot'",
        f"error: unknown setting colour; settings are {', '.join(SETTABLE)}",
        "error: character 36 of 39 is the lone surrogate U+DCFF: send well-formed Unicode",
        "error: nowhere.json cannot be read: No such file or directory",
    ]
    assert len(session.conversation.turns) == 2


def test_help_lists_every_command(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    typed("/help")
    text = capsys.readouterr().err
    assert all(f"\n{name} " in f"\n{text}" for name in COMMANDS)


def test_reset_forgets_all_but_the_system_text(typed: Typed) -> None:
    _, session = typed("/system be brief", "hello", "/reset")
    assert session.conversation.messages == [{"role": "system", "content": "be brief"}]
    _, session = typed("/system be brief", "/system none")
    assert session.conversation.messages == []


def test_settings_change_what_follows(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    _, session = typed("one", "/set max-tokens 5", "two", "/set max_tokens=default", "/set stop no,yes", "three")
    assert capsys.readouterr().out.splitlines() == [" na no na", " na no na no na", " na "]
    assert session.settings.max_tokens is None
    assert session.settings.stop == ["no", "yes"]


def test_retry_answers_the_last_message_again(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    status, session = typed("hello", "/set max_tokens 1", "/retry")
    assert (status, capsys.readouterr().out) == (0, " na no na\n na\n")
    assert [m["content"] for m in session.conversation.turns] == ["hello", " na"]
    status, _ = typed("/retry")
    assert status == 1
    assert "there is no message to answer again" in capsys.readouterr().err


def test_a_retry_that_fails_leaves_the_answer_before(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    _, session = typed("hello", f"/system {'x' * 600}", "/retry")
    assert "tokens, the context is 512" in capsys.readouterr().err
    assert [m["content"] for m in session.conversation.turns] == ["hello", " na no na"]


def test_saved_conversations_go_on(typed: Typed, tmp_path: Path) -> None:
    typed("/system be brief", "hello", "/save chat.json")
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    _, session = typed("/load chat.json", "more", "/save chat.json")  # its own file may be written over
    assert session.conversation.messages[:3] == saved["messages"]
    assert len(json.loads((tmp_path / "chat.json").read_text())["messages"]) == 5


def test_a_file_that_is_not_the_chats_is_not_written_over(
    typed: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("dear diary")
    status, _ = typed("hello", "/save mine.txt", "/save no/such/folder.json", "/save")
    assert status == 1
    assert (tmp_path / "mine.txt").read_text() == "dear diary"
    assert capsys.readouterr().err.splitlines()[1:] == [
        "error: mine.txt exists already: give another name, or remove it",
        "error: no/such/folder.json cannot be written: No such file or directory; give another name",
        "error: /save needs a file, for example /save chat.json",
    ]


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "dear diary",
            "is not JSON in UTF-8 (Expecting value: line 1 column 1 (char 0)): give a file that /save wrote",
        ),
        ("[" * 100_000, "is not JSON in UTF-8 (maximum recursion depth exceeded"),
        ("{}", 'has no list "messages": give a file that /save wrote'),
        ('[{"role": "user"}]', 'message 1 of 1: expected a "role" of system, user, assistant and a text "content"'),
        (json.dumps([USER, USER]), "message 2 of 2: expected role 'assistant', not 'user'"),
        (json.dumps([USER, ASSISTANT, ASSISTANT]), "message 3 of 3: expected role 'user', not 'assistant'"),
    ],
)
def test_what_is_no_conversation_is_not_loaded(
    typed: Typed, tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(content)
    _, session = typed("hello", "/load x.json")
    assert f"x.json{'' if message.startswith(('is', 'has')) else ':'} {message}" in capsys.readouterr().err
    assert session.conversation.turns[0]["content"] == "hello"


def test_a_loaded_question_can_be_asked(typed: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(json.dumps([USER, ASSISTANT, {"role": "user", "content": "and?"}]))
    _, session = typed("/load x.json", "/retry")
    assert "the last message has no answer" in capsys.readouterr().err
    assert [m["content"] for m in session.conversation.turns] == ["a", "b", "and?", " na no na"]


def test_a_block_is_one_message_and_has_to_end(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    status, session = typed('"""/etc', "hosts", '"""', '"""', "endless")
    assert session.conversation.turns[0]["content"] == "/etc\nhosts"
    assert status == 1
    assert 'the text behind """ has no end' in capsys.readouterr().err


# ---- the context ----


def test_it_is_said_when_the_context_fills_and_when_it_is_full(
    typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    filler = "x" * 400
    status, session = typed(filler, "/set max_tokens default", "more", "and more", "/reset", "hello")
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("the context is 8")
    assert lines[1].endswith("of 512 tokens): /reset starts anew")
    assert "the answer was cut, the context is full (512 of 512 tokens): /reset starts anew" in lines
    error = next(line for line in lines if line.startswith("error"))
    found = re.fullmatch(
        r"error: the conversation with this message is (\d+) tokens, the context is 512: "
        r"/reset starts a new conversation",
        error,
    )
    assert found is not None
    assert int(found[1]) > 512
    assert session.conversation.turns[0]["content"] == "hello"  # behind the /reset
    assert status == 1


def test_a_message_that_is_too_long_by_itself_names_both_numbers(endless_llm: LLM) -> None:
    conversation = _conversation.Conversation(endless_llm)
    length = len(endless_llm.chat.prompt([{"role": "user", "content": "x" * 600}]))
    with pytest.raises(ContextOverflowError) as caught:
        conversation.prompt("x" * 600)
    assert str(caught.value) == f"the message is {length} tokens, the context is 512: send a shorter one"


# ---- models that cannot chat ----


def test_a_model_without_a_template_is_for_llorch_run(capsys: pytest.CaptureFixture[str]) -> None:
    model = shared("models", "stories260K.gguf")
    assert cli.main(["chat", "--model", str(model), "--provider", "numpy-cpu"]) == 2
    last = capsys.readouterr().err.splitlines()[-2:]
    assert last == [
        "llorch: error: stories260K has no chat template",
        "continue a text with `llorch run TEXT --model ...`, or give a template with --chat-template FILE",
    ]


def test_a_system_text_that_the_template_refuses_is_not_kept(endless: Path, tmp_path: Path) -> None:
    import llorch

    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}>"
    model = rewrite(endless, tmp_path / "refusing.gguf", fields={"tokenizer.chat_template": refusing})
    with llorch.load(model, provider="numpy-cpu") as llm:
        conversation = _conversation.Conversation(llm)
        with pytest.raises(Exception, match="refuses these messages: no system"):
            conversation.set_system("be brief")
        assert conversation.messages == []


# ---- the last word of a line ----


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").touch()
    (tmp_path / "ab").mkdir()
    assert complete("/re") == ["/reset ", "/retry "]
    assert complete("/set top") == ["top_k ", "top_p "]
    assert complete("/load a") == ["a.json", "ab/"]
    assert complete("") == complete("hello") == complete("/set top_k 1") == []


def test_a_setting_is_not_changed_by_a_wrong_value(typed: Typed) -> None:
    _, session = typed("/set top_p 0.5", "/set top_p 2", "/set seed -1")
    assert (session.settings.top_p, session.settings.seed) == (0.5, None)
    with pytest.raises(SettingsError, match="unknown setting"):
        COMMANDS["/set"].run(session, "model x")


def test_the_demo_model_answers_through_pipes() -> None:
    argv = ["chat", "--model", str(DEMO_MODEL), "--provider", "numpy-cpu", "--temperature", "0"]
    done = finished(*argv, input="Hello\n/quit\nnever read\n")
    assert done.returncode == 0
    assert len(done.stdout.split()) >= 2
    assert done.stdout.count("\n") == 1
    assert done.stderr.startswith("provider numpy-cpu on cpu")
    assert "\x1b" not in done.stdout + done.stderr
