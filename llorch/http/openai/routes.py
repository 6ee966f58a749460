"""The routes below /v1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from litestar import Request, Response, get, post
from litestar.types import ASGIApp

from llorch.http.auth import key_of
from llorch.http.openai.completions import Completions
from llorch.http.worker import read_body, spec

CHUNKS = """data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"Hi"}}]}

data: [DONE]

"""


def _answer(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of an answer that is not streamed; `content` is what a choice holds beside index and reason."""
    text, count = {"type": "string"}, {"type": "integer", "minimum": 0}
    logprobs = {"type": "object", "nullable": True}
    choice = {"index": count, **content, "logprobs": logprobs, "finish_reason": {"type": "string", "nullable": True}}
    usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), count)
    fields = {
        "id": text,
        "object": {"type": "string", "enum": [kind]},
        "created": count,
        "model": text,
        "system_fingerprint": text,
        "choices": {"type": "array", "minItems": 1, "items": _object(choice)},
        "usage": _object(usage),
    }
    return _object(fields)


def _object(fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(fields), "properties": fields}


_MESSAGE = {
    "role": {"type": "string", "enum": ["assistant"]},
    "content": {"type": "string"},
    "refusal": {"type": "string", "nullable": True},
}
CHAT_ANSWER = _answer("chat.completion", {"message": _object(_MESSAGE)})
COMPLETION_ANSWER = _answer("text_completion", {"text": {"type": "string"}})


@dataclass
class ErrorDetails:
    """`param` is the field that is wrong, or null."""

    message: str
    type: str
    param: str | None
    code: str | None


@dataclass
class OpenAIError:
    """Why a request was not served."""

    error: ErrorDetails


@dataclass
class Model:
    """The model that this worker serves."""

    id: str
    object: str
    created: int
    owned_by: str
    context_length: int


@dataclass
class Models:
    """One model, as a list."""

    object: str
    data: list[Model]


INVALID = spec(OpenAIError, "A field is wrong, or the prompt leaves the context no room (context_length_exceeded).")
NO_MODEL = spec(OpenAIError, "model_not_found: this worker serves another model.")
TOO_LARGE = spec(OpenAIError, "body_too_large: the body has more bytes than the worker takes.")
TOO_SLOW = spec(OpenAIError, "request_timeout: the request did not come in time.")
LEFT = spec(OpenAIError, "cancelled: the request was cancelled.")
FAILED = spec(OpenAIError, "internal: the worker's log has the details.")
OUT_OF_TIME = spec(OpenAIError, "inference_timeout: the answer took longer than the worker allows.")
UNAVAILABLE = spec(OpenAIError, "queue_full or worker_unhealthy, with the header Retry-After.")
GENERATION = {
    200: spec(str, "The completion as JSON, or its chunks.", "text/event-stream", CHUNKS),
    400: INVALID,
    404: NO_MODEL,
    408: TOO_SLOW,
    413: TOO_LARGE,
    499: LEFT,
    500: FAILED,
    503: UNAVAILABLE,
    504: OUT_OF_TIME,
}


@post(
    "/v1/chat/completions",
    status_code=200,
    operation_id="chat_completions",
    tags=["openai"],
    summary="Answer a conversation",
    description="The messages are rendered with the model's chat template. Control tokens in them are plain text. "
    "With `stream` the answer comes as server-sent events that end with `[DONE]`. Unknown fields are passed over; null "
    "is as good as absent. Hanging up cancels the request.",
    responses=GENERATION,
)
async def chat_completions(request: Request[Any, Any, Any], completions: Completions) -> ASGIApp:
    return await completions.chat(await read_body(request), key_of(request.scope))


@post(
    "/v1/completions",
    status_code=200,
    operation_id="completions",
    tags=["openai"],
    summary="Continue a prompt",
    description="The prompt is text as the model is to see it, rendered by the client: control tokens in it are "
    "parsed, and BOS is added where the vocabulary asks for it and the text does not begin with it.",
    responses=GENERATION,
)
async def text_completions(request: Request[Any, Any, Any], completions: Completions) -> ASGIApp:
    return await completions.complete(await read_body(request), key_of(request.scope))


@get(
    "/v1/models",
    operation_id="models",
    tags=["openai"],
    summary="The model there is",
    responses={200: spec(Models, "A list of one."), 503: UNAVAILABLE},
)
async def models(completions: Completions) -> Response[dict[str, Any]]:
    return Response({"object": "list", "data": [completions.model()]})


@get(
    "/v1/models/{model_id:path}",
    operation_id="model",
    tags=["openai"],
    summary="The model by its id",
    responses={200: spec(Model, "The model."), 400: INVALID, 404: NO_MODEL, 503: UNAVAILABLE},
)
async def model(model_id: str, completions: Completions) -> Response[dict[str, Any]]:
    return Response(completions.model(model_id.removeprefix("/")))


OPENAI_ROUTES = (chat_completions, text_completions, models, model)
