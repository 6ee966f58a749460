"""The engine: takes requests, packs the tokens of all that run into one ragged batch a step, gives events."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from llorch.core.bound import BoundModel
from llorch.core.detokenizer import IncrementalDetokenizer
from llorch.core.requests import Ended, Event, Failed, Request, Started, StopReason, Token
from llorch.core.runner import Chunk
from llorch.core.sampling import Sampler, token_logprobs
from llorch.core.scheduler import Emit, Job, Scheduler
from llorch.core.stats import STEPS_KEPT, EngineStats, JobRecord, StepRecord
from llorch.core.tokenizer import Tokenizer
from llorch.errors import (
    CancelledError,
    DeviceMemoryError,
    InvalidRequestError,
    JobExistsError,
    LlorchError,
    QueueFullError,
    QueueTimeoutError,
)

log = logging.getLogger(__name__)

Rows: TypeAlias = list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32] | None]]  # of a step: values, perhaps ids


class Engine:
    """`submit`, `cancel` and `stats` may be called from any thread; `step` from one at a time."""

    def __init__(
        self,
        model: BoundModel,
        tokenizer: Tokenizer,
        *,
        max_queue: int = 64,
        queue_timeout: float | None = None,
        mixed_chunk: int = 128,
        max_running_per_key: int | None = None,
    ) -> None:
        """`max_queue`: jobs that may wait; `queue_timeout`: seconds that each may. `mixed_chunk`: most prompt tokens of
        a step in which others decode. `max_running_per_key`: of the jobs of one key."""
        self._model, self._tokenizer = model, tokenizer
        self._max_queue, self._queue_timeout = max_queue, queue_timeout
        self._scheduler = Scheduler(
            model.sequences, model.limits, mixed_chunk=mixed_chunk, max_running_per_key=max_running_per_key
        )
        self._jobs: dict[tuple[str | None, str], Job] = {}  # all that wait or run
        self._submitted = 0
        self._counts = EngineStats(kv_blocks_total=model.allocator.total, device_bytes=model.device_bytes)
        self._steps: deque[StepRecord] = deque(maxlen=STEPS_KEPT)
        self._lock = threading.Lock()  # over _scheduler and _jobs
        self.wake = threading.Condition(self._lock)

    # ---- from any thread ----

    def submit(self, request: Request, emit: Emit) -> None:
        """Queues a request; its events go to `emit`, called by whoever steps.

        Raises InvalidRequestError, ContextOverflowError, JobExistsError, QueueFullError.
        """
        job = self._job(request, emit)
        with self._lock:
            if request.name in self._jobs:
                raise JobExistsError(f"job {request.job_id!r} is waiting or running: use another job_id")
            # those that the next step will admit do not count as waiting
            waiting = len(self._scheduler.waiting)
            vacant = self._model.limits.max_sequences - len(self._scheduler.running)
            if waiting >= self._max_queue + max(0, vacant):
                raise QueueFullError(f"{waiting} requests wait, the limit is {self._max_queue}: try later")
            self._submitted += 1
            job.number = self._submitted
            self._jobs[request.name] = job
            self._scheduler.add(job)
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

    def cancel(self, job_id: str, error: LlorchError | None = None, key: str | None = None) -> bool:
        """Ends a job of a key at the next step with `error` (CancelledError by default); False where there is none."""
        with self._lock:
            job = self._jobs.get((key, job_id))
            if job is None:
                return False
            job.cancel_with = job.cancel_with or error or CancelledError("the job was cancelled")
            self.wake.notify_all()
            return True

    def stats(self) -> EngineStats:
        """Without the lock: /health asks, and must not wait for whoever has it."""
        allocator = self._model.allocator
        return replace(
            self._counts,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_used=allocator.used,
            kv_blocks_kept=allocator.kept,
            prefix_hit_tokens=self._model.sequences.hit_tokens,
            evictions=allocator.evictions,
            preemptions=self._scheduler.preemptions,
        )

    def jobs(self, key: str | None = None) -> tuple[list[JobRecord], list[JobRecord]]:
        """Those that run and those that wait, in order of rank; of one key, or all."""
        with self._lock:
            now = time.monotonic()
            running, waiting = (
                [_record(job, now) for job in jobs if key is None or job.request.key == key]
                for jobs in (self._scheduler.running, self._scheduler.waiting)
            )
            return running, waiting

    def steps(self) -> list[StepRecord]:
        """The last steps, the latest at the end."""
        return list(self._steps)

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    # ---- from the thread that steps ----

    def step(self) -> bool:
        """Ends what was cancelled, admits what fits, runs one ragged batch. False where nothing ran."""
        self._end_cancelled()
        with self._lock:
            planned = self._scheduler.plan()
        if not planned:
            return False
        began, start = time.time(), time.perf_counter()
        for job in planned:
            if not job.started:
                self._begin(job)
        decodes = sum(job.pending == 1 for job in planned)
        prompts = sum(planned.values()) - decodes
        self._run(planned)
        self._counts.steps += 1
        self._counts.shared_steps += len(planned) > 1
        self._steps.append(StepRecord(began, time.perf_counter() - start, decodes, prompts))
        return True

    def fail_all(self, error: LlorchError) -> None:
        """Ends every job with an error."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            self._end(job, Failed(error))

    def forget(self) -> None:
        """What the cache holds is of no more use."""
        with self._lock:
            self._model.allocator.clear()

    def _end_cancelled(self) -> None:
        now = time.monotonic()
        with self._lock:
            ended = [(job, job.cancel_with) for job in self._jobs.values() if job.cancel_with is not None]
            if self._queue_timeout is not None:
                late = QueueTimeoutError(f"no place within {self._queue_timeout:g} s: try later")
                ended += [
                    (job, late)
                    for job in self._scheduler.waiting
                    if not job.started and job.cancel_with is None and now - job.submitted > self._queue_timeout
                ]
        for job, error in ended:
            self._end(job, Failed(error))

    def _begin(self, job: Job) -> None:
        """A job's first step."""
        job.started = time.monotonic()
        self._counts.prompt_tokens += len(job.request.prompt)
        self._emit(job, Started(time.time(), job.sampler.seed, job.cached_tokens))

    def _run(self, planned: dict[Job, int]) -> None:
        chunks = [
            Chunk(
                job.tokens[job.computed : job.computed + count],
                job.computed,
                job.table.blocks,
                outputs=int(count == job.pending),
            )
            for job, count in planned.items()
        ]
        wanted = [job for job, count in planned.items() if count == job.pending]
        try:
            rows = self._rows(chunks, wanted)
        except (DeviceMemoryError, MemoryError) as error:
            self._blame(planned, error)
            return
        for job, count in planned.items():
            if job.over:  # ended from outside while the step ran
                continue
            job.computed += count
            ends_prompt = count > 1 and not job.pending
            self._model.sequences.record(job.table, job.tokens, job.computed, tail=ends_prompt)
        for job, (values, ids) in zip(wanted, rows, strict=True):
            if not job.over:
                self._sample(job, values, ids)

    def _rows(self, chunks: Sequence[Chunk], wanted: Sequence[Job]) -> Rows:
        """Runs the step."""
        runner, k = self._model.runner, self._candidates(wanted)
        if not k:
            return [(row, None) for row in runner.logits(chunks)]
        return list(zip(*runner.candidates(chunks, k), strict=True))

    def _candidates(self, wanted: Sequence[Job]) -> int:
        """The smallest k of the device's that is exact for every job of the step; 0: whole rows are needed."""
        needs = [job.candidates for job in wanted]
        known = [need for need in needs if need is not None]
        if not needs or len(known) < len(needs):
            return 0
        return next((k for k in self._model.runner.candidate_sizes if k >= max(known)), 0)

    def _blame(self, planned: dict[Job, int], error: Exception) -> None:
        """The device is out of memory: that costs the job that came last, if one did, else all.

        The others have their step again: the same keys and values go to the same places.
        """
        newcomers = [job for job in planned if job.pending > 1]
        if not newcomers and len(planned) > 1:
            raise error
        last = max(newcomers or planned, key=lambda job: job.rank)
        self._end(last, Failed(DeviceMemoryError(f"the device has no memory for this request: {error}")))

    def _sample(self, job: Job, values: npt.NDArray[np.float32], ids: npt.NDArray[np.int32] | None) -> None:
        """The next token from a row of logits, or from the largest ones and their ids."""
        try:
            token = job.sampler.sample(values) if ids is None else job.sampler.sample_candidates(ids, values)
        except LlorchError as error:  # NaN logits and the like are this job's alone
            self._end(job, Failed(error), discard=True)
            return
        if job.request.logprobs is not None:
            job.logprobs.append(token_logprobs(values, token, job.request.logprobs))
        self._take(job, token)

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

    def _end(self, job: Job, event: Ended | Failed, *, discard: bool = False) -> None:
        """Frees what the job holds, then gives its last event. `discard`: nobody gets to share what it computed."""
        with self._lock:
            if job.over:
                return
            job.over = True
            del self._jobs[job.request.name]
            self._scheduler.remove(job, discard=discard)
        self._emit(job, event)

    def _emit(self, job: Job, event: Event) -> None:
        try:
            job.emit(event)
        except Exception:  # a listener's fault must not cost another job its step
            log.exception("the listener of job %s raised: the job is cancelled", job.request.job_id)
            job.cancel_with = CancelledError("its listener failed")


def _record(job: Job, now: float) -> JobRecord:
    return JobRecord(
        job_id=job.request.job_id,
        priority=job.request.priority,
        prompt_tokens=len(job.request.prompt),
        cached_tokens=job.cached_tokens,
        computed_tokens=job.computed,
        tokens_out=job.tokens_out,
        kv_blocks=len(job.table.blocks),
        preemptions=job.preemptions,
        seconds=now - job.submitted,
    )
