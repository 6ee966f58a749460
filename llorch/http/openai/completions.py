"""From a checked body to jobs in the engine's queue, and the response that shows them."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

import llorch
from llorch.core.llm import LLM
from llorch.core.requests import Event, Request
from llorch.http.job import Job
from llorch.http.openai.bodies import (
    MOST_TOKENS,
    Bounds,
    ChatBody,
    CompletionBody,
    GenerationBody,
    parse_chat,
    parse_completion,
)
from llorch.http.openai.errors import ModelNotFoundError
from llorch.http.openai.responses import ChatFormat, CompletionFormat, Format
from llorch.http.openai.stream import Events, Reply, StreamedReply, WholeReply
from llorch.http.service import Worker

log = structlog.stdlib.get_logger(__name__)

RENDERERS = 4  # threads that render chats; templates take turns, but not the tokenizing behind them

Prompts = Sequence[Sequence[int]]


class Completions:
    """The OpenAI routes' way into the engine. Belongs to the event loop."""

    def __init__(self, worker: Worker, max_tokens: int | None, alias: str | None) -> None:
        """`max_tokens`: the operator's limit for one answer, None where that is the context alone. `alias`: the
        operator's name for the model, None where that is its own."""
        self._worker, self._max_tokens, self._alias = worker, max_tokens, alias
        # of their own: a chat template that hangs until it is stopped must not take the threads that others need
        self._renderers = ThreadPoolExecutor(RENDERERS, thread_name_prefix="llorch-chat")

    # ---- models ----

    def model(self, name: str | None = None) -> dict[str, Any]:
        """The model there is. Raises EngineUnavailableError while it loads, ModelNotFoundError for another name."""
        llm = self._worker.ready()
        self._check_model(llm, name)
        return {
            "id": self._alias or llm.config.name,
            "object": "model",
            "created": llm.loaded_at,
            "owned_by": "llorch",
            "context_length": llm.context,
        }

    # ---- completions ----

    async def chat(self, raw: bytes, key: str | None = None) -> Reply:
        """Accepts a chat completion. Raises BodyError, RequestError, EngineUnavailableError."""
        with self._worker.counted():
            llm = self._worker.ready()
            body = parse_chat(raw, self._bounds(llm))
            self._check_model(llm, body.model)
            return await self._start(llm, body, key, "chatcmpl", 1, lambda: [_chat_prompt(llm, body)], ChatFormat)

    async def complete(self, raw: bytes, key: str | None = None) -> Reply:
        """Accepts a completion of one prompt or several. Raises BodyError, RequestError, EngineUnavailableError."""
        with self._worker.counted():
            llm = self._worker.ready()
            body = parse_completion(raw, self._bounds(llm))
            self._check_model(llm, body.model)
            prompts = len(body.prompts)
            return await self._start(llm, body, key, "cmpl", prompts, lambda: _prompts(llm, body), CompletionFormat)

    def _check_model(self, llm: LLM, name: str | None) -> None:
        """The model has the name that its file gives it, those of the file itself, and the operator's."""
        path, known = Path(llm.model_ref), self._alias or llm.config.name
        if name is not None and name not in {known, llm.config.name, path.name, path.stem}:
            raise ModelNotFoundError(f"this worker does not serve {name[:200]!r}: its model is {known!r}")

    def _bounds(self, llm: LLM) -> Bounds:
        return Bounds(
            max_tokens=self._max_tokens or MOST_TOKENS,
            vocab_size=llm.config.vocab_size,
            choices=min(Bounds().choices, self._worker.engine.capacity),
        )

    async def _start(
        self,
        llm: LLM,
        body: GenerationBody,
        key: str | None,
        prefix: str,
        prompts: int,
        encode: Callable[[], Prompts],
        form: Callable[[dict[str, Any], Any, Sequence[int]], Format],
    ) -> Reply:
        """Queues n jobs for each prompt. Job i is `<id>-<i>`, or the response's own id where there is one alone."""
        name, count = f"{prefix}-{uuid.uuid4().hex}", prompts * body.n
        events = Events()
        jobs = [
            self._worker.open_job(name if count == 1 else f"{name}-{i}", _deliver_to(events, i), key)
            for i in range(count)
        ]
        pool = self._renderers if isinstance(body, ChatBody) else None
        found = await self._worker.queue(jobs, lambda: self._submit(body, key, encode(), jobs), pool)
        _log_accepted(name, body, found)
        head = {
            "id": name,
            "created": int(time.time()),
            "model": self._alias or llm.config.name,
            "system_fingerprint": _fingerprint(llm),
        }
        shape = form(head, llm.tokenizer, [len(prompt) for prompt in found])
        timing = self._worker.timing
        if body.stream:
            return StreamedReply(jobs, events, shape, timing, include_usage=body.include_usage)
        return WholeReply(jobs, events, shape, timing)

    def _submit(self, body: GenerationBody, key: str | None, prompts: Prompts, jobs: Sequence[Job]) -> Prompts:
        """On a thread. Answers to one prompt have seeds one apart, so that they differ and can be had again."""
        sampling = body.sampling
        for i, job in enumerate(jobs):
            seed = None if sampling.seed is None else (sampling.seed + i % body.n) % 2**64
            request = Request(
                job_id=job.job_id,
                prompt=tuple(prompts[i // body.n]),
                max_tokens=body.max_tokens or self._max_tokens or MOST_TOKENS,
                sampling=replace(sampling, seed=seed),
                stop=body.stop,
                logprobs=body.logprobs,
                priority=body.priority,
                key=key,
            )
            self._worker.engine.submit(request, job.emit)
        return prompts


def _chat_prompt(llm: LLM, body: ChatBody) -> Sequence[int]:
    return llm.chat.prompt(body.messages, variables=body.variables)


def _prompts(llm: LLM, body: CompletionBody) -> Prompts:
    return [llm.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]


def _deliver_to(events: Events, index: int) -> Callable[[Event], None]:
    return lambda event: events.put((index, event))


def _fingerprint(llm: LLM) -> str:
    """The same where the same seed gives the same text: version, model and what computes it."""
    parts = (llorch.__version__, llm.model_ref, llm.quant_kind, llm.provider_name, llm.device_info.name, llm.cache_type)
    return "fp_" + hashlib.sha256("|".join(parts).encode()).hexdigest()[:10]


def _log_accepted(name: str, body: GenerationBody, prompts: Prompts) -> None:
    log.info(
        "job accepted",
        job_id=name,
        prompts=len(prompts),
        prompt_tokens=sum(map(len, prompts)),
        prompt_sha256=hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
        n=body.n,
        max_tokens=body.max_tokens,
        temperature=body.sampling.temperature,
        **({"unknown_fields": body.passed_over} if body.passed_over else {}),
    )
