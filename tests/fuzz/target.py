"""What the fuzzer runs on each input, and what counts as a finding."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from llorch.core.config import ModelConfig
from llorch.core.gguf import GGUFFile
from llorch.core.loader import expected_weights
from llorch.core.tokenizer import Tokenizer
from llorch.errors import LlorchError
from llorch.machine import peak_memory, reset_peak_memory
from llorch.providers.numpy_cpu import provider

SECONDS, BYTES = 1.0, 64 << 20
LETTERS = 2000  # of a message: one lists every vocabulary that is known
TEXT = " Once <s>upon\n a <0x41> time, ⬛ été"


class Finding(Exception):
    """An input that takes longer, or more memory, than any file may, or whose error says too little or too much."""


def check(data: bytes, path: Path) -> list[str]:
    """Writes the input to `path` and takes it in as a model file: the errors that it gave, all of them llorch's own.

    Raises whatever else comes out of llorch, and Finding for a run over SECONDS or BYTES, and for an error that does
    not name the file, or is not fit for a terminal.
    """
    path.write_bytes(data)
    reset_peak_memory()
    before, start = peak_memory() or 0, time.perf_counter()
    errors = _take_in(path)
    seconds, more = time.perf_counter() - start, (peak_memory() or 0) - before
    if seconds > SECONDS:
        raise Finding(f"{seconds:.1f} s, at most {SECONDS} are allowed")
    if more > BYTES:
        raise Finding(f"{more >> 20} MiB more, at most {BYTES >> 20} are allowed")
    for error in errors:
        if str(path) not in error or not error.isprintable() or len(error) > LETTERS:
            raise Finding(f"the message is not fit to be read: {error!r:.2000}")
    return errors


def _take_in(path: Path) -> list[str]:
    errors: list[str] = []
    try:
        file = GGUFFile.open(path)
    except LlorchError as error:
        return [str(error)]
    with file:
        for part in (_model, _vocabulary):
            try:
                part(file)
            except LlorchError as error:
                errors.append(str(error))
    return errors


def _model(file: GGUFFile) -> None:
    config = ModelConfig.from_gguf(file)
    for weight in expected_weights(file, config, provider.open()):
        file.data(weight.name)
    factors = dict.fromkeys(("rope_factors_long.weight", "rope_factors_short.weight"), np.ones(config.rope_dim // 2))
    config.rope_frequencies(config.rope_scaling.factors(factors, config.context_length))


def _vocabulary(file: GGUFFile) -> None:
    tokenizer = Tokenizer.from_gguf(file)
    tokenizer.decode(tokenizer.encode(TEXT, parse_special=True))
