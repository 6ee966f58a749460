"""Which jobs run, and with how many tokens each is in the next step."""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from llorch.core.detokenizer import IncrementalDetokenizer
from llorch.core.plan import Limits
from llorch.core.requests import Event, Request, TokenLogprobs
from llorch.core.sampling import Sampler
from llorch.core.sequences import BlockTable, SequenceCache
from llorch.errors import LlorchError

log = logging.getLogger(__name__)

Emit = Callable[[Event], None]


@dataclass(eq=False)
class Job:
    """A request on its way. `tokens` are prompt and output; the first `computed` of them are in the cache."""

    request: Request
    emit: Emit
    sampler: Sampler
    detokenizer: IncrementalDetokenizer
    max_tokens: int
    number: int = 0  # of its submission
    submitted: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    table: BlockTable = field(default_factory=BlockTable)
    started: float = 0.0  # when it first ran
    cached_tokens: int = 0  # of its prompt, when it first ran
    preemptions: int = 0
    events: int = 0  # Token events given, and the tokens behind them
    tokens_shown: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of tokens that no event has shown yet
    first_token: float = 0.0
    cancel_with: LlorchError | None = None
    over: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """Who comes first: the lower priority number, then who was submitted first."""
        return self.request.priority, self.number

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


class Scheduler:
    """Jobs that wait and jobs that run, both by rank. Not thread-safe: the engine's lock is around it.

    A step has one token of each job that decodes, and behind them prompts: `max_tokens` in all, but at most
    `mixed_chunk` prompt tokens where others decode, so that a long prompt holds up no stream for long. When blocks run
    out, the last in rank gives up its own and waits to be computed again.

    A job does not begin while one before it in rank computes what both begin with: it shares that when it is there.
    Nobody passes it meanwhile; the prompt that it waits for takes the steps' room anyway, but for what its end leaves.
    """

    def __init__(
        self, sequences: SequenceCache, limits: Limits, *, mixed_chunk: int, max_running_per_key: int | None
    ) -> None:
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.preemptions = 0
        self._sequences, self._limits = sequences, limits
        self._mixed_chunk, self._max_per_key = mixed_chunk, max_running_per_key

    def add(self, job: Job) -> None:
        insort(self.waiting, job, key=lambda job: job.rank)

    def remove(self, job: Job, *, discard: bool = False) -> None:
        """Takes a job out and frees its blocks; with `discard` nobody gets to share what is in them."""
        if job not in self.running:
            self.waiting.remove(job)
            return
        self.running.remove(job)
        if discard:
            self._sequences.discard(job.table)
        else:
            self._sequences.release(job.table, job.tokens, job.computed)

    def plan(self) -> dict[Job, int]:
        """The jobs of the next step, decodes first, and how many tokens each has in it. Their blocks are theirs."""
        planned = {job: 1 for job in self.running if job.pending == 1}
        decodes = len(planned)
        room = self._limits.max_tokens - decodes
        if decodes:
            room = min(room, self._mixed_chunk)
        for job in self.running:
            if job.pending > 1 and room:
                room -= self._add(planned, job, room)
        for job in [job for job in self.running if job in planned]:
            self._make_room(job, planned)
        while room > 0 and (newcomer := self._admit()) is not None:
            room -= self._add(planned, newcomer, room)
            self._make_room(newcomer, planned)
            if newcomer not in planned:
                break
        return planned

    def _add(self, planned: dict[Job, int], job: Job, room: int) -> int:
        planned[job] = count = min(job.pending, room)
        return count

    def _make_room(self, job: Job, planned: dict[Job, int]) -> None:
        """Gives a job of the step its blocks, at the cost of the last in rank, which may be the job itself."""
        while job in planned and not self._sequences.extend(job.table, job.computed + planned[job]):
            last = self.running[-1]
            self._preempt(last)
            planned.pop(last, None)

    def _preempt(self, job: Job) -> None:
        log.debug("job %s is preempted: its %d tokens are computed again", job.request.job_id, job.computed)
        self.remove(job)
        job.table, job.computed = BlockTable(), 0
        job.preemptions += 1
        self.preemptions += 1
        self.add(job)  # in front of all that were submitted later

    def _admit(self) -> Job | None:
        """The next job begins to run, if the device has a place for it and the cache has blocks."""
        if len(self.running) >= self._limits.max_sequences or (job := self._next()) is None:
            return None
        self.waiting.remove(job)
        insort(self.running, job, key=lambda job: job.rank)
        job.table, job.computed = self._sequences.begin(job.tokens)
        if not job.started:
            job.cached_tokens = job.computed
        return job

    def _next(self) -> Job | None:
        """The first that waits, but for those whose key has all the places it may have. None where it does not fit."""
        if not self.waiting:
            return None
        taken = Counter(job.request.key for job in self.running) if self._max_per_key is not None else Counter()
        for job in self.waiting:
            if self._max_per_key is None or taken[job.request.key] < self._max_per_key:
                return job if not self._awaits_another(job) and self._fits(job) else None
        return None

    def _awaits_another(self, job: Job) -> bool:
        """Only those that run now and have a prompt to compute count, so that one that ends or gives way frees it."""
        before = (other for other in self.running if other.pending > 1 and other.rank < job.rank)
        return self._sequences.awaits(job.tokens, ((other.tokens, other.computed) for other in before))

    def _fits(self, job: Job) -> bool:
        """Whether blocks are free for all its tokens, beside what the prompts of others still need and one block more
        for each: else it would soon be preempted. One that runs alone always fits: the cache holds a whole context."""
        if not self.running:
            return True
        blocks_for = self._sequences.allocator.blocks_for
        owed = sum(blocks_for(len(other.tokens)) - len(other.table.blocks) for other in self.running)
        return self._sequences.fits(job.tokens, spare=owed + len(self.running))
