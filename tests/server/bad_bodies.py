"""Bodies that break the contract, some five hundred: what is wrong with each is its name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MESSAGES = [{"role": "user", "content": "Hello"}]
GOOD: dict[str, dict[str, Any]] = {
    "/execute": {"job_id": "bad", "prompt": "Once", "max_tokens": 1},
    "/cancel": {"job_id": "bad"},
    "/v1/completions": {"prompt": "Once", "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
}
V1 = ("/v1/completions", "/v1/chat/completions")
HALF, NAN, INF = "\ud800", float("nan"), float("inf")
HUGE = 10**400
DEEP: Any = 1
for _ in range(200):
    DEEP = [DEEP]

# what each kind of field does not take
TEXT = [5, 1.5, True, [], {}, ["a"], {"a": 1}, HALF, f"a{HALF}b", DEEP]
INTEGER = ["1", "", 1.5, True, [], [1], {}, NAN, INF, -INF, HUGE, -HUGE, DEEP]
NUMBER = ["1", "", True, [], [1.0], {}, NAN, INF, -INF, HUGE, -HUGE, DEEP]
FLAG = ["true", "", 1, 0, [], {}, 1.5]
TEXTS = [5, {}, True, [5], [None], [[]], [""], [HALF], [DEEP], ["a", 1]]

FIELDS: dict[tuple[str, ...], dict[str, list[Any]]] = {
    ("/execute",): {
        "job_id": [*TEXT, "", None],
        "prompt": [*TEXT, "", None, "x" * 32769, "Once " * 2000],
        "max_tokens": [*INTEGER, None, 0, -1, 2049],
        "temperature": [*NUMBER, None, -0.1, 2.1],
        "seed": [*INTEGER, -1, 2**64],
        "top_p": [*NUMBER, None, -0.1, 1.1],
        "top_k": [*INTEGER, None, -1, 513],
        "min_p": [*NUMBER, None, -0.1, 1.1],
        "repetition_penalty": [*NUMBER, None, 0, -1, 2.1],
        "stop": [*TEXTS, None, "a", ["a"] * 5, ["x" * 101], ["x" * 32768], ["x"] * 32768],
        "unknown": [None, 1, "a", DEEP],
        "x" * 1000: [1],
        HALF: [1],
        "": [1],
    },
    ("/cancel",): {"job_id": [*TEXT, "", None], "force": [True, None]},
    V1: {
        "model": [*TEXT, ""],
        "stream": FLAG,
        "stream_options": [5, "a", [], True, {}, {"include_usage": True}, {"include_usage": 1}],
        "n": [*INTEGER, 0, -1, 129],
        "seed": [*INTEGER, -(2**63) - 1, 2**64],
        "temperature": [*NUMBER, -0.1, 2.1],
        "top_p": [*NUMBER, -0.1, 1.1],
        "top_k": [*INTEGER, -2, 513],
        "min_p": [*NUMBER, -0.1, 1.1],
        "repetition_penalty": [*NUMBER, 0, -1, 2.1],
        "frequency_penalty": [*NUMBER, -2.1, 2.1],
        "presence_penalty": [*NUMBER, -2.1, 2.1],
        "logit_bias": [
            5,
            "a",
            [],
            True,
            {"a": 1},
            {"-1": 1},
            {"512": 1},
            {"1": 101},
            {"1": NAN},
            {"1": "1"},
            {HALF: 1},
            {"9" * 30: 1},
            {"1": None},
            {"": 1},
            {"1": DEEP},
        ],
        "stop": [5, {}, True, HALF, [5], [""], [HALF], ["a"] * 17, "x" * 1001, ["x" * 32768], ["x"] * 32768],
        "max_tokens": [*INTEGER, 0, -2, 2**31],
        "response_format": [5, "json", {"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
        "guided_json": [{"type": "object"}, True],
        "ignore_eos": [True],
    },
    ("/v1/completions",): {
        "prompt": [
            5,
            1.5,
            True,
            {},
            [],
            [[]],
            [None],
            [True],
            [1.5],
            [-1],
            [512],
            [HUGE],
            [1, "a"],
            ["a", 1],
            [[1], 1],
            HALF,
            ["a", HALF],
            [[[1]]],
            ["a"] * 129,
            [1] * 512,
            "Once " * 2000,
            DEEP,
            None,
        ],
        "logprobs": [*INTEGER, -1, 21],
        "best_of": [*INTEGER, 0, 2],
        "echo": [True, "yes"],
        "suffix": ["end"],
    },
    ("/v1/chat/completions",): {
        "messages": [None, 5, "a", {}, [], [5], [None], [[]], ["a"], [{}], DEEP, [DEEP], [{"role": "user"}] * 5_000]
        + [[{"role": role, "content": "a"}] for role in (None, 5, "", "robot", HALF, [], {})]
        + [[{"role": "user", "content": content}] for content in (None, 5, True, {}, [], [5], HALF, [[]], DEEP)]
        + [[{"role": "user", "content": [part]}] for part in ({}, {"type": "image_url"}, {"type": 5}, {"type": "text"})]
        + [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in (None, 5, HALF, [])]
        + [[{"role": "user", "content": "a", "name": name}] for name in (5, "", "a b", "<|x|>", "x" * 65, HALF)]
        + [[{"role": "user", "content": "a", "tool_calls": [{}]}], [{"role": "user", "content": "Once " * 4000}]],
        "max_completion_tokens": [*INTEGER, 0, -2],
        "logprobs": FLAG,
        "top_logprobs": [*INTEGER, -1, 21, 5],
        "chat_template_kwargs": [5, "a", [], {"a": []}, {"a b": 1}, {HALF: 1}, {"a": HALF}, {"a": DEEP}, {"1": 1}],
        "add_generation_prompt": [False, 1, "yes"],
        "tools": [[{"type": "function"}], 5, "a"],
        "tool_choice": ["required", {"type": "function"}],
        "functions": [[{}]],
        "function_call": ["f", {"name": "f"}],
        "modalities": [["audio"], "text"],
        "audio": [{"voice": "a"}],
        "web_search_options": [{"a": 1}],
    },
}


# what is no JSON object at all, on every route
def _not_an_object(good: bytes) -> Mapping[str, bytes]:
    return {
        "empty": b"",
        "white space": b" \r\n\t ",
        "NUL": b"\x00",
        "NUL behind": good + b"\x00",
        "NUL within": good.replace(b":", b"\x00:", 1),
        "cut off": good[:-1],
        "cut off within a string": good[: good.index(b'"') + 3],
        "twice": good + good,
        "a comma too many": good[:-1] + b",}",
        "single quotes": good.replace(b'"', b"'"),
        "a comment": good + b"// why not",
        "no quotes": b"{job_id: 1}",
        "an array": b"[" + good + b"]",
        "a string": b'"text"',
        "a number": b"12",
        "null": b"null",
        "true": b"true",
        "NaN": b"NaN",
        "UTF-16": good.decode().encode("utf-16"),
        "UTF-32": good.decode().encode("utf-32"),
        "a byte order mark": b"\xef\xbb\xbf" + good,
        "gzip": gzip.compress(good),
        "Latin-1": b'{"a": "\xe9"}',
        "an overlong encoding": b'{"a": "\xc0\xaf"}',
        "a surrogate in UTF-8": b'{"a": "\xed\xa0\x80"}',
        "a bad escape": b'{"a": "\\x"}',
        "a line break in a string": b'{"a": "\n"}',
        "deep arrays": b"[" * 100_000,
        "deep and closed": b"[" * 50_000 + b"]" * 50_000,
        "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "a number of 5000 digits": b'{"max_tokens": ' + b"1" * 5000 + b"}",
        "a form": b"job_id=bad&prompt=Once",
        "XML": b"<job><id>bad</id></job>",
        "binary": bytes(range(256)),
        "a megabyte and a byte": b'{"a": "' + b"x" * (1 << 20) + b'"}',
    }


@dataclass(frozen=True)
class Case:
    path: str
    name: str
    body: bytes


def cases() -> Iterator[Case]:
    for paths, fields in FIELDS.items():
        for path in paths:
            for name, values in fields.items():
                for value in values:
                    body = json.dumps(GOOD[path] | {name: value})
                    yield Case(path, f"{name[:20]!a} = {_short(value)}", body.encode())
    for path, good in GOOD.items():
        for name, body in _not_an_object(json.dumps(good).encode()).items():
            yield Case(path, name, body)
        for missing in set(good) - {"max_tokens"}:
            yield Case(path, f"no {missing}", json.dumps({k: v for k, v in good.items() if k != missing}).encode())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 40 else f"{text[:30]}... ({len(text)} characters)"
