"""What an engine tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

STEPS_KEPT = 256


class StepRecord(NamedTuple):
    """One step: when it began, in seconds since the epoch, and what was in it."""

    began: float
    seconds: float
    decodes: int  # jobs with one token
    prompt_tokens: int


@dataclass
class EngineStats:
    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    kv_blocks_kept: int = 0  # free, but another request may yet use what they hold
    device_bytes: int = 0  # weights and cache
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0  # that did not have to be computed, as they were in the cache
    evictions: int = 0  # of kept blocks, for room
    preemptions: int = 0
    tokens_generated: int = 0
    steps: int = 0
    shared_steps: int = 0  # steps that held tokens of two or more jobs
    failures: int = 0  # of the engine, that cost all jobs in flight

    @property
    def kv_blocks_free(self) -> int:
        return self.kv_blocks_total - self.kv_blocks_used


@dataclass(frozen=True)
class JobRecord:
    """A job that waits or runs."""

    job_id: str
    priority: int
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    tokens_out: int
    kv_blocks: int
    preemptions: int
    seconds: float  # since it was submitted
