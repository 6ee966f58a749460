"""The programs: which files of kernels/ make one, what it is cut by, and the kernels in it.

A program is CUDA C++ source for NVRTC that includes nothing, so that no CUDA headers are needed where it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PRODUCT_TOKENS = (1, 2, 4, 8)  # the most tokens of a product's variants
ATTEND_HEADS = (1, 2, 4)  # query heads that a block of decode attention takes

_FILES = {
    "rows": ("common.cuh", "rows.cu"),
    "rope": ("common.cuh", "rope.cu"),
    "topk": ("common.cuh", "topk.cu"),
    "attention": ("common.cuh", "paged.cuh", "attention.cu"),
    "prompt": ("common.cuh", "paged.cuh", "prompt.cu"),
    "products": ("common.cuh", "weights.cuh", "products.cu"),
}
_ROWS = ("rmsnorm", "round_rows", "add", "swiglu", "gather", "to_halves", "to_brains", "finish", "finish_gated")
_PRODUCTS = (
    *(f"{name}_{tokens}" for name in ("product", "gate_up") for tokens in PRODUCT_TOKENS),
    *("product_norm", "gate_up_round", "embed", "to_floats", "to_half_values"),
)
_KERNELS = {
    "rows": _ROWS,
    "rope": ("rope",),
    "topk": ("argmax", "topk_parts", "topk_merge"),
    "attention": ("append", *(f"attend_{heads}" for heads in ATTEND_HEADS), "combine", "attend_rows"),
    "prompt": ("attend_prompt",),
    "products": _PRODUCTS,
}


@dataclass(frozen=True)
class Program:
    """Files of kernels/ and the macros that they are compiled with. Equal programs are compiled once."""

    name: str
    macros: tuple[tuple[str, int], ...] = ()

    @property
    def kernels(self) -> tuple[str, ...]:
        return _KERNELS[self.name]

    @property
    def source(self) -> str:
        return _source(_FILES[self.name])

    @property
    def defines(self) -> tuple[str, ...]:
        """The macros as options of the compiler."""
        return tuple(f"-D{name}={value}" for name, value in self.macros)

    def __str__(self) -> str:
        return " ".join([self.name, *self.defines])


def program(name: str, macros: Mapping[str, int] | None = None) -> Program:
    return Program(name, tuple(sorted((macros or {}).items())))


def products(weight_type: str) -> Program:
    """What reads weights of a GGML type."""
    return program("products", {f"TYPE_{weight_type}": 1})


def attention(head_dim: int, cache_dtype: str) -> Program:
    return program("attention", {"HEAD_DIM": head_dim, "CACHE_HALF": int(cache_dtype == "f16")})


def prompt(head_dim: int) -> Program:
    """Attention on tensor cores, for compute capability 8.0 and up."""
    return program("prompt", {"HEAD_DIM": head_dim})


@functools.cache
def _source(files: tuple[str, ...]) -> str:
    folder = Path(__file__).with_name("kernels")
    return "\n".join(f'#line 1 "{name}"\n{(folder / name).read_text()}' for name in files)
