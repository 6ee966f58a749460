"""What the worker's routes share: the engine, the jobs in flight, whether new ones are taken."""

from __future__ import annotations

import asyncio
import hashlib

import structlog

from llorch.core.engine_thread import EngineThread
from llorch.core.llm import LLM
from llorch.core.requests import Request
from llorch.errors import (
    CancelledError,
    ContextOverflowError,
    EngineUnavailableError,
    JobExistsError,
    LlorchError,
)
from llorch.http.bodies import BodyError, ExecuteBody, Violation, execute_fields, parse_body
from llorch.http.metrics import Metrics
from llorch.http.stream import JobStream, Mailbox, Timing

log = structlog.stdlib.get_logger(__name__)

FLUSH_SECONDS = 2.0  # for the last event of a stream that is ended from here to reach its client


class Worker:
    """One model behind HTTP. Belongs to the event loop; the engine has a thread of its own."""

    def __init__(self, engine: EngineThread, *, max_tokens_limit: int = 2048, timing: Timing | None = None) -> None:
        self.engine = engine
        self.metrics = Metrics(engine.stats)
        self.max_tokens_limit = max_tokens_limit
        self.draining = False
        self._timing = timing or Timing()
        self._mailbox = Mailbox()
        self._jobs: dict[str, JobStream] = {}  # from before the prompt is tokenized until the response is over
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def loading(self) -> bool:
        return not self.engine.ready and self.engine.health() is None

    @property
    def unavailable(self) -> str | None:
        """Why no job is taken now; None where one is."""
        if self.draining:
            return "the worker is shutting down: send the request to another"
        if (reason := self.engine.health()) is not None:
            return reason
        if self.loading:
            return f"the model is loading ({self.engine.progress:.0%}): try again soon"
        return None

    async def start(self, raw: bytes) -> JobStream:
        """Accepts a job into the queue. Raises BodyError, JobExistsError, QueueFullError, EngineUnavailableError."""
        try:
            return await self._start(raw)
        except CancelledError:
            self.metrics.count("cancelled")
            raise
        except LlorchError:
            self.metrics.count("rejected")
            raise

    async def _start(self, raw: bytes) -> JobStream:
        llm = self.engine.llm
        if (reason := self.unavailable) is not None or llm is None:
            raise EngineUnavailableError(reason or "the model is not loaded")
        body = ExecuteBody(**parse_body(raw, execute_fields(self.max_tokens_limit, llm.config.vocab_size)))
        if body.job_id in self._jobs:
            raise JobExistsError(f"job {body.job_id[:128]!r} is waiting or running: use another job_id")
        stream = JobStream(
            body.job_id, llm.config.name, self.engine, self._mailbox, self.metrics, self._timing, self._forget
        )
        self._jobs[body.job_id] = stream
        self._idle.clear()
        try:
            # neither a long prompt's tokenizing nor the engine's lock may hold up the event loop
            tokens = await asyncio.to_thread(self._submit, llm, body, stream)
        except BaseException:
            self._forget(stream)
            raise
        if stream.failure is not None:  # cancelled, or the worker shut down, before the engine knew of it
            self.engine.cancel(body.job_id, stream.failure)
            self._forget(stream)
            raise stream.failure
        self.metrics.accepted.inc()
        _log_accepted(body, tokens)
        return stream

    def _submit(self, llm: LLM, body: ExecuteBody, stream: JobStream) -> int:
        """Tokenizes and queues; returns the prompt's length in tokens."""
        tokens = llm.tokenizer.encode(body.prompt, add_special=True, parse_special=True)
        request = Request(
            job_id=body.job_id,
            prompt=tuple(tokens),
            max_tokens=body.max_tokens or self.max_tokens_limit,
            sampling=body.sampling,
            stop=body.stop,
        )
        try:
            self.engine.submit(request, stream.emit)
        except ContextOverflowError as error:
            raise BodyError([Violation("prompt", f"tokens(1..={llm.context - 1})", str(error))]) from error
        return len(tokens)

    def cancel(self, job_id: str) -> bool:
        """Ends a job's stream now and its work at the engine's next step; False where there is no such job."""
        stream = self._jobs.get(job_id)
        if stream is not None:
            stream.fail(CancelledError("the job was cancelled"))
        return stream is not None

    async def drain(self, timeout: float) -> None:
        """Takes no new job; waits for those in flight, and after `timeout` seconds ends them with an error."""
        self.draining = True
        if await self._wait_idle(timeout):
            return
        log.warning("shutdown timeout", seconds=timeout, jobs=len(self._jobs))
        for stream in list(self._jobs.values()):
            stream.fail(EngineUnavailableError("the worker shut down before the job was done"))
        await self._wait_idle(FLUSH_SECONDS)

    async def _wait_idle(self, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _forget(self, stream: JobStream) -> None:
        self._jobs.pop(stream.job_id, None)
        if not self._jobs:
            self._idle.set()


def _log_accepted(body: ExecuteBody, tokens: int) -> None:
    log.info(
        "job accepted",
        job_id=body.job_id[:128],
        prompt_characters=len(body.prompt),
        prompt_tokens=tokens,
        prompt_sha256=hashlib.sha256(body.prompt.encode()).hexdigest()[:16],
        max_tokens=body.max_tokens,
        temperature=body.temperature,
    )
