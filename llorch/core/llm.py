"""A model loaded on a device: the public `llorch.load` and `LLM`."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from llorch.core.bound import BoundModel
from llorch.core.cache import BlockAllocator
from llorch.core.chat import Chat
from llorch.core.config import ModelConfig
from llorch.core.engine import Engine
from llorch.core.forecast import Forecaster
from llorch.core.gguf import GGUFFile
from llorch.core.loader import load_weights
from llorch.core.model_files import open_model
from llorch.core.opening import open_device
from llorch.core.plan import Limits
from llorch.core.requests import Ended, Event, Failed, Request, SamplingParams, Token
from llorch.core.runner import Runner
from llorch.core.tokenizer import Tokenizer
from llorch.errors import SettingsError, TokenizerError
from llorch.providers import registry
from llorch.providers.device import Device, DeviceInfo, DeviceOptions, Provider
from llorch.providers.memory_limit import MemoryLimit

DOWNLOAD_SHARE = 0.9  # of the progress that is reported
OUTPUT_ROWS = 64  # rows of logits a step may give; more are computed in several steps


def load(
    model: str | Path,
    *,
    provider: str = "auto",
    device: str | None = None,
    context: int | None = None,
    cache_type: str | None = None,
    cache_tokens: int | None = None,
    prefix_cache: bool = True,
    parallel: int = 8,
    chunk: int = 512,
    threads: int | None = None,
    gpu_memory: str | None = None,
    prefill_weights: Literal["half"] | None = None,
    chat_template: str | Path | None = None,
    progress: Callable[[float, str], None] = lambda _fraction, _text: None,
) -> LLM:
    """Loads a GGUF model on a provider's device.

    `model`: a file (any part of a split one), a directory or pattern that holds one model, or a model of the Hugging
    Face Hub: "hf:OWNER/REPO", ":FILE" or ":QUANT" behind it where the repository has several.
    `context`: tokens of one sequence, the model's own by default. `cache_type`: "f32" or "f16", the provider's default
    where None. `cache_tokens`: what the KV cache holds of all sequences together, by default `parallel` contexts, or
    what the device has room for where that is less. `prefix_cache`: prompts that begin alike share what is computed of
    them. `parallel`: sequences that run together. `chunk`: most tokens of one step. `gpu_memory`: the most to take,
    "20GiB" or "90%". `prefill_weights`: "half" keeps halves beside quantised weights. A provider without these two
    refuses them. `chat_template`: a file, or the name of one of the model's templates, instead of the model's default.
    `progress` gets a fraction and what is being done. Raises ModelError, ProviderError or SettingsError.
    """
    start = time.perf_counter()
    chosen, why = registry.choose(provider)
    options = _device_options(chosen, threads, gpu_memory, prefill_weights)
    stages = _Stages(progress)
    file = open_model(model, stages.download)
    opened: Device | None = None
    chat: Chat | None = None
    try:
        config = ModelConfig.from_gguf(file)
        tokenizer = Tokenizer.from_gguf(file)
        if tokenizer.vocab_size != config.vocab_size:
            raise TokenizerError(
                f"{file.begin('tokenizer.ggml.tokens')} has {tokenizer.vocab_size} tokens, token_embd.weight "
                f"{config.vocab_size} rows; convert the model again with a current converter"
            )
        limits = limits_of(config, context, parallel, chunk)
        chat = Chat.from_gguf(file, tokenizer, chat_template)
        opened = open_device(chosen, device, options)
        Forecaster(file, config, chosen, opened).check(limits, cache_type, cache_tokens)
        weights = load_weights(file, config, opened, stages.load)
        bound = BoundModel(
            config, chosen, opened, weights, limits, cache_type, cache_tokens=cache_tokens, prefix_cache=prefix_cache
        )
    except BaseException:
        if chat is not None:
            chat.close()
        if opened is not None:
            opened.close()
        file.close()
        raise
    progress(1.0, "ready")
    start_lines = [
        f"provider {chosen.name} on {opened.info.name} ({opened.info.description}): {why}",
        f"{chosen.name}: {bound.counts}",
        *weights.notes,
        bound.cache_line,
    ]
    return LLM(file, tokenizer, chat, bound, start_lines, time.perf_counter() - start)


class _Stages:
    """One progress from two: most of it is a download, where there is one."""

    def __init__(self, progress: Callable[[float, str], None]) -> None:
        self._progress, self._done = progress, 0.0

    def download(self, fraction: float, text: str) -> None:
        self._done = DOWNLOAD_SHARE
        self._progress(DOWNLOAD_SHARE * fraction, text)

    def load(self, fraction: float, text: str) -> None:
        self._progress(self._done + (1 - self._done) * fraction, text)


def _device_options(
    provider: Provider, threads: int | None, gpu_memory: str | None, prefill_weights: Literal["half"] | None
) -> DeviceOptions:
    """Raises SettingsError for an option that the provider has not."""
    try:
        limit = None if gpu_memory is None else MemoryLimit.parse(gpu_memory)
    except ValueError as error:
        raise SettingsError(f"gpu_memory: {error}, not {gpu_memory!r}") from error
    options = DeviceOptions(threads=threads, gpu_memory=limit, prefill_weights=prefill_weights)
    for name in ("gpu_memory", "prefill_weights"):
        if getattr(options, name) is not None and name not in getattr(provider, "options", ()):
            raise SettingsError(
                f"provider {provider.name} has no --{name.replace('_', '-')}: leave it out, or choose a provider that "
                "has it with --provider"
            )
    return options


def limits_of(config: ModelConfig, context: int | None, parallel: int, chunk: int) -> Limits:
    """The limits of a model that is loaded with these settings. Raises SettingsError."""
    if context is not None and not 1 < context <= config.context_length:
        raise SettingsError(
            f"context {context} is outside 2 to {config.context_length}, the context this model was trained for",
            setting="context",
        )
    if parallel < 1 or chunk < 1:
        raise SettingsError(f"parallel is {parallel} and chunk is {chunk}: both must be at least 1")
    context = context or config.context_length
    return Limits(
        max_tokens=max(min(chunk, context), parallel),
        max_sequences=parallel,
        max_outputs=max(parallel, OUTPUT_ROWS),
        max_context=context,
    )


class LLM:
    """A loaded model. Its methods may be called from several threads: their steps take turns, and share where they can.

    A context manager; `close` gives back the device and the file.
    """

    def __init__(
        self,
        file: GGUFFile,
        tokenizer: Tokenizer,
        chat: Chat,
        bound: BoundModel,
        start_lines: list[str],
        load_seconds: float,
    ) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self.start_lines, self.load_seconds = start_lines, load_seconds
        self.config, self.limits = bound.config, bound.limits
        self.loaded_at = int(time.time())  # seconds since the epoch
        self.model_ref, self.quant_kind = str(file.path), bound.config.quant_kind
        self.provider_name, self.batch_invariant = bound.provider.name, bound.provider.batch_invariant
        self.rounds_activations: bool = getattr(bound.provider, "rounds_activations", False)
        self._file, self._bound = file, bound
        self._engine = self.engine(max_queue=1 << 16)
        self._closed = False

    @property
    def context(self) -> int:
        """Tokens that one sequence may have, prompt and output together."""
        return self.limits.max_context

    @property
    def device(self) -> Device:
        """The opened device, for measurements: its calls must take turns with this object's."""
        return self._bound.device

    @property
    def device_info(self) -> DeviceInfo:
        return self._bound.device.info

    @property
    def cache_type(self) -> str:
        return self._bound.cache_spec.dtype

    @property
    def device_bytes(self) -> int:
        """Bytes of weights and cache on the device."""
        return self._bound.device_bytes

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights, as the device holds them, that the products of one decode step read."""
        return self._bound.weights.matmul_bytes

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token of context takes, and that a later token's attention reads."""
        spec = self._bound.cache_spec
        return spec.nbytes // (spec.blocks * spec.block_size)

    @property
    def runner(self) -> Runner:
        return self._bound.runner

    @property
    def allocator(self) -> BlockAllocator:
        return self._bound.allocator

    def engine(
        self,
        *,
        max_queue: int = 64,
        queue_timeout: float | None = None,
        mixed_chunk: int = 128,
        max_running_per_key: int | None = None,
    ) -> Engine:
        """A scheduler of requests over this model, for whoever steps it: `llorch serve` has one on a thread."""
        return Engine(
            self._bound,
            self.tokenizer,
            max_queue=max_queue,
            queue_timeout=queue_timeout,
            mixed_chunk=mixed_chunk,
            max_running_per_key=max_running_per_key,
        )

    # ---- generation ----

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Pieces of text as they become certain. `prompt` is text (BOS is added) or token ids."""
        sampling = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            seed=seed,
        )
        for event in self.stream(prompt, sampling, max_tokens=max_tokens, stop=stop):
            if isinstance(event, Token):
                yield event.text

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Event]:
        """The events of one generation: Started, Tokens, and Ended with its reason and all token ids.

        Steps the engine until this request ends; threads that do so at once share their steps.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        request = Request(
            job_id=f"stream-{next(_numbers)}",
            prompt=tuple(ids),
            max_tokens=max_tokens,
            sampling=sampling or SamplingParams(),
            stop=tuple(stop),
            ignore_eos=ignore_eos,
        )
        events: deque[Event] = deque()
        self._engine.submit(request, events.append)
        try:
            while True:
                while events:
                    event = events.popleft()
                    if isinstance(event, Failed):
                        raise event.error
                    yield event
                    if isinstance(event, Ended):
                        return
                with self._bound.turn:
                    if not events:
                        self._engine.step()
        finally:
            if self._engine.cancel(request.job_id):
                with self._bound.turn:
                    self._engine.step()  # gives its blocks back now

    def generate_ids(
        self, prompt: Sequence[int], *, max_tokens: int = 128, temperature: float = 0.0, seed: int | None = None
    ) -> list[int]:
        """The ids of `max_tokens` tokens, past any end of generation."""
        sampling = SamplingParams(temperature=temperature, seed=seed)
        *_, ended = self.stream(prompt, sampling, max_tokens=max_tokens, ignore_eos=True)
        assert isinstance(ended, Ended)
        return list(ended.tokens)

    # ---- looking inside ----

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits [T, vocab] of every position of a prompt."""
        return self._bound.logits(tokens)

    def checkpoints(
        self, tokens: Sequence[int], labels: Sequence[str], *, fused: bool = False
    ) -> dict[str, npt.NDArray[np.float32]]:
        """What the labelled steps of one forward pass over `tokens` write, each [T, width].

        `fused=False` binds the graph without the provider's fused operations, so that every label exists;
        `fused=True` runs the plan as served. Raises InvalidRequestError for a label that the plan has not.
        """
        return self._bound.checkpoints(tokens, labels, fused=fused)

    def labels(self, *, fused: bool = False) -> dict[str, str]:
        """Every label that `checkpoints` takes, in the order in which the values are computed, and the operation that
        writes it: {"token_embd": "embed", "blk.0.attn_norm": "rmsnorm", ...}."""
        return self._bound.labels(fused=fused)

    def bench_prefill(self, tokens: int) -> float:
        """Seconds to process a prompt of this many tokens, in chunks as served."""
        return self._bound.time_prefill(tokens)

    def bench_decode(self, tokens: int, context: int = 0) -> float:
        """Seconds to decode this many tokens of one sequence, one at a time, behind `context` others."""
        return self._bound.time_decode(tokens, context)

    # ---- life ----

    def close(self) -> None:
        """Gives back the device and the file; the object cannot be used afterwards."""
        with self._bound.turn:
            if not self._closed:
                self._closed = True
                self.chat.close()
                self._bound.device.close()
                self._file.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


_numbers = itertools.count(1)
