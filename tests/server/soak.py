"""A long run: everything that clients do, right and wrong, for as long as is asked; nothing may pile up.

make soak [SECONDS=600]. Prints what happened and writes the memory's course to .cache/soak.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.server.bad_bodies import Case, cases
from tests.server.crowd import ask
from tests.server.probe import Probe, probing
from tests.server.process import Server, eventually
from tests.server.wire import Answer, Wire, connect, request
from tests.support import ROOT, shared

CLIENTS = 24
WARM_UP = 0.2  # the share of the run in which memory may grow
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
STARTS = ("Once upon a time", "Lily saw", "One day, a little boy", "The dog", "There was a big red ball. " * 8)
HEALTH_SECONDS = 0.1


def options(folder: Path) -> list[str]:
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    return ["--max-queue", "16", "--chat-template", str(template)]


@dataclass
class Report:
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)  # seconds since the start, bytes
    descriptors: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    health: Probe = field(default_factory=Probe)

    @property
    def growth(self) -> float:
        """Of the resident memory, from the tenth of the run that follows the warm-up to the last tenth."""
        sizes = [size for _, size in self.resident]
        begin, tenth = int(len(sizes) * WARM_UP), max(1, len(sizes) // 10)
        return statistics.median(sizes[-tenth:]) / statistics.median(sizes[begin : begin + tenth]) - 1

    @property
    def missing(self) -> float:
        """Accepted requests of which no end was counted."""
        over = ("ended", "failed", "cancelled")
        counted = sum(self.metrics[f'llorch_requests_total{{outcome="{outcome}"}}'] for outcome in over)
        return self.metrics["llorch_requests_accepted_total"] - counted

    def __str__(self) -> str:
        sizes = [size / 1e6 for _, size in self.resident]
        counters = {
            name: f"{value:g}" for name, value in self.metrics.items() if "requests_" in name and "total" in name
        }
        return "\n".join(
            [
                f"{sum(self.done.values())} requests: {dict(sorted(self.done.items()))}",
                f"problems: {self.problems[:10] or 'none'}",
                f"resident: {min(sizes):.1f} to {max(sizes):.1f} MB, after the warm-up {self.growth:+.2%}",
                f"descriptors: {min(self.descriptors)} to {max(self.descriptors)}",
                str(self.health),
                f"counters: {counters}, not accounted for: {self.missing:g}",
            ]
        )


# ---- what clients do ----


class Client:
    """One client after another: each request on a connection of its own, or on the last one's."""

    def __init__(self, url: str, number: int, report: Report, bad: Sequence[Case]) -> None:
        self._url, self._number, self._report, self._bad = url, number, report, bad
        self._chance = random.Random(number)
        self._count = 0

    async def run(self, until: float) -> None:
        actions: list[tuple[Callable[[Wire], Awaitable[str]], int]] = [
            (self._execute, 30),
            (self._whole, 15),
            (self._streamed, 15),
            (self._chat, 10),
            (self._leave, 12),
            (self._cancel, 6),
            (self._bad_body, 8),
            (self._look, 4),
        ]
        while time.monotonic() < until:
            async with connect(self._url) as wire:
                for _ in range(self._chance.randrange(1, 5)):
                    ((action, _),) = self._chance.choices(actions, [weight for _, weight in actions])
                    name = action.__name__.strip("_")
                    try:
                        outcome = await action(wire)
                    except (AssertionError, EOFError, OSError, ValueError) as error:
                        self._report.problems.append(f"{name}: {error!r}")
                        outcome = "problem"
                    self._report.done[f"{name} {outcome}"] += 1
                    if outcome in ("left", "problem"):
                        break

    def _job(self) -> dict[str, Any]:
        self._count += 1
        chance = self._chance
        job = {"prompt": chance.choice(STARTS), "max_tokens": chance.randrange(1, 40)}
        return job | {"temperature": chance.choice([0, 1]), "top_p": chance.choice([1, 0.9])}

    def _named(self) -> dict[str, Any]:
        return {"job_id": f"{self._number}-{self._count}", **self._job()}

    async def _execute(self, wire: Wire) -> str:
        answer = await wire.ask("POST", "/execute", self._named())
        return self._refused(answer) or self._is(answer.events[-1]["type"] == "end", answer)

    async def _whole(self, wire: Wire) -> str:
        answer = await wire.ask("POST", "/v1/completions", self._job() | {"n": self._chance.choice([1, 1, 2])})
        return self._refused(answer) or self._is(answer.json()["choices"][0]["finish_reason"] is not None, answer)

    async def _streamed(self, wire: Wire) -> str:
        answer = await wire.ask("POST", "/v1/completions", self._job() | {"stream": True, "logprobs": 2})
        return self._refused(answer) or self._is(answer.events[-1] == "[DONE]", answer)

    async def _chat(self, wire: Wire) -> str:
        job = self._job()
        body = {"messages": [{"role": "user", "content": job.pop("prompt")}], "stream": True, **job}
        answer = await wire.ask("POST", "/v1/chat/completions", body)
        return self._refused(answer) or self._is(answer.events[-1] == "[DONE]", answer)

    async def _leave(self, wire: Wire) -> str:
        sent = request("POST", "/execute", self._named() | {"max_tokens": 200})
        point = self._chance.random()
        await wire.send(sent[: int(len(sent) * 2 * point)])
        if point > 0.7:
            status, _ = await wire.head()
            if status == 200:
                await wire.reader.read(self._chance.randrange(1, 2000))
        await asyncio.sleep(self._chance.random() / 20)
        return "left"

    async def _cancel(self, wire: Wire) -> str:
        job = self._named() | {"max_tokens": 400}
        asking = asyncio.ensure_future(wire.ask("POST", "/execute", job))
        await asyncio.sleep(self._chance.random() / 5)
        async with connect(self._url) as other:
            assert (await other.ask("POST", "/cancel", {"job_id": job["job_id"]})).status == 202
        answer = await asking
        # it may have been cancelled before it was queued, or have ended before it was cancelled
        if answer.status == 499:
            return "ok"
        return self._refused(answer) or self._is(answer.events[-1]["type"] in ("end", "error"), answer)

    async def _bad_body(self, wire: Wire) -> str:
        case = self._chance.choice(self._bad)
        answer = await wire.ask("POST", case.path, case.body)
        if answer.status == 503:  # a full queue comes before what only the prompt's tokens would show
            return self._is("retry-after" in answer.headers, answer) and "refused"
        return self._is(answer.status in (400, 404, 413), answer)

    async def _look(self, wire: Wire) -> str:
        answer = await wire.ask("GET", self._chance.choice(["/metrics", "/v1/models", "/docs/openapi.json", "/"]))
        return self._is(answer.status == 200, answer)

    def _refused(self, answer: Answer) -> str | None:
        if answer.status == 503:
            return self._is("retry-after" in answer.headers, answer) and "refused"
        assert answer.status == 200, answer
        return None

    def _is(self, right: bool, answer: Answer) -> str:
        assert right, answer
        return "ok"


# ---- the run ----


class Forgetful(Server):
    """Keeps no line of a request, of which there are millions."""

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            line = json.loads(text)
            if "correlation_id" not in line or line["level"] != "info":
                self.lines.append(line)


def complaints(server: Server) -> list[dict[str, Any]]:
    return [line for line in list(server.lines) if line["level"] != "info"]


async def _watch(server: Server, report: Report, interval: float) -> None:
    process, began = psutil.Process(server.process.pid), time.monotonic()
    while True:
        report.resident.append((time.monotonic() - began, process.memory_info().rss))
        report.descriptors.append(process.num_fds())
        await asyncio.sleep(interval)


async def _run(server: Server, seconds: float, report: Report) -> None:
    bad = [case for case in cases() if len(case.body) < 100_000]
    until = time.monotonic() + seconds
    watching = asyncio.create_task(_watch(server, report, seconds / 200))
    await asyncio.gather(*(Client(server.url, i, report, bad).run(until) for i in range(CLIENTS)))
    watching.cancel()


def crowd(server: Server) -> Probe:
    """4,096 requests of 1,024 clients, each of which is answered."""
    with probing(server.url) as probe:
        answers = asyncio.run(ask(server.url, 1024, 4, "crowd"))
    found = Counter(answer.status for answer in answers)
    print(f"{len(answers)} requests of 1,024 clients at once: {dict(found)}; {probe}")
    assert found.keys() <= {200, 503}, found
    return probe


def soak(server: Server, seconds: float) -> Report:
    """Runs it against a server that is healthy, and was started with `options`."""
    report = Report()
    with probing(server.url) as report.health:
        asyncio.run(_run(server, seconds, report))

    def idle() -> bool:
        report.metrics = server.metrics()
        return not any(
            report.metrics[f"llorch_{name}"] for name in ("running_requests", "queue_depth", "kv_blocks_used")
        )

    eventually(idle, 30, "an idle server")
    eventually(lambda: idle() and report.missing == 0, 10, "counters that add up")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = shared("models", "stories260K.gguf")
        server = Forgetful(folder, "--model", str(model), "--provider", "numpy-cpu", *options(folder))
        try:
            at_once = crowd(server.wait_healthy())
            report = soak(server, seconds)
        finally:
            server.close()
    print(report)
    print(f"log, beside information: {complaints(server)[:5] or 'nothing'}")
    course = ROOT / ".cache" / "soak.csv"
    course.parent.mkdir(exist_ok=True)
    with course.open("w", newline="") as file:
        csv.writer(file).writerows([("seconds", "resident_bytes"), *report.resident])
    slow = max(probe.percentile(0.99) for probe in (at_once, report.health)) > HEALTH_SECONDS
    sys.exit(bool(report.problems or complaints(server)) or abs(report.growth) > 0.02 or slow)


if __name__ == "__main__":
    main()
