"""POST /tokenize and /detokenize: what the model's tokenizer makes of a text, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from litestar import MediaType, Request, Response, post

from llorch.core.tokenizer import Tokenizer
from llorch.http.errors import dump_json
from llorch.http.fields import MAX_REPORTED, BodyError, Field, Violation, is_unicode, kind_of, parse_body
from llorch.http.openai.fields import Flag
from llorch.http.service import Worker
from llorch.http.worker import INVALID, TOO_LARGE, ErrorBody, read_body, spec

THREADS = 2  # of their own, so that a megabyte of text holds up neither the event loop nor a job's prompt

# ---- bodies ----


@dataclass(frozen=True, kw_only=True)
class AnyText(Field):
    """A text, which may be empty. It is never sent back."""

    json_type = "string"

    @property
    def constraint(self) -> str:
        return "unicode"

    def check(self, value: Any) -> Iterator[Violation]:
        if not isinstance(value, str):
            yield self.wrong_type(value, echo=False)
        elif not is_unicode(value):
            yield Violation(self.name, self.constraint, "holds half of a surrogate pair, which is no character")


@dataclass(frozen=True, kw_only=True)
class TokenIds(Field):
    vocab_size: int | None  # None: not known before the model is loaded

    json_type = "array"

    @property
    def constraint(self) -> str:
        return f"token(0..={'VOCAB' if self.vocab_size is None else self.vocab_size - 1})"

    def check(self, value: Any) -> Iterator[Violation]:
        if not isinstance(value, list):
            yield self.wrong_type(value, echo=False)
            return
        size = self.vocab_size or 0
        wrong = [i for i, token in enumerate(value) if type(token) is not int or not 0 <= token < size]
        for i in wrong[:MAX_REPORTED]:
            token, name = value[i], f"{self.name}[{i}]"
            if type(token) is not int:
                yield Violation(name, "type(integer)", f"must be a token id, is {kind_of(token)}")
            else:
                yield Violation(name, self.constraint, f"must be a token id, 0 to {size - 1}", token)
        if len(wrong) > MAX_REPORTED:
            yield Violation(self.name, self.constraint, f"holds {len(wrong)} wrong items, {MAX_REPORTED} are listed")

    def rules(self) -> dict[str, Any]:
        return {"items": {"type": "integer", "minimum": 0}}


TOKENIZE_FIELDS: tuple[Field, ...] = (
    AnyText(name="text", description="The text. As large as the body may be."),
    AnyText(name="content", description="Another name of `text`, llama.cpp's; send one of them."),
    Flag(name="add_special", default=False, description="Whether BOS and EOS are added where the model wants them."),
    Flag(
        name="parse_special",
        default=True,
        description="Whether the texts of control tokens become these tokens, as in a rendered prompt.",
    ),
)


def detokenize_fields(vocab_size: int | None) -> tuple[Field, ...]:
    """The fields of POST /detokenize."""
    return (TokenIds(name="tokens", required=True, vocab_size=vocab_size, description="Token ids."),)


def _tokenized(raw: bytes, tokenizer: Tokenizer) -> dict[str, Any]:
    body = parse_body(raw, TOKENIZE_FIELDS)
    texts = [body[name] for name in ("text", "content") if name in body]
    if len(texts) != 1:
        message = "is missing" if not texts else "and content are the same: send one of them"
        raise BodyError([Violation("text", "one_of(text,content)", message)])
    ids = tokenizer.encode(texts[0], body.get("add_special", False), body.get("parse_special", True))
    return {"tokens": ids, "count": len(ids)}


def _detokenized(raw: bytes, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"text": tokenizer.decode(parse_body(raw, detokenize_fields(tokenizer.vocab_size))["tokens"])}


# ---- the routes ----


@dataclass
class Tokenized:
    """Token ids, and how many they are."""

    tokens: list[int]
    count: int


@dataclass
class Detokenized:
    """Text without control tokens. Bytes that are no UTF-8 are U+FFFD."""

    text: str


_UNAVAILABLE = spec(
    ErrorBody, "WORKER_UNHEALTHY, with the header Retry-After: the model is loading, or the end is near."
)
_pool = ThreadPoolExecutor(THREADS, thread_name_prefix="llorch-tokens")


async def _answer(
    request: Request[Any, Any, Any], worker: Worker, answer: Callable[[bytes, Tokenizer], dict[str, Any]]
) -> Response[bytes]:
    """Checks, computes and writes on a thread: each takes its time for a megabyte."""
    tokenizer, raw = worker.ready().tokenizer, await read_body(request)
    content = await asyncio.get_running_loop().run_in_executor(_pool, lambda: dump_json(answer(raw, tokenizer)))
    return Response(content, media_type=MediaType.JSON)


@post(
    "/tokenize",
    status_code=200,
    operation_id="tokenize",
    tags=["worker"],
    summary="The token ids of a text",
    responses={200: spec(Tokenized, "The ids."), 400: INVALID, 413: TOO_LARGE, 503: _UNAVAILABLE},
)
async def tokenize(request: Request[Any, Any, Any], worker: Worker) -> Response[bytes]:
    return await _answer(request, worker, _tokenized)


@post(
    "/detokenize",
    status_code=200,
    operation_id="detokenize",
    tags=["worker"],
    summary="The text of token ids",
    description="What /tokenize was given; control tokens stand for no text.",
    responses={200: spec(Detokenized, "The text."), 400: INVALID, 413: TOO_LARGE, 503: _UNAVAILABLE},
)
async def detokenize(request: Request[Any, Any, Any], worker: Worker) -> Response[bytes]:
    return await _answer(request, worker, _detokenized)


TOKEN_ROUTES = (tokenize, detokenize)
