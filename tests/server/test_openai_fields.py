"""Fields of the OpenAI API: what other engines take beside them, what asks for nothing, and the codes of errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import Start
from tests.server.process import Server, eventually
from tests.server.test_openai import GREEDY, TEMPLATE, USER, connect


@pytest.fixture(scope="module")
def chatty(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template = tmp_path_factory.mktemp("template") / "plain.jinja"
    template.write_text(TEMPLATE)
    server = start("--chat-template", str(template)).wait_healthy()
    yield server
    server.close()


@pytest.fixture(scope="module")
def ai(chatty: Server) -> Iterator[openai.OpenAI]:
    with connect(chatty) as client:
        yield client


@pytest.fixture(scope="module")
def expected(ai: openai.OpenAI) -> str:
    """What is said where nothing else is asked for."""
    return str(ai.completions.create(prompt="Once upon a time", **GREEDY).choices[0].text)


# what other engines' clients send, and each would change the text
OF_OTHERS: dict[str, Any] = {
    "grammar": 'root ::= "a"',
    "json_schema": {"type": "object"},
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_choice": ["a", "b"],
    "guided_grammar": 'root ::= "a"',
    "structured_outputs": {"regex": "a+"},
    "format": "json",
    "response_format": {"type": "json_object"},
    "ignore_eos": True,
    "min_tokens": 4,
    "stop_token_ids": [5],
}
OF_CHATS = {"continue_final_message": True, "add_generation_prompt": False}


def complete(ai: openai.OpenAI, kind: str, **extra: Any) -> Any:
    if kind == "chat":
        return ai.chat.completions.create(messages=USER, extra_body=extra, **GREEDY)
    return ai.completions.create(prompt="Once upon a time", extra_body=extra, **GREEDY)


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_what_other_engines_have_and_this_one_has_not_is_refused_by_name(ai: openai.OpenAI, kind: str) -> None:
    for name, value in (OF_OTHERS | (OF_CHATS if kind == "chat" else {})).items():
        with pytest.raises(openai.BadRequestError) as caught:
            complete(ai, kind, **{name: value})
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_of_these_what_asks_for_nothing_is_taken(ai: openai.OpenAI, kind: str, expected: str) -> None:
    names = [name for name in OF_OTHERS if name != "response_format"]
    for nothing in (None, False, "", [], {}):
        extra = dict.fromkeys(names, nothing) | {"add_generation_prompt": True, "continue_final_message": False}
        found = complete(ai, kind, **extra).choices[0]
        assert (found.message.content if kind == "chat" else found.text) == expected


def test_names_of_other_unknown_fields_are_logged_a_few_and_short(ai: openai.OpenAI, chatty: Server) -> None:
    extra = {f"odd_{i}": "secret" for i in range(20)} | {"a secret": 1, "s" * 41: 1, "line\nbreak": 1}
    found = complete(ai, "chat", **extra)
    (line,) = eventually(lambda: chatty.logged("job accepted", job_id=found.id))
    assert line["unknown_fields"] == sorted(f"odd_{i}" for i in range(20))[:8]
    assert "secret" not in str(chatty.lines)
    (line,) = eventually(lambda: chatty.logged("job accepted", job_id=complete(ai, "chat").id))
    assert "unknown_fields" not in line


def test_what_clients_send_to_say_nothing_is_taken(ai: openai.OpenAI, expected: str) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for extra in (
        {"top_k": -1},
        {"stop": ""},
        {"tools": []},
        {"tools": tools, "tool_choice": "none"},
        {"functions": tools, "function_call": "none"},
        {"max_tokens": 8.0, "n": 1.0},
    ):
        assert complete(ai, "chat", **extra).choices[0].message.content == expected, extra
    for kind in ("chat", "completions"):
        found = complete(ai, kind, max_tokens=-1, logit_bias={"1": -100, "2": -100})
        assert (found.usage.total_tokens, found.choices[0].finish_reason) == (512, "length")


CODES = [
    ({"temperature": 3}, "out_of_range", "0.0 to 2.0"),
    ({"stop": ["a"] * 17}, "out_of_range", "16"),
    ({"logit_bias": {"512": 1}}, "out_of_range", "511"),
    ({"n": "x"}, "invalid_type", "integer"),
    ({"stream": 1}, "invalid_type", "boolean"),
    ({"prompt": None}, "missing_required_parameter", "prompt"),
    ({"echo": True}, "unsupported_parameter", "echo"),
    ({"stop": [""]}, "invalid_value", "stop"),
    ({"stream_options": {}}, "invalid_value", "stream"),
]


@pytest.mark.parametrize(("fields", "code", "told"), CODES)
def test_codes_are_names_and_messages_hold_the_bounds(
    client: httpx.Client, fields: dict[str, Any], code: str, told: str
) -> None:
    response = client.post("/v1/completions", json={"prompt": "a"} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, code)
    assert told in error["message"]


def test_what_is_no_json_has_its_code(client: httpx.Client) -> None:
    assert client.post("/v1/completions", content=b"{").json()["error"]["code"] == "invalid_json"
    assert client.post("/v1/completions", content=b"[]").json()["error"]["code"] == "invalid_type"
