"""The scheduler under every order of arrivals, steps, ends and failures: nobody is stuck, nobody passes another."""

from __future__ import annotations

from typing import Any, cast

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from llorch.core.cache import BlockAllocator
from llorch.core.plan import Limits
from llorch.core.prefix import PrefixIndex
from llorch.core.requests import Request
from llorch.core.scheduler import Job, Scheduler
from llorch.core.sequences import SequenceCache

SIZE, CONTEXT, CHUNK, PLACES = 4, 24, 8, 3
BLOCKS = 2 + CONTEXT // SIZE  # a whole context and a block more: sequences take turns
BEGINNING = (1,) * 15
STEPS = 60


class Machine(RuleBasedStateMachine):
    """Jobs with beginnings in common; a step computes what is planned, and gives who is done with it one token more."""

    scheduler_class = Scheduler

    def __init__(self) -> None:
        super().__init__()
        index = PrefixIndex(SIZE)
        self.allocator = BlockAllocator(BLOCKS, SIZE, index)
        self.cache = SequenceCache(self.allocator, index, lambda src, dst: None)
        limits = Limits(max_tokens=CHUNK, max_sequences=PLACES, max_outputs=PLACES, max_context=CONTEXT)
        self.scheduler = self.scheduler_class(self.cache, limits, mixed_chunk=SIZE, max_running_per_key=None)
        self.count = 0

    @property
    def jobs(self) -> list[Job]:
        return self.scheduler.running + self.scheduler.waiting

    @rule(
        shared=st.integers(0, 15),
        own=st.lists(st.integers(2, 3), min_size=1, max_size=3),
        max_tokens=st.integers(1, 6),
        priority=st.sampled_from([0, 0, 0, 1]),
    )
    def submit(self, shared: int, own: list[int], max_tokens: int, priority: int) -> None:
        self.count += 1
        job_id, given = str(self.count), (*BEGINNING[:shared], *own)
        request = Request(job_id=job_id, prompt=given, max_tokens=max_tokens, priority=priority)
        # a scheduler neither samples nor says anything
        job = Job(request, cast(Any, None), cast(Any, None), cast(Any, None), max_tokens, tokens=list(given))
        job.number = self.count
        self.scheduler.add(job)

    @precondition(lambda self: self.jobs)
    @rule()
    def step(self) -> None:
        planned = self.scheduler.plan()
        assert planned, "jobs wait, and none of them runs"
        assert sum(planned.values()) <= CHUNK
        for job, count in planned.items():
            assert len(job.table.blocks) * SIZE >= job.computed + count
            job.computed += count
            job.started = job.started or 1.0
            self.cache.record(job.table, job.tokens, job.computed, tail=count > 1 and not job.pending)
        for job in planned:
            if not job.pending:
                job.tokens.append(1)
                if job.tokens_out == job.max_tokens:
                    self.scheduler.remove(job)

    @precondition(lambda self: len(self.jobs) > 2)
    @rule(data=st.data(), discard=st.booleans())
    def end(self, data: st.DataObject, discard: bool) -> None:
        """One is cancelled, or fails."""
        self.scheduler.remove(self.jobs[data.draw(st.integers(0, len(self.jobs) - 1))], discard=discard)

    @invariant()
    def both_lists_are_in_order(self) -> None:
        for jobs in (self.scheduler.running, self.scheduler.waiting):
            assert [job.rank for job in jobs] == sorted(job.rank for job in jobs)

    @invariant()
    def only_those_that_run_have_blocks(self) -> None:
        assert len({block for job in self.scheduler.running for block in job.table.blocks}) == self.allocator.used
        assert not any(job.table.blocks for job in self.scheduler.waiting)

    def teardown(self) -> None:
        """What is left comes to its end: each step of a whole chunk, or a token of at least one job."""
        most = sum(len(job.request.prompt) + job.max_tokens for job in self.jobs) * (1 + len(self.jobs))
        while self.jobs and most:
            self.step()
            most -= 1
        assert not self.jobs, "jobs that do not end"


RUN = settings(max_examples=100, stateful_step_count=STEPS, deadline=None, database=None)


def test_whatever_happens_jobs_run_in_order_and_all_come_to_their_end() -> None:
    run_state_machine_as_test(Machine, settings=RUN)


class Patient(Scheduler):
    """The twin: one waits for a beginning that nobody may be computing."""

    def _awaits_another(self, job: Job) -> bool:
        return self._sequences.awaits(job.tokens, ((other.tokens, 0) for other in self.waiting if other is not job))


class Stuck(Machine):
    scheduler_class = Patient


def test_the_rules_find_jobs_that_wait_for_each_other() -> None:
    once = settings(RUN, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)
    with pytest.raises(AssertionError, match="none of them runs"):
        run_state_machine_as_test(Stuck, settings=once)
