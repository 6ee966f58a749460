"""`llorch bench`: prefill (pp) and decode (tg) speed as llama-bench measures them, beside what the memory allows."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.box import SIMPLE_HEAD
from rich.table import Table

from llorch.commands import _op_bench
from llorch.commands._model import load_model
from llorch.commands._terminal import console, loading, status
from llorch.errors import SettingsError
from llorch.settings import ModelSettings, ReportSettings, parse

if TYPE_CHECKING:
    from llorch import LLM
    from llorch.machine import Bandwidth

WARMUP_TOKENS = 4  # decode steps that are not counted: what is compiled on first use


class BenchSettings(ModelSettings, ReportSettings):
    """Measure prefill (pp) and decode (tg) speed against the machine's memory bandwidth."""

    model_config = SettingsConfigDict(cli_shortcuts={"n-prompt": "p", "n-gen": "n", "repetitions": "r"})

    n_prompt: int = Field(512, ge=0, description="tokens of the prompt to process, 0 to leave this test out")
    n_gen: int = Field(128, ge=0, description="tokens to decode one at a time, 0 to leave this test out")
    repetitions: int = Field(5, ge=1, description="runs of each test after one to warm up")
    provider: str = Field("auto", description="compute providers, separated by commas")
    parallel: int = Field(1, ge=1, le=4096, description="sequences to keep room for")
    ops: bool = Field(False, description="time single operations, without a model: llorch bench --ops --help")


@dataclass(frozen=True)
class Result:
    """One test on one provider: a line of --json. Speeds are medians over the repetitions; GB are 10^9 bytes."""

    provider: str
    device: str
    model: str
    test: str  # "pp512": a prompt of 512 tokens; "tg128": 128 tokens decoded at batch 1
    tokens_per_second: float
    stdev: float
    repetitions: int
    samples: list[float]  # tokens per second
    weight_type: str
    load_seconds: float
    peak_memory_bytes: int | None  # of the process, from before the load to the end of the warm-up
    device_bytes: int  # weights and cache
    bandwidth_gb_s: float  # the better of the two below, measured between the repetitions
    read_gb_s: float
    matvec_gb_s: float  # NumPy's float32 matrix-vector product
    bytes_per_token: int | None = None  # tg: weights as the device holds them, and the cache at half of the tokens
    limit_tokens_per_second: float | None = None  # tg on a CPU: bandwidth_gb_s / bytes_per_token
    share_of_limit: float | None = None
    share_of_matvec: float | None = None  # of what matvec_gb_s allows


def main(argv: Sequence[str]) -> int:
    if "--ops" in argv:  # before parsing: it needs no --model, and has options of its own
        return _op_bench.main(argv)
    settings = parse(BenchSettings, argv, "llorch bench")
    if settings.ops:
        return _op_bench.main(argv)
    providers = [name.strip() for name in settings.provider.split(",") if name.strip()]
    if not providers:
        raise SettingsError(f"--provider: expected names separated by commas, not {settings.provider!r}")
    if not settings.n_prompt and not settings.n_gen:
        raise SettingsError("-p and -n are both 0: there is nothing to measure")
    context = _context(settings)
    results: list[Result] = []
    try:
        for provider in providers:
            for result in _measure(settings, provider, context):
                results.append(result)
                if settings.as_json:
                    print(json.dumps(dataclasses.asdict(result)), flush=True)
    finally:  # what was measured before a provider failed is shown
        if results and not settings.as_json:
            _show(results)
    return 0


def _context(settings: BenchSettings) -> int:
    """The context that the tests need. Raises SettingsError where the model or --context has less."""
    from llorch.core.config import ModelConfig
    from llorch.core.model_files import open_model

    with loading() as progress:
        file = open_model(settings.model, progress)
    with file:
        longest = ModelConfig.from_gguf(file).context_length
    limit, what = (settings.context, "--context") if settings.context else (longest, "the model's context")
    for option, tokens in (("-p", settings.n_prompt), ("-n", settings.n_gen)):
        if tokens > limit:
            raise SettingsError(f"{option} is {tokens}, {what} is {limit}: give a smaller {option}")
    return settings.context or max(settings.n_prompt, settings.n_gen, 2)


def _measure(settings: BenchSettings, provider: str, context: int) -> list[Result]:
    from llorch import machine

    machine.reset_peak_memory()
    with load_model(settings, provider=provider, context=context) as llm, status("warming up") as say:
        tests = [("pp", settings.n_prompt, llm.bench_prefill), ("tg", settings.n_gen, llm.bench_decode)]
        tests = [(kind, tokens, run) for kind, tokens, run in tests if tokens]
        for kind, tokens, run in tests:  # what is compiled on first use
            run(tokens if kind == "pp" else min(tokens, WARMUP_TOKENS))
        peak = machine.peak_memory()
        bandwidth = machine.Bandwidth(settings.threads)
        samples: dict[str, list[float]] = {f"{kind}{tokens}": [] for kind, tokens, _ in tests}
        for i in range(settings.repetitions):
            for kind, tokens, run in tests:
                say(f"{llm.provider_name} {kind}{tokens}: {i + 1} of {settings.repetitions}")
                samples[f"{kind}{tokens}"].append(tokens / run(tokens))
            bandwidth.measure()
        return [_result(llm, test, found, bandwidth, peak) for test, found in samples.items()]


def _result(llm: LLM, test: str, samples: list[float], bandwidth: Bandwidth, peak: int | None) -> Result:
    speed = statistics.median(samples)
    result = Result(
        provider=llm.provider_name,
        device=llm.device_info.name,
        model=llm.config.name,
        test=test,
        tokens_per_second=speed,
        stdev=statistics.stdev(samples) if len(samples) > 1 else 0.0,
        repetitions=len(samples),
        samples=samples,
        weight_type=llm.quant_kind,
        load_seconds=llm.load_seconds,
        peak_memory_bytes=peak,
        device_bytes=llm.device_bytes,
        bandwidth_gb_s=bandwidth.best_gb_s,
        read_gb_s=bandwidth.read_gb_s,
        matvec_gb_s=bandwidth.matvec_gb_s,
    )
    if not test.startswith("tg"):
        return result
    # token i reads the cache of the i tokens before it and its own: on average half of them all
    needed = llm.weight_bytes_per_token + llm.cache_bytes_per_token * (int(test[2:]) + 1) // 2
    result = dataclasses.replace(result, bytes_per_token=needed)
    if llm.device_info.memory_architecture != "cpu":
        return result  # what was measured is not the memory it reads
    return dataclasses.replace(
        result,
        limit_tokens_per_second=bandwidth.best_gb_s * 1e9 / needed,
        share_of_limit=speed * needed / (bandwidth.best_gb_s * 1e9),
        share_of_matvec=speed * needed / (bandwidth.matvec_gb_s * 1e9),
    )


# ---- for people ----


def _show(results: Sequence[Result]) -> None:
    first, out = results[0], console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("provider", "device", "test"):
        table.add_column(heading)
    for heading in ("tokens/s", "±", "of limit", "of matvec"):
        table.add_column(heading, justify="right")
    for r in results:
        table.add_row(
            *(r.provider, r.device, r.test, f"{r.tokens_per_second:.1f}", f"{r.stdev:.1f}"),
            *(_percent(r.share_of_limit), _percent(r.share_of_matvec)),
        )
    out.print(f"{first.model}, {first.weight_type}, medians of {first.repetitions}:")
    out.print(table)
    for r in (r for i, r in enumerate(results) if r.provider not in {earlier.provider for earlier in results[:i]}):
        peak = "" if r.peak_memory_bytes is None else f", peak memory {r.peak_memory_bytes / 2**30:.2f} GiB"
        out.print(f"{r.provider}: loaded in {r.load_seconds:.2f} s{peak}")
    for r in results:
        if r.limit_tokens_per_second is not None and r.bytes_per_token is not None:
            out.print(
                f"{r.provider} {r.test}: {r.bytes_per_token / 1e9:.3f} GB a token; memory reads {r.read_gb_s:.1f} GB/s"
                f" and NumPy's float32 matrix-vector product {r.matvec_gb_s:.1f} GB/s:"
                f" the limit is {r.limit_tokens_per_second:.1f} tokens/s"
            )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
