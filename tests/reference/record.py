"""Records what llama.cpp computes for a prompt: every intermediate of some layers, logits, greedy tokens.

    python -m tests.reference.record MODEL.gguf tests/reference/NAME.npz --prompt "Once upon a time" --layers 0,1,3

The model is dequantised to float32 first, so that llama.cpp does not round activations. The file holds, under
llama.cpp's own names and in NumPy's axis order, `node:attn_norm-0` and so on; a name that the graph uses twice has the
operation behind it the second time (`node:Qcur-0/ROPE`). Then `tokens`, `logits` [tokens, vocabulary] and `greedy`.
"""

from __future__ import annotations

import argparse
import ctypes as C
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import llorch
from tests.gguf_copy import rewrite
from tests.parity.llamacpp import LlamaCpp, library

DTYPES = {0: np.float32, 1: np.float16, 26: np.int32}  # ggml_type
MOVES = ("VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE", "CONT", "CPY")  # they compute nothing
# what CHECKPOINTS' rows compare; a file of all nodes would be several times as large
KEPT = ("attn_norm", "ffn_norm", "Qcur", "Kcur", "Vcur", "kq_soft_max", "attn_out", "ffn_swiglu", "ffn_out", "l_out")


class Tensor(C.Structure):
    """ggml_tensor as far as it is read here."""

    _fields_ = [
        ("type", C.c_int),
        ("buffer", C.c_void_p),
        ("ne", C.c_int64 * 4),
        ("nb", C.c_size_t * 4),
        ("op", C.c_int),
        ("op_params", C.c_int32 * 16),
        ("flags", C.c_int32),
        ("src", C.c_void_p * 10),
        ("view_src", C.c_void_p),
        ("view_offs", C.c_size_t),
        ("data", C.c_void_p),
        ("name", C.c_char * 64),
    ]

    def values(self) -> np.ndarray:
        """A copy, from whatever strides; the shape is `ne` from the last to the first, without ones."""
        dtype = np.dtype(DTYPES[self.type])
        shape, strides = tuple(self.ne[::-1]), tuple(self.nb[::-1])
        span = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + dtype.itemsize
        raw = np.frombuffer((C.c_char * span).from_address(self.data), np.uint8)
        view = np.lib.stride_tricks.as_strided(raw[: dtype.itemsize].view(dtype), shape, strides)
        return np.array(view).reshape([n for n in shape if n != 1] or [1])


class Recorder:
    """Called by llama.cpp for every node of its graph."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.nodes: dict[str, np.ndarray] = {}
        self.enabled = True
        self._layers = layers
        self._op_name = library().ggml_op_name
        self._op_name.restype, self._op_name.argtypes = C.c_char_p, [C.c_int]
        self.callback = C.CFUNCTYPE(C.c_bool, C.POINTER(Tensor), C.c_bool, C.c_void_p)(self._on_node)

    def _on_node(self, pointer: C._Pointer[Tensor], ask: bool, _user_data: object) -> bool:
        tensor = pointer.contents
        name = tensor.name.decode()
        if ask:
            return self.enabled and self._wanted(name)
        operation = self._op_name(tensor.op).decode()
        if tensor.type in DTYPES and tensor.data and operation not in MOVES:
            self.nodes[name if name not in self.nodes else f"{name}/{operation}"] = tensor.values()
        return True

    def _wanted(self, name: str) -> bool:
        kind, _, layer = name.split(" ")[0].rpartition("-")
        return kind in KEPT and layer in self._layers


def record(model: Path, prompt: str, layers: Sequence[str], greedy: int) -> dict[str, np.ndarray]:
    """The arrays of the file."""
    tokens = llorch.Tokenizer.from_gguf(model).encode(prompt)
    recorder = Recorder(layers)
    with tempfile.TemporaryDirectory() as folder:
        twin = rewrite(model, Path(folder) / "f32.gguf", dequantise=True)
        callback = C.cast(recorder.callback, C.c_void_p).value
        with LlamaCpp(twin, cb_eval=callback) as llm:
            logits = llm.logits(tokens)
            recorder.enabled = False
            chosen = llm.greedy(tokens, greedy)
    arrays = {f"node:{name}": values for name, values in recorder.nodes.items()}
    return {"tokens": np.array(tokens, np.int32), "logits": logits, "greedy": np.array(chosen, np.int32), **arrays}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--layers", default="0,1", help="layers whose nodes are kept (%(default)s)")
    parser.add_argument("--greedy", type=int, default=64, help="greedy tokens to record (%(default)s)")
    arguments = parser.parse_args()
    arrays = record(arguments.model, arguments.prompt, arguments.layers.split(","), arguments.greedy)
    np.savez_compressed(arguments.out, **arrays)  # type: ignore[arg-type]
    for name, values in arrays.items():
        print(f"{name:28} {values.shape}")


if __name__ == "__main__":
    main()
