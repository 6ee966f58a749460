"""The OpenAI API, through OpenAI's own client and over plain HTTP."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import llorch
from tests.gguf_copy import rewrite
from tests.server.conftest import Start
from tests.server.process import Server, eventually, run

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
MODEL = "stories260K"
USER: Any = [{"role": "user", "content": "Once upon a time"}]
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def chatty(start: Start, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A model with a chat template in its file."""
    path = tmp_path_factory.mktemp("chat") / "chatty.gguf"
    model = rewrite(stories, path, fields={"tokenizer.chat_template": TEMPLATE})
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


# ---- penalties ----

PROMPT = "Once upon a time there was a little girl. She was a little girl"
PENALTIES = [{"frequency_penalty": 1.5}, {"presence_penalty": 2.0}, {"frequency_penalty": 0.7, "presence_penalty": -1}]


def check_penalties(found: Any, prompt: list[int], texts: dict[str, int], frequency: float, presence: float) -> None:
    """Each token is the best of the model's own distribution, less the penalties of the 64 tokens before it."""
    ids = [texts[text] for text in found.tokens]
    for i, top in enumerate(found.top_logprobs):
        seen = Counter([*prompt, *ids[:i]][-64:])
        scores = {
            t: logprob - frequency * seen[texts[t]] - presence * (seen[texts[t]] > 0) for t, logprob in top.items()
        }
        assert scores[found.tokens[i]] == pytest.approx(max(scores.values()), abs=1e-4), (i, scores)


@pytest.mark.parametrize("penalties", PENALTIES)
def test_penalties_are_taken_from_what_was_there_before(
    ai: openai.OpenAI, stories: Path, penalties: dict[str, float]
) -> None:
    tokenizer = llorch.Tokenizer.from_gguf(stories)
    prompt = tokenizer.encode(PROMPT)
    names = {i: tokenizer.token_bytes(i).decode(errors="replace") or tokenizer.text(i) for i in range(512)}
    texts = {name: i for i, name in names.items()}  # of a byte's token and a word's of one text, the word's
    options: Any = {"model": MODEL, "temperature": 0, "max_tokens": 40, "logprobs": 20}
    penalised = ai.completions.create(prompt=prompt, **options, **penalties).choices[0].logprobs
    both = penalties.get("frequency_penalty", 0.0), penalties.get("presence_penalty", 0.0)
    check_penalties(penalised, prompt, texts, *both)
    plain = ai.completions.create(prompt=prompt, **options).choices[0].logprobs
    assert plain is not None
    assert penalised is not None
    assert plain.tokens != penalised.tokens
    check_penalties(plain, prompt, texts, 0, 0)
    with pytest.raises(AssertionError):
        check_penalties(plain, prompt, texts, *both)


def test_penalties_do_the_same_to_a_chat(ai: openai.OpenAI) -> None:
    options: Any = {**GREEDY, "max_tokens": 40, **PENALTIES[0]}
    chat = ai.chat.completions.create(messages=[{"role": "user", "content": PROMPT}], **options).choices[0].message
    assert chat.content == ai.completions.create(prompt=PROMPT, **options).choices[0].text


# ---- lengths ----


def test_max_completion_tokens_is_the_newer_name_and_counts(ai: openai.OpenAI, expected: str) -> None:
    base: Any = {"model": MODEL, "temperature": 0, "messages": USER}
    found = ai.chat.completions.create(max_completion_tokens=3, **base)
    assert found.usage is not None
    assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (3, "length")
    assert expected.startswith(found.choices[0].message.content or "-")
    both = ai.chat.completions.create(max_completion_tokens=5, max_tokens=3, **base)
    assert both.usage is not None
    assert both.usage.completion_tokens == 5


def test_without_a_limit_an_answer_fills_what_the_context_leaves(ai: openai.OpenAI) -> None:
    found = ai.chat.completions.create(model=MODEL, messages=USER, temperature=0, logit_bias={"1": -100, "2": -100})
    assert found.usage is not None
    assert (found.usage.total_tokens, found.choices[0].finish_reason) == (512, "length")


def test_a_prompt_of_completions_that_overflows_tells_both_numbers(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt is 600 tokens, the context is 512") as caught:
        ai.completions.create(model=MODEL, prompt=[403] * 600)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_a_seed_repeats_a_draw_and_the_first_stop_string_counts(ai: openai.OpenAI, expected: str) -> None:
    drawn: Any = {"model": MODEL, "messages": USER, "temperature": 1.3, "max_tokens": 24}
    first, again, other = (ai.chat.completions.create(seed=s, **drawn).choices[0].message.content for s in (11, 11, 12))
    assert first == again != other
    stops = [expected[9:12], expected[5:8], "never said"]
    found = ai.chat.completions.create(messages=USER, stop=stops, **GREEDY)
    assert found.choices[0].message.content == expected[: expected.index(stops[1])]
    streamed = ai.chat.completions.create(messages=USER, stop=stops, stream=True, **GREEDY)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == found.choices[0].message.content


def test_answers_of_one_stream_are_told_apart_by_their_index(ai: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "temperature": 1.3, "max_tokens": 9, "seed": 3, "n": 3}
    whole = ai.chat.completions.create(messages=USER, **options)
    usage: Any = {"include_usage": True}
    texts, reasons, last = ["", "", ""], {}, None
    for chunk in ai.chat.completions.create(messages=USER, stream=True, stream_options=usage, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons.setdefault(choice.index, []).extend([choice.finish_reason] if choice.finish_reason else [])
        last = chunk
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == {choice.index: [choice.finish_reason] for choice in whole.choices}
    assert last is not None
    assert last.usage == whole.usage


def test_logprobs_of_a_stream_are_those_of_the_whole(ai: openai.OpenAI) -> None:
    options: Any = {**GREEDY, "logprobs": True, "top_logprobs": 3}
    whole = ai.chat.completions.create(messages=USER, **options).choices[0].logprobs
    assert whole is not None
    streamed = []
    for chunk in ai.chat.completions.create(messages=USER, stream=True, **options):
        found = chunk.choices[0].logprobs
        streamed += [] if found is None else found.content or []
    assert streamed == whole.content


# ---- prompts ----


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


def test_an_alias_is_the_models_id_and_its_own_name_is_taken_too(start: Start) -> None:
    server = start("--alias", "teller/small").wait_healthy()
    with connect(server) as client:
        assert [model.id for model in client.models.list()] == ["teller/small"]
        assert client.models.retrieve("teller/small").id == client.models.retrieve(MODEL).id == "teller/small"
        for name in ("teller/small", MODEL):
            options: Any = {**GREEDY, "model": name, "prompt": "Once"}
            assert client.completions.create(**options).model == "teller/small"
            assert next(iter(client.completions.create(stream=True, **options))).model == "teller/small"
        with pytest.raises(openai.NotFoundError, match="its model is 'teller/small'"):
            client.completions.create(model="other", prompt="a")
        assert httpx.get(f"{server.url}/health").json()["model"] == MODEL
    server.close()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": "high"}, "presence_penalty"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"n": 1000}, "n"),
        ({"seed": 0.5}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
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
