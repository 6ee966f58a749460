"""llama.cpp as the reference, through the C API that the extension module of the xllamacpp wheel exports.

The wheel's own Python interface gives text; ctypes gives the logits of every position, with the settings that make the
comparison sharp: float32 cache, no flash attention, CPU, one thread. Declarations follow llama.h; llama.cpp moves the
fields of its parameter structs now and then, so what comes back is compared with known defaults before it is trusted.
"""

from __future__ import annotations

import atexit
import ctypes as C
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import absent

F32 = 0  # GGML_TYPE_F32
DEBUG, WARNING = 1, 3  # GGML_LOG_LEVEL_DEBUG, GGML_LOG_LEVEL_WARN; 4 is an error


class ModelParams(C.Structure):
    """llama_model_params as far as it is set here; `rest` is more than all the fields behind."""

    _fields_ = [
        ("devices", C.c_void_p),
        ("tensor_buft_overrides", C.c_void_p),
        ("n_gpu_layers", C.c_int32),
        ("split_mode", C.c_int32),
        ("rest", C.c_char * 512),
    ]


class ContextParams(C.Structure):
    """llama_context_params as far as it is set here; `rest` is more than all the fields behind."""

    _fields_ = [
        *((name, C.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        *((name, C.c_uint32) for name in ("n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")),
        *((name, C.c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, C.c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, C.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, C.c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", C.c_uint32),
        ("defrag_thold", C.c_float),
        ("cb_eval", C.c_void_p),
        ("cb_eval_user_data", C.c_void_p),
        ("type_k", C.c_int32),
        ("type_v", C.c_int32),
        ("rest", C.c_char * 512),
    ]


MODEL_DEFAULTS = {"devices": None, "tensor_buft_overrides": None, "n_gpu_layers": -1, "split_mode": 1}
CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0, "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4, "ctx_type": 0, "rope_scaling_type": -1,
    "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1, "rope_freq_base": 0.0, "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0, "defrag_thold": -1.0, "cb_eval": None, "cb_eval_user_data": None, "type_k": 1, "type_v": 1,
}  # fmt: skip


class Batch(C.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", C.c_int32),
        ("token", C.POINTER(C.c_int32)),
        ("embd", C.c_void_p),
        ("pos", C.POINTER(C.c_int32)),
        ("n_seq_id", C.POINTER(C.c_int32)),
        ("seq_id", C.POINTER(C.POINTER(C.c_int32))),
        ("logits", C.POINTER(C.c_int8)),
    ]


class TokenData(C.Structure):
    """llama_token_data."""

    _fields_ = [("id", C.c_int32), ("logit", C.c_float), ("p", C.c_float)]


class TokenDataArray(C.Structure):
    """llama_token_data_array."""

    _fields_ = [
        ("data", C.POINTER(TokenData)),
        ("size", C.c_size_t),
        ("selected", C.c_int64),
        ("sorted", C.c_bool),
    ]


Handle = C.c_void_p
LogCallback = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)

PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [C.c_void_p, C.c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (Handle, [C.c_char_p, ModelParams]),
    "llama_model_free": (None, [Handle]),
    "llama_init_from_model": (Handle, [Handle, ContextParams]),
    "llama_free": (None, [Handle]),
    "llama_model_get_vocab": (Handle, [Handle]),
    "llama_vocab_n_tokens": (C.c_int32, [Handle]),
    "llama_vocab_is_eog": (C.c_bool, [Handle, C.c_int32]),
    "llama_tokenize": (
        C.c_int32,
        [Handle, C.c_char_p, C.c_int32, C.POINTER(C.c_int32), C.c_int32, C.c_bool, C.c_bool],
    ),
    "llama_n_ctx": (C.c_uint32, [Handle]),
    "llama_n_threads": (C.c_int32, [Handle]),
    "llama_get_memory": (Handle, [Handle]),
    "llama_memory_clear": (None, [Handle, C.c_bool]),
    "llama_batch_init": (Batch, [C.c_int32, C.c_int32, C.c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (C.c_int32, [Handle, Batch]),
    "llama_get_logits_ith": (C.POINTER(C.c_float), [Handle, C.c_int32]),
    "llama_sampler_init_penalties": (Handle, [C.c_int32, C.c_int32, C.c_float, C.c_float, C.c_float]),
    "llama_sampler_init_top_k": (Handle, [C.c_int32]),
    "llama_sampler_init_top_p": (Handle, [C.c_float, C.c_size_t]),
    "llama_sampler_init_min_p": (Handle, [C.c_float, C.c_size_t]),
    "llama_sampler_init_temp": (Handle, [C.c_float]),
    "llama_sampler_accept": (None, [Handle, C.c_int32]),
    "llama_sampler_apply": (None, [Handle, C.POINTER(TokenDataArray)]),
    "llama_sampler_free": (None, [Handle]),
}

_log: list[tuple[int, str]] = []  # (level, text) of what llama.cpp has said


@LogCallback
def _on_log(level: int, text: bytes, _user_data: Any) -> None:
    if level != DEBUG:
        _log.append((level, text.decode(errors="replace")))


@cache
def library() -> Any:
    """The loaded C API. Skips the test where the wheel is not installed, or hides the symbols on this platform."""
    try:
        import xllamacpp
    except ImportError as error:
        absent(f"llama.cpp is not here: pip install 'llorch[parity]' ({error})")
    api = C.CDLL(xllamacpp.xllamacpp.__file__)
    if missing := [name for name in PROTOTYPES if not hasattr(api, name)]:
        absent(f"xllamacpp {xllamacpp.__version__} does not export {', '.join(missing)} on this platform")
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(api, name)
        function.restype, function.argtypes = result, arguments
    api.llama_log_set(_on_log, None)
    atexit.register(api.llama_log_set, None, None)  # no call back into an interpreter that is gone
    check_layout(api.llama_model_default_params(), MODEL_DEFAULTS, xllamacpp.__version__)
    check_layout(api.llama_context_default_params(), CONTEXT_DEFAULTS, xllamacpp.__version__)
    api.llama_backend_init()
    return api


def check_layout(params: C.Structure, defaults: dict[str, Any], version: str) -> None:
    """Raises RuntimeError where llama.cpp's default parameters do not read back as they should."""
    found = {name: getattr(params, name) for name in defaults}
    if differing := [
        f"{name} is {found[name]}, not {value}" for name, value in defaults.items() if found[name] != value
    ]:
        raise RuntimeError(
            f"{type(params).__name__} of xllamacpp {version}: {'; '.join(differing)}. llama.cpp has moved its fields "
            "or changed its defaults: install the version in constraints.txt, or follow llama.h in this file"
        )


# ---- models ------------------------------------------------------------------------------------------------------


class LlamaCpp:
    """A model in llama.cpp: float32 cache, no flash attention, CPU, one thread. A context manager.

    `settings`: further fields of the context's parameters.
    """

    def __init__(self, path: Path, context: int = 512, **settings: float) -> None:
        self._api = library()
        start = len(_log)
        model_params = self._api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = self._api.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}: {_complaints(start)}")
        params = self._api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = F32
        params.flash_attn_type = 0
        for name, value in settings.items():
            assert hasattr(params, name), name
            setattr(params, name, value)
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {path}: {_complaints(start)}")
        self._check_settings(context, "".join(text for _, text in _log[start:]))
        self.vocab_size: int = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))

    def _check_settings(self, context: int, said: str) -> None:
        """The proof that the parameters went where they were meant to go is what llama.cpp says of the result."""
        assert self._api.llama_n_ctx(self._context) == context
        assert self._api.llama_n_threads(self._context) == 1
        words = " ".join(said.split())
        for setting in ("flash_attn = disabled", "K (f32)", "V (f32)"):
            assert setting in words, f"llama.cpp does not confirm {setting!r}"

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits float32 [T, vocab] of every position of a prompt, in one batch."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return self._decode(tokens, 0)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens behind a prompt, one by one."""
        last, tokens = self.logits(prompt)[-1], []
        for position in range(len(prompt), len(prompt) + count):
            tokens.append(int(last.argmax()))
            last = self._decode(tokens[-1:], position)[-1]
        return tokens

    def _decode(self, tokens: Sequence[int], start: int) -> np.ndarray:
        batch = self._api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), start + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = True
        said = len(_log)
        status = self._api.llama_decode(self._context, batch)
        self._api.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode gives {status} for {len(tokens)} tokens at {start}: {_complaints(said)}")
        rows = [self._api.llama_get_logits_ith(self._context, i) for i in range(len(tokens))]
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows])

    def close(self) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class LlamaVocabulary:
    """The vocabulary of a model file in llama.cpp. A context manager."""

    def __init__(self, path: Path) -> None:
        self._api = library()
        start = len(_log)
        params = self._api.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._api.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}: {_complaints(start)}")
        self._vocabulary = self._api.llama_model_get_vocab(self._model)
        self.size: int = self._api.llama_vocab_n_tokens(self._vocabulary)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        raw = text.encode()
        room = len(raw) + 2  # BOS, EOS, and a token a byte
        ids = (C.c_int32 * room)()
        count = self._api.llama_tokenize(self._vocabulary, raw, len(raw), ids, room, add_special, parse_special)
        assert count >= 0, f"{-count} tokens, {room} were expected at most"
        return ids[:count]

    @property
    def eog_ids(self) -> set[int]:
        return {i for i in range(self.size) if self._api.llama_vocab_is_eog(self._vocabulary, i)}

    def __enter__(self) -> LlamaVocabulary:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._api.llama_model_free(self._model)


def _complaints(start: int) -> str:
    """The warnings and errors that llama.cpp has logged since."""
    return "".join(text for level, text in _log[start:] if level >= WARNING).strip()


# ---- samplers ----------------------------------------------------------------------------------------------------


def filtered(logits: np.ndarray, steps: Sequence[tuple[Any, ...]], history: Sequence[int] = ()) -> dict[int, float]:
    """What llama.cpp's samplers leave of a row: token -> logit.

    `steps`: ("penalties", window, repetition, frequency, presence), ("top_k", k), ("top_p", p), ("min_p", p) or
    ("temp", t), in the order they run; `history` is what the penalties have seen.
    """
    data = (TokenData * len(logits))(*((i, float(x), 0.0) for i, x in enumerate(logits)))
    row = TokenDataArray(data, len(logits), -1, False)
    for name, *arguments in steps:
        with _sampler(name, arguments, len(logits)) as sampler:
            for token in history:
                library().llama_sampler_accept(sampler, token)
            library().llama_sampler_apply(sampler, C.byref(row))
    return {row.data[i].id: row.data[i].logit for i in range(row.size)}


@contextmanager
def _sampler(name: str, arguments: list[Any], vocab_size: int) -> Iterator[int]:
    least = {"top_p": [1], "min_p": [1]}.get(name, [])  # how many tokens stay in any case
    first = [vocab_size] if name == "penalties" else []
    sampler = getattr(library(), f"llama_sampler_init_{name}")(*first, *arguments, *least)
    try:
        yield sampler
    finally:
        library().llama_sampler_free(sampler)
