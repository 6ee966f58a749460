"""What the worker's routes share: the engine, the jobs in flight, whether new ones are taken."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import structlog

from llorch.core.engine_thread import EngineThread
from llorch.core.llm import LLM
from llorch.core.requests import Event, Request
from llorch.errors import (
    CancelledError,
    ContextOverflowError,
    EngineUnavailableError,
    JobExistsError,
    LlorchError,
    QueueFullError,
)
from llorch.http.bodies import ExecuteBody, execute_fields
from llorch.http.fields import BodyError, Violation, parse_body
from llorch.http.inbox import Inbox
from llorch.http.job import Deliver, Job, Mailbox
from llorch.http.metrics import Metrics
from llorch.http.stream import JobStream, Timing
from llorch.http.traces import Tracer

log = structlog.stdlib.get_logger(__name__)

Found = TypeVar("Found")

TOKENIZERS = 2  # threads; more would take turns at the interpreter with the event loop and the engine
FLUSH_SECONDS = 2.0  # for the last event of a stream that is ended from here to reach its client


class Worker:
    """One model behind HTTP. Belongs to the event loop; the engine has a thread of its own."""

    def __init__(
        self,
        engine: EngineThread,
        *,
        max_tokens_limit: int = 2048,
        timing: Timing | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.engine, self.tracer = engine, tracer
        self.metrics = Metrics(engine.stats)
        self.max_tokens_limit = max_tokens_limit
        self.draining = False
        self.timing = timing or Timing()
        self._mailbox = Mailbox()
        engine.on_step = self._mailbox.flush
        self._tokenizers = ThreadPoolExecutor(TOKENIZERS, thread_name_prefix="llorch-tokenize")
        self._submitting = 0  # jobs that the engine does not know yet
        self._jobs: dict[
            tuple[str | None, str], Job
        ] = {}  # from before the prompt is tokenized until the response is over
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def loading(self) -> bool:
        return not self.engine.ready and self.engine.health() is None

    @property
    def unavailable(self) -> str | None:
        """Why no job is taken now; None where one is."""
        if (reason := self.engine.health()) is not None:
            return reason
        if self.draining:
            return "the worker is shutting down: send the request to another"
        if self.loading:
            return f"the model is loading ({self.engine.progress:.0%}): try again soon"
        return None

    async def start(self, raw: bytes, key: str | None = None) -> JobStream:
        """Accepts a job into the queue. Raises BodyError, JobExistsError, QueueFullError, EngineUnavailableError.

        `key`: whose it is, where there are API keys.
        """
        with self.counted():
            return await self._start(raw, key)

    async def _start(self, raw: bytes, key: str | None) -> JobStream:
        llm = self.ready()
        body = ExecuteBody(**parse_body(raw, execute_fields(self.max_tokens_limit, llm.config.vocab_size)))
        events: Inbox[Event] = Inbox()
        job = self.open_job(body.job_id, events.put, key)
        tokens = await self.queue([job], lambda: self._submit(llm, body, job, key))
        _log_accepted(body, tokens)
        return JobStream(job, events, llm.config.name, self.engine, self.timing)

    # ---- what every way to start jobs shares ----

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a request that ends before it is accepted: what is accepted is counted by its jobs."""
        try:
            yield
        except LlorchError as error:
            self.metrics.reject(error.code)
            raise

    def ready(self) -> LLM:
        """The model, while jobs are taken. Raises EngineUnavailableError."""
        llm = self.engine.llm
        if (reason := self.unavailable) is not None or llm is None:
            raise EngineUnavailableError(reason or "the model is not loaded")
        return llm

    def open_job(self, job_id: str, deliver: Deliver, key: str | None) -> Job:
        """A job that `queue` is to be called with. Raises JobExistsError, where the key has one of that id."""
        if (key, job_id) in self._jobs:
            raise JobExistsError(f"job {job_id[:128]!r} is waiting or running: use another job_id")
        job = Job(job_id, deliver, self.engine, self._mailbox, self.metrics, self._forget, key)
        self._jobs[key, job_id] = job
        self._idle.clear()
        return job

    def _check_room(self, count: int) -> None:
        """Refuses what the engine would, before a thread takes the trouble to tokenize it."""
        stats, most = self.engine.stats(), self.engine.capacity
        # not their sum: what a thread has just submitted is in both until the event loop hears of it
        wanted = max(self._submitting, stats.waiting + stats.running + count)
        if wanted > most:
            raise QueueFullError(f"{wanted} requests would wait or run, {most} are taken at once: try later")

    async def queue(self, jobs: Sequence[Job], submit: Callable[[], Found], pool: Executor | None = None) -> Found:
        """Runs `submit`, which hands the jobs to the engine, on a thread. All of them are in the queue or none is.

        Raises QueueFullError, and what `submit` raises.
        """
        self._submitting += len(jobs)
        try:
            self._check_room(len(jobs))
            # neither a long prompt's tokenizing nor the engine's lock may hold up the event loop
            found = await asyncio.get_running_loop().run_in_executor(pool or self._tokenizers, submit)
            for job in jobs:
                if job.failure is not None:  # cancelled, or the worker shut down, before the engine knew of it
                    raise job.failure
        except BaseException as error:
            reason = error if isinstance(error, LlorchError) else CancelledError("the request failed")
            for job in jobs:
                self.engine.cancel(job.job_id, reason, job.key)
                self._forget(job)
            raise
        finally:
            self._submitting -= len(jobs)
        self.metrics.accepted.inc(len(jobs))
        return found

    def _submit(self, llm: LLM, body: ExecuteBody, job: Job, key: str | None) -> int:
        """Tokenizes and queues; returns the prompt's length in tokens."""
        tokens = llm.tokenizer.encode(body.prompt, add_special=True, parse_special=True)
        request = Request(
            job_id=body.job_id,
            prompt=tuple(tokens),
            max_tokens=body.max_tokens or self.max_tokens_limit,
            sampling=body.sampling,
            stop=body.stop,
            priority=body.priority,
            key=key,
        )
        try:
            self.engine.submit(request, job.emit)
        except ContextOverflowError as error:
            message = str(error).removeprefix("prompt ")  # a violation's begins with the field's name
            raise BodyError([Violation("prompt", f"tokens(1..={llm.context - 1})", message)]) from error
        return len(tokens)

    def cancel(self, job_id: str, key: str | None = None) -> bool:
        """Ends a job's stream now and its work at the engine's next step; False where the key has no such job."""
        job = self._jobs.get((key, job_id))
        if job is not None:
            job.fail(CancelledError("the job was cancelled"))
        return job is not None

    async def drain(self, timeout: float) -> None:
        """Takes no new job; waits for those in flight, and after `timeout` seconds ends them with an error."""
        self.draining = True
        if await self._wait_idle(timeout):
            return
        log.warning("shutdown timeout", seconds=timeout, jobs=len(self._jobs))
        for job in list(self._jobs.values()):
            job.fail(EngineUnavailableError("the worker shut down before the job was done"))
        await self._wait_idle(FLUSH_SECONDS)

    async def _wait_idle(self, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _forget(self, job: Job) -> None:
        if self.tracer is not None and job.last is not None:
            self.tracer.record(job)
        self._jobs.pop((job.key, job.job_id), None)
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
