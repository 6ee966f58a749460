"""Bodies of /execute and /cancel that break the contract: every violation at once, in one shape."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.server.process import Server, run

VOCAB = 512
GOOD = {"job_id": "job", "prompt": "Once", "max_tokens": 1}


def refused(client: httpx.Client, content: bytes | str, path: str = "/execute") -> list[dict[str, Any]]:
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"errors"}
    for error in body["errors"]:
        assert {"field", "constraint", "message"} <= error.keys() <= {"field", "constraint", "message", "value"}
        assert error["message"].startswith(error["field"])
    return list(body["errors"])


@pytest.mark.parametrize(
    ("field", "value", "constraint"),
    [
        ("job_id", "", "non_empty"),
        ("job_id", 5, "type(string)"),
        ("job_id", None, "type(string)"),
        ("prompt", "", "length(1..=32768)"),
        ("prompt", "x" * 32769, "length(1..=32768)"),
        ("prompt", ["x"], "type(string)"),
        ("max_tokens", 0, "range(1..=2048)"),
        ("max_tokens", 2049, "range(1..=2048)"),
        ("max_tokens", "5", "type(integer)"),
        ("max_tokens", 5.5, "type(integer)"),
        ("max_tokens", True, "type(integer)"),
        ("max_tokens", None, "type(integer)"),
        ("temperature", -0.1, "range(0.0..=2.0)"),
        ("temperature", 2.1, "range(0.0..=2.0)"),
        ("temperature", "1", "type(number)"),
        ("temperature", False, "type(number)"),
        ("temperature", float("nan"), "range(0.0..=2.0)"),
        ("temperature", float("inf"), "range(0.0..=2.0)"),
        ("temperature", 10**400, "range(0.0..=2.0)"),
        ("seed", -1, "range(0..=18446744073709551615)"),
        ("seed", 2**64, "range(0..=18446744073709551615)"),
        ("seed", 1.5, "type(integer)"),
        ("seed", "7", "type(integer)"),
        ("top_p", -0.1, "range(0.0..=1.0)"),
        ("top_p", 1.1, "range(0.0..=1.0)"),
        ("top_k", -1, f"range(0..={VOCAB})"),
        ("top_k", VOCAB + 1, f"range(0..={VOCAB})"),
        ("top_k", 1.5, "type(integer)"),
        ("min_p", -0.1, "range(0.0..=1.0)"),
        ("min_p", 1.1, "range(0.0..=1.0)"),
        ("repetition_penalty", -0.1, "range(0.0..=2.0)"),
        ("repetition_penalty", 2.1, "range(0.0..=2.0)"),
        ("repetition_penalty", 0, "range(0.0..=2.0)"),
        ("stop", "end", "type(array)"),
        ("stop", ["a", "b", "c", "d", "e"], "max_count(4)"),
    ],
)
def test_a_rule_that_is_broken_is_named(client: httpx.Client, field: str, value: Any, constraint: str) -> None:
    (error,) = refused(client, json.dumps(GOOD | {field: value}))
    assert (error["field"], error["constraint"]) == (field, constraint)
    if field in ("prompt", "stop"):
        assert "value" not in error
    elif isinstance(value, int | str) and len(str(value)) < 100:
        assert error["value"] == value


@pytest.mark.parametrize(
    ("item", "constraint"),
    [("", "non_empty"), ("x" * 101, "max_length(100)"), (5, "type(string)"), (None, "type(string)")],
)
def test_a_stop_string_that_breaks_a_rule_is_named_without_its_text(
    client: httpx.Client, item: Any, constraint: str
) -> None:
    (error,) = refused(client, json.dumps(GOOD | {"stop": ["fine", item]}))
    assert (error["field"], error["constraint"]) == ("stop[1]", constraint)
    assert "value" not in error


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": None},
        {"seed": 2**64 - 1},
        {"seed": 0},
        {"temperature": 2, "top_p": 0, "top_k": VOCAB, "min_p": 1},
        {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 2.0},
        {"repetition_penalty": 0.1, "max_tokens": 2048, "stop": ["x" * 100, "a", "b", "c"]},
        {"stop": []},
        {"prompt": "x" * 400},
        {"job_id": " \u0000 "},
        {"max_tokens": 3.0, "top_k": 2.0, "seed": 7.0},
    ],
)
def test_the_bounds_themselves_are_taken(client: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"job_id": f"bounds {fields}"[:60], "prompt": "Once", "max_tokens": 3} | fields
    assert run(client, **body)[-1]["type"] == "end"


def test_every_violation_is_reported_at_once(client: httpx.Client) -> None:
    body = {
        "job_id": "",
        "max_tokens": "5",
        "temperature": 3,
        "seed": -1,
        "top_p": 2,
        "top_k": 100_000,
        "min_p": 2,
        "repetition_penalty": 0,
        "stop": ["", "x" * 101, 1, "a", "b"],
        "temprature": 1,
    }
    errors = refused(client, json.dumps(body))
    found = [(error["field"], error["constraint"]) for error in errors]
    assert found == [
        ("job_id", "non_empty"),
        ("prompt", "required"),
        ("max_tokens", "type(integer)"),
        ("temperature", "range(0.0..=2.0)"),
        ("seed", "range(0..=18446744073709551615)"),
        ("top_p", "range(0.0..=1.0)"),
        ("top_k", f"range(0..={VOCAB})"),
        ("min_p", "range(0.0..=1.0)"),
        ("repetition_penalty", "range(0.0..=2.0)"),
        ("stop", "max_count(4)"),
        ("stop[0]", "non_empty"),
        ("stop[1]", "max_length(100)"),
        ("stop[2]", "type(string)"),
        ("temprature", "unknown_field"),
    ]
    assert "did you mean temperature" in errors[-1]["message"]


@pytest.mark.parametrize(
    ("content", "constraint"),
    [
        (b"", "json"),
        (b"{", "json"),
        (b'{"job_id": "a",}', "json"),
        (b"\xff\xfe", "json"),
        (b"[" * 100_000, "json"),
        (b'{"max_tokens": ' + b"1" * 5000 + b"}", "json"),
        (b"[]", "type(object)"),
        (b'"text"', "type(object)"),
        (b"null", "type(object)"),
        (b"1", "type(object)"),
    ],
)
@pytest.mark.parametrize("path", ["/execute", "/cancel"])
def test_what_is_no_json_object_is_refused_in_the_same_shape(
    client: httpx.Client, path: str, content: bytes, constraint: str
) -> None:
    (error,) = refused(client, content, path)
    assert (error["field"], error["constraint"]) == ("body", constraint)


def test_half_of_a_surrogate_pair_is_refused(client: httpx.Client) -> None:
    errors = refused(client, r'{"job_id": "\ud83d", "prompt": "\ud83d", "stop": ["\ude00"], "\ud83d": 1}')
    assert [error["constraint"] for error in errors] == ["unicode", "unicode", "unicode", "unknown_field"]
    assert run(client, **json.loads(r'{"job_id": "pair", "prompt": "\ud83d\ude00", "max_tokens": 1}'))


def test_a_prompt_without_room_is_refused_with_both_numbers(client: httpx.Client) -> None:
    prompt = "Once upon a time. " * 200
    (error,) = refused(client, json.dumps({"job_id": "long", "prompt": prompt}))
    assert error["field"] == "prompt"
    assert error["constraint"] == "tokens(1..=511)"
    assert re.fullmatch(r"prompt is \d+ tokens, the context is 512: .*", error["message"])
    assert "value" not in error


def test_thousands_of_unknown_fields_get_a_short_answer(client: httpx.Client) -> None:
    body = GOOD | {f"field{i}": i for i in range(20_000)}
    errors = refused(client, json.dumps(body))
    assert len(errors) == 101
    assert "20000 unknown fields" in errors[-1]["message"]


def test_a_body_beyond_the_limit_is_413(client: httpx.Client) -> None:
    response = client.post("/execute", content=b'{"prompt": "' + b"x" * (1 << 20) + b'"}')
    assert response.status_code == 413
    assert response.json()["code"] == "BODY_TOO_LARGE"
    assert str(1 << 20) in response.json()["message"]


def test_a_body_in_chunks_beyond_the_limit_is_413(client: httpx.Client) -> None:
    response = client.post("/execute", content=(b"x" * 100_000 for _ in range(12)))
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("content", "constraint"), [({}, "required"), ({"job_id": ""}, "non_empty"), ({"job_id": 1}, "type(string)")]
)
def test_cancel_checks_its_body_too(client: httpx.Client, content: Any, constraint: str) -> None:
    (error,) = refused(client, json.dumps(content), "/cancel")
    assert (error["field"], error["constraint"]) == ("job_id", constraint)


def test_cancel_refuses_unknown_fields(client: httpx.Client) -> None:
    (error,) = refused(client, b'{"job_id": "a", "force": true}', "/cancel")
    assert (error["field"], error["constraint"]) == ("force", "unknown_field")


def test_bad_bodies_cost_no_other_request_its_answer(client: httpx.Client, server: Server) -> None:
    before = server.metrics()['llorch_requests_total{outcome="rejected"}']
    refused(client, b"{")
    assert run(client, **GOOD | {"job_id": "after"})[-1]["type"] == "end"
    assert server.metrics()['llorch_requests_total{outcome="rejected"}'] == before + 1
