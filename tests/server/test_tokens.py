"""POST /tokenize and /detokenize of a real server, over a byte-level vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from llorch.core.tokenizer import Tokenizer
from tests.server.conftest import Start
from tests.server.process import Server
from tests.support import ROOT
from tests.vocabulary_files import CONTROL, train_bpe, write_bpe

TEXT = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens, merges = train_bpe(TEXT.splitlines(), 1000)
    path = tmp_path_factory.mktemp("tokens") / "model.gguf"
    special = [("<s>", CONTROL), ("</s>", CONTROL)]
    ids = {"bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True}
    return write_bpe(path, [*special, *tokens], merges, tensors=True, pre="llama-bpe", **ids)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_gguf(model)


@pytest.fixture(scope="module")
def bpe_server(start: Start, model: Path) -> Server:
    return start(model=model, env={"LLORCH_API_KEY": "key"}).wait_healthy()


@pytest.fixture
def tokens(bpe_server: Server) -> Iterator[httpx.Client]:
    with bpe_server.client(headers={"Authorization": "Bearer key"}) as client:
        yield client


def test_a_text_becomes_ids_and_ids_the_text(tokens: httpx.Client, tokenizer: Tokenizer) -> None:
    text = "Hello, wörld 🦙\n"
    ids = tokenizer.encode(text, add_special=False)
    answer = tokens.post("/tokenize", json={"text": text})
    assert answer.status_code == 200
    assert answer.json() == {"tokens": ids, "count": len(ids)}
    assert tokens.post("/detokenize", json={"tokens": ids}).json() == {"text": text}
    assert tokens.post("/tokenize", json={"text": ""}).json() == {"tokens": [], "count": 0}


def test_control_tokens_and_bos_are_as_asked_for(tokens: httpx.Client, tokenizer: Tokenizer) -> None:
    def ids(**body: Any) -> Any:
        return tokens.post("/tokenize", json=body).json()["tokens"]

    assert ids(content="</s>") == [1]
    assert ids(content="</s>", parse_special=False) == tokenizer.encode("</s>", add_special=False)
    assert ids(text="</s>", add_special=True) == [0, 1]
    assert tokens.post("/detokenize", json={"tokens": [0, *tokenizer.encode("a"), 1]}).json() == {"text": "a"}


@pytest.mark.parametrize(
    ("route", "body", "violations"),
    [
        ("/tokenize", {}, {"text": "one_of(text,content)"}),
        ("/tokenize", {"text": "a", "content": "a"}, {"text": "one_of(text,content)"}),
        ("/tokenize", {"text": 1, "parse_special": "yes"}, {"text": "type(string)", "parse_special": "type(boolean)"}),
        ("/tokenize", {"text": "\ud800"}, {"text": "unicode"}),
        ("/tokenize", {"text": "a", "extra": 1}, {"extra": "unknown_field"}),
        ("/detokenize", {}, {"tokens": "required"}),
        ("/detokenize", {"tokens": "1"}, {"tokens": "type(array)"}),
        ("/detokenize", {"tokens": [1, True, -1]}, {"tokens[1]": "type(integer)", "tokens[2]": "token(0..=1001)"}),
        ("/detokenize", {"tokens": [1002, 10**40]}, {"tokens[0]": "token(0..=1001)", "tokens[1]": "token(0..=1001)"}),
    ],
)
def test_every_violation_is_named(
    tokens: httpx.Client, route: str, body: dict[str, Any], violations: dict[str, str]
) -> None:
    answer = tokens.post(route, content=json.dumps(body))  # httpx's own writer refuses half a surrogate pair
    assert answer.status_code == 400
    assert {error["field"]: error["constraint"] for error in answer.json()["errors"]} == violations


def test_a_body_may_be_too_large_and_wrong_ids_too_many(tokens: httpx.Client) -> None:
    answer = tokens.post("/tokenize", json={"text": "a" * (1 << 20)})
    assert (answer.status_code, answer.json()["code"]) == (413, "BODY_TOO_LARGE")
    answer = tokens.post("/detokenize", json={"tokens": [-1] * 100_000})
    assert answer.status_code == 400
    assert len(answer.json()["errors"]) == 101


def test_both_want_a_key_and_are_documented(bpe_server: Server, tokens: httpx.Client) -> None:
    with bpe_server.client() as client:
        for route in ("/tokenize", "/detokenize"):
            assert client.post(route, json={"text": "a"}).json()["error"]["code"] == "MISSING_API_KEY"
    paths = tokens.get("/docs/openapi.json").json()["paths"]
    schema = paths["/tokenize"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert list(schema["properties"]) == ["text", "content", "add_special", "parse_special"]
    assert "/detokenize" in paths


def test_health_answers_while_megabytes_are_tokenized(bpe_server: Server, tokens: httpx.Client) -> None:
    """Four at once take most of a second. Were the event loop held up, or its lock, one answer would come at most."""
    body = {"text": (TEXT * 1000)[:900_000].encode("ascii", "replace").decode()}
    with ThreadPoolExecutor(4) as pool, bpe_server.client() as client:
        running = [pool.submit(tokens.post, "/tokenize", json=body) for _ in range(4)]
        answers = 0
        while not all(request.done() for request in running):
            assert client.get("/health").status_code == 200
            answers += 1
        assert [request.result().status_code for request in running] == [200] * 4
    assert answers > 4
