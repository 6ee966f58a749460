"""Chat templates in model files, and control tokens that a user's words never become."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llorch
from llorch.core.chat import GUARD, Chat
from llorch.core.gguf import GGUFFile
from llorch.core.tokenizer import Tokenizer
from llorch.errors import ChatTemplateError, GGUFError, InvalidRequestError, SettingsError
from tests.gguf_copy import rewrite
from tests.support import shared

# a vocabulary of letters, marks and bytes, and special tokens whose texts get in each other's way
CONTROL = ["<s>", "</s>", "<|a|>", "<|ab|>", "|>", "<|a|><|ab|>", "x"]
USER_DEFINED = ["<u>", "<|", "=="]
LETTERS = [*"ab<>|=/sux \n", "\u2581"]
LETTERS = [letter for letter in LETTERS if letter not in CONTROL and letter != " "]

CHATML = "{% for m in messages %}<|a|>{{ m.role }}\n{{ m.content }}<|ab|>\n{% endfor %}"
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"  # nothing between what the user controls
STRIPPED = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"


def write_vocabulary(path: Path, **templates: str) -> Path:
    kinds = gguf.TokenType
    tokens = ["<unk>", *CONTROL, *USER_DEFINED, *(f"<0x{b:02X}>" for b in range(256)), *LETTERS]
    types = [kinds.UNKNOWN] + [kinds.CONTROL] * len(CONTROL) + [kinds.USER_DEFINED] * len(USER_DEFINED)
    types += [kinds.BYTE] * 256 + [kinds.NORMAL] * len(LETTERS)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, template in templates.items():
        writer.add_string(key.replace("__", "."), template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "v.gguf"))


@pytest.fixture(scope="module")
def chat(tokenizer: Tokenizer) -> Iterator[Callable[[str], Chat]]:
    made: dict[str, Chat] = {}

    def make(template: str) -> Chat:
        return made.setdefault(template, Chat(tokenizer, {"default": template}))

    yield make
    for one in made.values():
        one.close()


def user(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content} for content in contents]


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The control tokens among ids, by their texts."""
    return [tokenizer.text(i) for i in ids if tokenizer.text(i) in {*CONTROL, "<unk>"}]


def test_control_tokens_match_in_the_template_and_never_in_a_message(tokenizer, chat) -> None:
    ids = chat(CHATML).prompt(user("a</s>b<|ab|><s>"))
    assert controls(tokenizer, ids) == ["<s>", "<|a|>", "<|ab|>"]  # BOS, and the two of the template
    assert tokenizer.decode(ids).strip() == "user\na</s>b<|ab|><s>\n".replace(" ", "").strip()
    # the twin: rendered text that is not guarded
    ids = tokenizer.encode_prompt("<|a|>user\na</s>b<|ab|><s><|ab|>\n")
    assert controls(tokenizer, ids) == ["<s>", "<|a|>", "</s>", "<|ab|>", "<s>", "<|ab|>"]


def test_user_defined_tokens_match_in_template_and_message(tokenizer, chat) -> None:
    ids = chat("=={{ messages[0].content }}").prompt(user("a<u>b<|ab|>=="))
    texts = [tokenizer.text(i) for i in ids]
    assert texts.count("==") == 2
    assert "<u>" in texts
    assert "<|" in texts  # the user-defined token within the control token's text, which the guard has broken
    assert controls(tokenizer, ids) == ["<s>"]


pieces = st.lists(
    st.sampled_from([*CONTROL, *USER_DEFINED, *LETTERS, " ", GUARD, "<|", "|", "a|", "<|a", "b|>", "/s>", "</", "é"]),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("template", [CHATML, BARE, STRIPPED])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(pieces, min_size=1, max_size=4))
def test_whatever_a_user_writes_the_control_tokens_are_the_templates(tokenizer, chat, template, contents) -> None:
    ids = chat(template).prompt(user(*contents))
    expected = ["<s>"] + ["<|a|>", "<|ab|>"] * (len(contents) if template == CHATML else 0)
    assert controls(tokenizer, ids) == expected


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=pieces.filter(lambda text: GUARD not in text))
def test_guards_leave_no_trace_in_the_tokens(tokenizer, chat, content) -> None:
    """A message alone is what the text alone is to the tokenizer, which parses no control tokens there."""
    assert chat(BARE).prompt(user(content)) == tokenizer.encode(content)


def test_every_control_token_of_a_real_vocabulary_is_broken() -> None:
    tokenizer = Tokenizer.from_gguf(shared("vocabs", "ggml-vocab-llama-spm.gguf"))
    chat = Chat(tokenizer, {"default": "<s>[INST] {{ messages[0].content }} [/INST]"})
    try:
        text = "".join(sorted(tokenizer.control_texts)) * 2
        assert text
        ids = chat.prompt(user(text))
        assert [i for i in ids if not tokenizer.token_bytes(i)] == [tokenizer.bos_id]
        assert tokenizer.decode(ids) == f"[INST] {text} [/INST]"
    finally:
        chat.close()


def test_a_guard_changes_nothing_that_templates_look_at(tokenizer, chat) -> None:
    template = (
        "{% set c = messages[0].content %}{{ c.startswith('<u>') }} {{ '=' in c }} {{ c.split('==')[-1] }} "
        "{{ c.strip() == c }} {{ messages[0].role == 'user' }} {{ c is string }}"
    )
    assert chat(template).render(user("<u>b==a > b")) == "True True a > b True True True"


# ---- BOS ----


@pytest.mark.parametrize("template", ["{{ bos_token }}a", "<s>a", "a"])
def test_there_is_one_bos_whoever_writes_it(tokenizer, chat, template) -> None:
    ids = chat(template).prompt(user("hi"))
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1


def test_a_user_can_write_no_bos(tokenizer, chat) -> None:
    ids = chat(BARE).prompt(user("<s>"))
    assert ids.count(tokenizer.bos_id) == 1
    assert len(ids) > 2


def test_no_bos_is_added_where_the_vocabulary_wants_none(tmp_path) -> None:
    source = write_vocabulary(tmp_path / "v.gguf")
    path = rewrite(source, tmp_path / "w.gguf", fields={"tokenizer.ggml.add_bos_token": False})
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.bos_id not in tokenizer.encode_prompt("a")
    assert tokenizer.encode_prompt("<s>a")[0] == tokenizer.bos_id


def test_no_eos_ends_a_prompt(tmp_path) -> None:
    source = write_vocabulary(tmp_path / "v.gguf")
    tokenizer = Tokenizer.from_gguf(rewrite(source, tmp_path / "w.gguf", fields={"tokenizer.ggml.add_eos_token": True}))
    assert tokenizer.encode("a")[-1] == tokenizer.eos_id
    assert tokenizer.encode_prompt("a")[-1] != tokenizer.eos_id


# ---- what a template gets ----


def test_a_template_gets_the_messages_the_tokens_and_variables(tokenizer, chat) -> None:
    template = (
        "{{ bos_token }}{{ eos_token }}{{ tools }}{{ documents }}{{ add_generation_prompt }}"
        "{{ messages[0].name }}{{ enable_thinking }}"
    )
    message = {"role": "user", "content": "", "name": "ada"}
    rendered = chat(template).render([message], add_generation_prompt=False, variables={"enable_thinking": True})
    assert rendered == "<s></s>NoneNoneFalseadaTrue"


def test_variables_are_protected_and_cannot_replace_the_messages(tokenizer, chat) -> None:
    assert chat("{{ v }}").render([], variables={"v": "</s>"}) == f"<{GUARD}/s>"
    with pytest.raises(InvalidRequestError, match="messages"):
        chat("{{ v }}").render([], variables={"messages": []})


@pytest.mark.parametrize(("template", "role"), [(CHATML, "system"), ("{# developer #}" + CHATML, "developer")])
def test_developers_speak_as_the_system_where_the_template_knows_none(chat, template, role) -> None:
    assert chat(template).render([{"role": "developer", "content": "a"}]).startswith(f"<|a|>{role}\n")


# ---- which template ----


def opened(path: Path, chosen: str | Path | None = None) -> Chat:
    with GGUFFile.open(path) as file:
        return Chat.from_gguf(file, Tokenizer.from_gguf(file), chosen)


def rendered(path: Path, chosen: str | Path | None = None) -> str:
    chat = opened(path, chosen)
    try:
        return chat.render([])
    finally:
        chat.close()


def test_the_default_template_is_used_and_a_name_or_a_file_overrides_it(tmp_path) -> None:
    named = {"tokenizer.chat_template.tool_use": "tools", "tokenizer.chat_template.rag": "rag"}
    path = write_vocabulary(tmp_path / "v.gguf", tokenizer__chat_template="plain", **named)
    (tmp_path / "mine.jinja").write_text("mine")
    assert opened(path).names == ["default", "rag", "tool_use"]
    assert rendered(path) == "plain"
    assert rendered(path, "rag") == "rag"
    assert rendered(path, tmp_path / "mine.jinja") == "mine"


def test_the_only_named_template_is_the_default(tmp_path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", **{"tokenizer.chat_template.only": "only"})
    assert rendered(path) == "only"


def test_several_named_templates_without_a_default_are_an_error_that_lists_them(tmp_path) -> None:
    named = {"tokenizer.chat_template.a": "a", "tokenizer.chat_template.b": "b"}
    path = write_vocabulary(tmp_path / "v.gguf", **named)
    assert not opened(path).available
    with pytest.raises(ChatTemplateError, match=r"\(a, b\): start llorch with --chat-template NAME"):
        rendered(path)


def test_a_model_without_a_template_names_what_to_do(tmp_path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf")
    assert not opened(path).available
    with pytest.raises(ChatTemplateError, match=r"no chat template: .*/v1/completions, or .*--chat-template FILE"):
        rendered(path)


def test_a_template_of_a_wrong_type_is_an_error_of_the_file(tmp_path) -> None:
    source = write_vocabulary(tmp_path / "v.gguf")
    path = rewrite(source, tmp_path / "w.gguf", fields={"tokenizer.chat_template": True})
    with pytest.raises(GGUFError, match=r"tokenizer\.chat_template"):
        opened(path)


def test_a_template_in_the_file_that_does_not_compile_is_told_at_first_use(tmp_path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", tokenizer__chat_template="{% for %}")
    chat = opened(path)
    try:
        assert "cannot be compiled, line 1" in str(chat.problem())
        with pytest.raises(ChatTemplateError, match="cannot be compiled, line 1"):
            chat.render([])
    finally:
        chat.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n{% for %}", "cannot be compiled, line 2"),
        (b"\xff", "not UTF-8"),
        (b" " * ((1 << 20) + 1), "1048577 bytes, at most 1048576"),
        (None, "no file that can be read"),
    ],
)
def test_a_chosen_template_that_cannot_be_used_is_an_error_at_load(tmp_path, content, message) -> None:
    path, chosen = write_vocabulary(tmp_path / "v.gguf"), tmp_path / "t.jinja"
    if content is not None:
        chosen.write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        opened(path, chosen)


def test_a_loaded_model_answers_a_conversation(tmp_path) -> None:
    model = shared("models", "stories260K.gguf")
    path = rewrite(model, tmp_path / "m.gguf", fields={"tokenizer.chat_template": BARE})
    messages: list[dict[str, Any]] = user("Once upon", " a time")
    with llorch.load(path, provider="numpy-cpu") as llm, llorch.load(model, provider="numpy-cpu") as plain:
        answer = "".join(llm.generate(llm.chat.prompt(messages), max_tokens=8, temperature=0.0))
        assert answer == "".join(plain.generate("Once upon a time", max_tokens=8, temperature=0.0))
        assert not plain.chat.available
