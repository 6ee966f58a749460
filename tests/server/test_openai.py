"""The OpenAI API, through OpenAI's own client and over plain HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import Start
from tests.server.process import Server, eventually, run
from tests.support import with_metadata

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
MODEL = "stories260K"
USER: Any = [{"role": "user", "content": "Once upon a time"}]
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def chatty(start: Start, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A model with a chat template in its file."""
    path = tmp_path_factory.mktemp("chat") / "chatty.gguf"
    model = with_metadata(stories, path, tokenizer__chat_template=TEMPLATE)
    return start("--keep-alive", "0.2", model=model, env={"LLORCH_API_KEY": "key"}).wait_healthy()


def connect(server: Server, key: str = "key") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def ai(chatty: Server) -> Iterator[openai.OpenAI]:
    with connect(chatty) as client:
        yield client


@pytest.fixture(scope="module")
def expected(server: Server) -> str:
    """What /execute says of the same prompt."""
    with server.client() as client:
        events = run(client, job_id="reference", prompt="Once upon a time", temperature=0, max_tokens=8)
    return "".join(event["t"] for event in events if event["type"] == "token")


def test_a_chat_is_answered_as_execute_answers_its_rendered_prompt(ai: openai.OpenAI, expected: str) -> None:
    found = ai.chat.completions.create(messages=USER, **GREEDY)
    assert found.id.startswith("chatcmpl-")
    assert found.choices[0].message.content == expected
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert found.usage.completion_tokens == 8
    assert found.usage.total_tokens == found.usage.prompt_tokens + 8


def test_a_stream_holds_the_same_text_and_ends_with_the_usage(ai: openai.OpenAI, expected: str) -> None:
    options: Any = {"include_usage": True}
    chunks = list(ai.chat.completions.create(messages=USER, stream=True, stream_options=options, **GREEDY))
    *others, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in others) == expected
    assert others[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in others][-1] == "length"
    assert all(chunk.usage is None for chunk in others)
    assert last.usage is not None
    assert last.usage.completion_tokens == 8
    assert not last.choices


def test_a_stream_over_plain_http_ends_with_done(chatty: Server) -> None:
    with chatty.client(headers={"Authorization": "Bearer key"}) as client:
        response = client.post("/v1/chat/completions", json={"messages": USER, "stream": True, **GREEDY})
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert all(json.loads(line)["object"] == "chat.completion.chunk" for line in data[:-1])
    assert "usage" not in json.loads(data[0])


def test_answers_of_one_request_have_seeds_one_apart(ai: openai.OpenAI) -> None:
    sampling: Any = {"model": MODEL, "temperature": 1.5, "max_tokens": 12}
    found = ai.chat.completions.create(messages=USER, n=3, seed=7, **sampling)
    texts = [choice.message.content for choice in found.choices]
    assert len(set(texts)) == 3
    assert found.usage is not None
    alone = ai.chat.completions.create(messages=USER, seed=8, **sampling)
    assert alone.choices[0].message.content == texts[1]


def test_a_stop_string_is_cut_off(ai: openai.OpenAI, expected: str) -> None:
    stop = expected[8:11]
    found = ai.chat.completions.create(messages=USER, stop=stop, **GREEDY)
    assert found.choices[0].message.content == expected[: expected.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_logprobs_in_both_shapes(ai: openai.OpenAI, expected: str) -> None:
    chat = ai.chat.completions.create(messages=USER, logprobs=True, top_logprobs=2, **GREEDY).choices[0].logprobs
    assert chat is not None
    assert chat.content is not None
    assert b"".join(bytes(one.bytes or []) for one in chat.content).decode() == expected
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob == one.logprob for one in chat.content)
    plain = ai.completions.create(prompt="Once upon a time", logprobs=2, **GREEDY).choices[0].logprobs
    assert plain is not None
    assert "".join(plain.tokens or []) == expected
    assert plain.token_logprobs == pytest.approx([one.logprob for one in chat.content], abs=1e-5)
    assert plain.text_offset == [len("".join((plain.tokens or [])[:i])) for i in range(8)]


def test_a_bias_forbids_what_would_have_come(ai: openai.OpenAI, chatty: Server) -> None:
    one: Any = {**GREEDY, "max_tokens": 1}
    text = ai.completions.create(prompt=[1, 403, 407], **one).choices[0].text
    tops = {i: ai.completions.create(prompt=[1, 403, 407], logit_bias={str(i): -100}, **one) for i in (300, 301)}
    assert all(found.choices[0].text == text for found in tops.values())
    forced = ai.completions.create(prompt=[1, 403, 407], logit_bias={"300": 100}, **one).choices[0].text
    assert forced != text


def test_prompts_of_each_kind(ai: openai.OpenAI, expected: str) -> None:
    found = ai.completions.create(prompt=["Once upon a time", "Lily"], n=2, **GREEDY)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices][:2] == [expected] * 2
    alone = ai.completions.create(prompt="Lily", **GREEDY)
    assert found.choices[2].text == alone.choices[0].text
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Once"}]}]
    assert ai.chat.completions.create(messages=parts, **GREEDY).choices[0].message.content


def test_control_tokens_in_a_message_are_text(ai: openai.OpenAI) -> None:
    def prompt_tokens(content: str) -> int:
        messages: Any = [{"role": "user", "content": content}]
        usage = ai.chat.completions.create(messages=messages, **GREEDY).usage
        assert usage is not None
        return usage.prompt_tokens

    assert prompt_tokens("a</s>") > prompt_tokens("a") + 1
    usage = ai.completions.create(prompt="<s>a", **GREEDY).usage
    assert usage is not None
    assert usage.prompt_tokens == prompt_tokens("a")  # parsed there, and no second BOS


def test_models(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == [MODEL]
    assert ai.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        ai.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        ai.chat.completions.create(model="other", messages=USER)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"stop": [""]}, "stop[0]"),
        ({"logit_bias": {"512": 1}}, "logit_bias[512]"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ],
)
def test_a_field_that_is_wrong_is_named(ai: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(model=MODEL, messages=USER, extra_body=fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(("fields", "param"), [({"echo": True}, "echo"), ({"suffix": "x"}, "suffix")])
def test_what_completions_do_not_have_is_refused_by_name(ai, fields, param) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ai.completions.create(model=MODEL, prompt="a", extra_body=fields)
    assert caught.value.param == param


def test_unknown_parameters_and_nulls_are_passed_over(ai: openai.OpenAI, expected: str) -> None:
    extra = {"service_tier": "auto", "nonsense": [1], "top_p": None, "response_format": {"type": "text"}}
    found = ai.chat.completions.create(messages=USER, extra_body=extra, **GREEDY)
    assert found.choices[0].message.content == expected


def test_a_context_overflow_tells_both_numbers(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"prompt is \d{4} tokens, the context is 512") as caught:
        ai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a" * 2000}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_a_wrong_key_is_an_authentication_error(chatty: Server) -> None:
    with connect(chatty, "wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_a_model_without_a_template_names_completions(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json={"messages": USER})
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]


def test_a_full_queue_is_a_503_and_a_client_that_leaves_cancels_all(slow: Server, slow_client: httpx.Client) -> None:
    body = {"prompt": "Once", "temperature": 0, "max_tokens": 400, "n": 3, "stream": True}
    with slow_client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()  # kept: its end would close the connection
        next(lines)
        with connect(slow) as client, pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model=MODEL, prompt="a")
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
    names = ("llorch_running_requests", "llorch_queue_depth", "llorch_kv_blocks_used")
    eventually(lambda: not any(slow.metrics()[name] for name in names), 5, "an idle engine")


def test_chat_template_overrides(start: Start, stories: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no ' + messages[0].role) }}")
    server = start("--chat-template", str(tmp_path / "t.jinja")).wait_healthy()
    with connect(server) as client, pytest.raises(openai.BadRequestError, match="refuses these messages: no user"):
        client.chat.completions.create(model=MODEL, messages=USER)
