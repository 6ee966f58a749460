"""The engine: takes requests, packs the tokens of all that run into one ragged batch a step, gives events."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from llorch.core.bound import BoundModel
from llorch.core.detokenizer import IncrementalDetokenizer
from llorch.core.requests import Ended, Event, Failed, Request, Started, StopReason, Token, TokenLogprobs
from llorch.core.runner import Chunk
from llorch.core.sampling import Sampler, token_logprobs
from llorch.core.tokenizer import Tokenizer
from llorch.errors import (
    CancelledError,
    InvalidRequestError,
    JobExistsError,
    LlorchError,
    QueueFullError,
    QueueTimeoutError,
)

log = logging.getLogger(__name__)

Emit = Callable[[Event], None]


@dataclass
class EngineStats:
    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    device_bytes: int = 0  # weights and cache
    prompt_tokens: int = 0
    tokens_generated: int = 0
    steps: int = 0
    shared_steps: int = 0  # steps that held tokens of two or more jobs


@dataclass(eq=False)
class Job:
    """A request on its way. `tokens` are prompt and output; the first `computed` of them are in the cache."""

    request: Request
    emit: Emit
    sampler: Sampler
    detokenizer: IncrementalDetokenizer
    max_tokens: int
    submitted: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    events: int = 0  # Token events given, and the tokens behind them
    tokens_shown: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of tokens that no event has shown yet
    first_token: float = 0.0
    cancel_with: LlorchError | None = None

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def candidates(self) -> int | None:
        """How many of the largest logits its next token needs; None: the whole row."""
        return self.sampler.candidates if self.request.logprobs is None else None

    @property
    def tokens_out(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


class Engine:
    """`submit`, `cancel` and `stats` may be called from any thread; `step` from one at a time."""

    def __init__(
        self, model: BoundModel, tokenizer: Tokenizer, *, max_queue: int = 64, queue_timeout: float | None = None
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._max_queue, self._queue_timeout = max_queue, queue_timeout
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._jobs: dict[str, Job] = {}  # all that wait or run
        self._counts = EngineStats(kv_blocks_total=model.allocator.total, device_bytes=model.device_bytes)
        self._lock = threading.Lock()  # over _waiting, _running and _jobs
        self.wake = threading.Condition(self._lock)

    # ---- from any thread ----

    def submit(self, request: Request, emit: Emit) -> None:
        """Queues a request; its events go to `emit`, called by whoever steps.

        Raises InvalidRequestError, ContextOverflowError, JobExistsError, QueueFullError.
        """
        job = self._job(request, emit)
        with self._lock:
            if request.job_id in self._jobs:
                raise JobExistsError(f"job {request.job_id!r} is waiting or running: use another job_id")
            # those that the next step will admit do not count as waiting
            vacant = self._model.limits.max_sequences - len(self._running)
            if len(self._waiting) >= self._max_queue + max(0, vacant):
                raise QueueFullError(f"{len(self._waiting)} requests wait, the limit is {self._max_queue}: try later")
            self._jobs[request.job_id] = job
            self._waiting.append(job)
            self.wake.notify_all()

    def _job(self, request: Request, emit: Emit) -> Job:
        vocab, context = self._model.config.vocab_size, self._model.limits.max_context
        if not request.prompt:
            raise InvalidRequestError("the prompt has no tokens: send at least one")
        if strange := [t for t in request.prompt if not 0 <= t < vocab]:
            raise InvalidRequestError(f"prompt token {strange[0]} is outside the vocabulary of {vocab}")
        if request.max_tokens < 1:
            raise InvalidRequestError(f"max_tokens is {request.max_tokens}: ask for at least 1")
        self._model.check_room(len(request.prompt))
        sampler = Sampler(request.sampling, vocab)
        for token in request.prompt[-request.sampling.penalty_window :]:
            sampler.accept(token)
        detokenizer = IncrementalDetokenizer(self._tokenizer, request.stop)
        room = min(request.max_tokens, context - len(request.prompt))
        return Job(request, emit, sampler, detokenizer, room, tokens=list(request.prompt))

    def cancel(self, job_id: str, error: LlorchError | None = None) -> bool:
        """Ends a job at the next step with `error` (CancelledError by default); False where there is none."""
        with self._lock:
            job = self._jobs.get(job_id)
            if job is None:
                return False
            job.cancel_with = job.cancel_with or error or CancelledError("the job was cancelled")
            self.wake.notify_all()
            return True

    def stats(self) -> EngineStats:
        with self._lock:
            return replace(
                self._counts,
                running=len(self._running),
                waiting=len(self._waiting),
                kv_blocks_used=self._model.allocator.used,
            )

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    # ---- from the thread that steps ----

    def step(self) -> bool:
        """Ends what was cancelled, admits what fits, runs one ragged batch. False where nothing ran."""
        self._end_cancelled()
        self._admit()
        chunks, jobs = self._pack()
        if not chunks:
            return False
        self._counts.steps += 1
        self._counts.shared_steps += len(jobs) > 1
        self._run(chunks, jobs)
        return True

    def fail_all(self, error: LlorchError) -> None:
        """Ends every job with an error."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            self._end(job, Failed(error))

    def _end_cancelled(self) -> None:
        now = time.monotonic()
        with self._lock:
            ended = [(job, job.cancel_with) for job in self._jobs.values() if job.cancel_with is not None]
            if self._queue_timeout is not None:
                late = QueueTimeoutError(f"no place within {self._queue_timeout:g} s: try later")
                ended += [
                    (job, late)
                    for job in self._waiting
                    if job.cancel_with is None and now - job.submitted > self._queue_timeout
                ]
        for job, error in ended:
            self._end(job, Failed(error))

    def _admit(self) -> None:
        """Takes waiting jobs while blocks for all they may need are free, so that none can run out later."""
        while len(self._running) < self._model.limits.max_sequences:
            with self._lock:
                if not self._waiting:
                    return
                job = self._waiting[0]
                allocator = self._model.allocator
                blocks = allocator.allocate(allocator.blocks_for(len(job.request.prompt) + job.max_tokens))
                if blocks is None:
                    return
                self._waiting.popleft()
                job.blocks = blocks
                self._running.append(job)
            self._counts.prompt_tokens += len(job.request.prompt)
            self._emit(job, Started(time.time(), job.sampler.seed))

    def _pack(self) -> tuple[list[Chunk], list[Job]]:
        """Decodes first, one token each; then prompts, in order, into what is left of the step."""
        room, chunks, jobs = self._model.limits.max_tokens, [], []
        for job in sorted(self._running, key=lambda job: job.pending > 1):  # stable: first come, first served
            count = min(job.pending, room)
            if count == 0:
                break
            room -= count
            tokens = job.tokens[job.computed : job.computed + count]
            chunks.append(Chunk(tokens, job.computed, job.blocks, outputs=int(count == job.pending)))
            jobs.append(job)
        return chunks, jobs

    def _run(self, chunks: list[Chunk], jobs: list[Job]) -> None:
        wanted = [job for job, chunk in zip(jobs, chunks, strict=True) if chunk.outputs]
        k = self._candidates(wanted)
        runner = self._model.runner
        if k:
            values, ids = runner.candidates(chunks, k)
        else:
            logits = runner.logits(chunks)
        for job, chunk in zip(jobs, chunks, strict=True):
            job.computed += len(chunk.tokens)
        for row, job in enumerate(wanted):
            try:
                token = job.sampler.sample_candidates(ids[row], values[row]) if k else job.sampler.sample(logits[row])
            except LlorchError as error:  # NaN logits and the like are this job's alone
                self._end(job, Failed(error))
                continue
            if job.request.logprobs is not None:
                job.logprobs.append(token_logprobs(logits[row], token, job.request.logprobs))
            self._take(job, token)

    def _candidates(self, wanted: list[Job]) -> int:
        """The smallest k of the device's that is exact for every job of the step; 0: whole rows are needed."""
        needs = [job.candidates for job in wanted]
        known = [need for need in needs if need is not None]
        if not needs or len(known) < len(needs):
            return 0
        return next((k for k in self._model.runner.candidate_sizes if k >= max(known)), 0)

    def _take(self, job: Job, token: int) -> None:
        """One sampled token: into the text, and perhaps the end."""
        now = time.monotonic()
        if token in self._tokenizer.eog_ids and not job.request.ignore_eos:
            del job.logprobs[-1:]  # it is no token of the output
            self._finish(job, StopReason.EOS, now)
            return
        job.first_token = job.first_token or now
        job.tokens.append(token)
        job.sampler.accept(token)
        self._counts.tokens_generated += 1
        self._emit_text(job, job.detokenizer.push(token))
        if job.detokenizer.stopped is not None:
            self._finish(job, StopReason.STOP_SEQUENCE, now)
        elif job.tokens_out >= job.max_tokens:
            self._finish(job, StopReason.MAX_TOKENS, now)

    def _finish(self, job: Job, reason: StopReason, now: float) -> None:
        if job.detokenizer.stopped is None:
            self._emit_text(job, job.detokenizer.finish())
        # the flush itself may complete a stop string that waited for an earlier one
        if (stopped := job.detokenizer.stopped) is not None:
            reason = StopReason.STOP_SEQUENCE
        seconds = now - job.first_token if job.first_token else 0.0
        output = tuple(job.tokens[len(job.request.prompt) :])
        unseen = () if stopped is not None else tuple(job.logprobs)
        self._end(job, Ended(reason, len(output), seconds, stopped, output, unseen))

    def _emit_text(self, job: Job, text: str) -> None:
        if text:
            self._emit(job, Token(text, job.events, job.tokens_out - job.tokens_shown, tuple(job.logprobs)))
            job.logprobs.clear()
            job.events += 1
            job.tokens_shown = job.tokens_out

    def _end(self, job: Job, event: Ended | Failed) -> None:
        """Frees what the job holds, then gives its last event."""
        with self._lock:
            if self._jobs.pop(job.request.job_id, None) is None:
                return
            if job in self._running:
                self._running.remove(job)
                self._model.allocator.release(job.blocks)
            else:
                self._waiting.remove(job)
        self._emit(job, event)

    def _emit(self, job: Job, event: Event) -> None:
        try:
            job.emit(event)
        except Exception:  # a listener's fault must not cost another job its step
            log.exception("the listener of job %s raised: the job is cancelled", job.request.job_id)
            job.cancel_with = CancelledError("its listener failed")
