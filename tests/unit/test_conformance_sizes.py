"""The conformance suite's real sizes find kernels that are right for small ones only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llorch.providers import hookimpl
from llorch.providers.conformance import test_real_sizes as sizes
from llorch.providers.conformance.rig import Rig
from llorch.providers.numpy_cpu import NumpyOps, NumpyProvider

GRID = 65_535  # blocks in a grid's second dimension
BUFFER = 262_144  # elements: 1024 blocks of 256


def limited(operation: str, limit: Callable[..., None]) -> Rig:
    """NumPy's operations but for one, in whose kernel's place `limit(kernel, spec, *args)` runs."""

    class Limited(NumpyOps):
        pass

    def factory(self: NumpyOps, spec: Any) -> Any:
        kernel = getattr(NumpyOps, operation)(self, spec)
        return lambda *args: limit(kernel, spec, *args)

    setattr(Limited, operation, hookimpl(factory))

    class Provider(NumpyProvider):
        def operations(self) -> Any:
            return Limited()

    return Rig(Provider(), Provider().open())


def narrow(kernel: Any, spec: Any, out: Any, *args: Any) -> None:
    """Zeros beyond 1024 of a dimension, as where one block reduces all of it."""
    kernel(out, *args)
    if max(getattr(spec, name, 0) for name in ("dim", "rows", "cols")) > 1024:
        out[...] = 0


def first_elements(kernel: Any, spec: Any, out: Any, *args: Any) -> None:
    kept = out.reshape(-1)[BUFFER:].copy()
    kernel(out, *args)
    out.reshape(-1)[BUFFER:] = kept


def first_rows(kernel: Any, spec: Any, out: Any, *args: Any) -> None:
    kept = out[:, GRID:].copy()
    kernel(out, *args)
    out[:, GRID:] = kept


def first_tokens(kernel: Any, spec: Any, out: Any, x: Any, *weights: Any) -> None:
    kernel(out[:600], x[:600], *weights)


def first_keys(kernel: Any, spec: Any, out: Any, q: Any, k: Any, v: Any, cache: Any, batch: Any) -> None:
    tables = batch.block_tables.copy()
    tables[:, 1100 // spec.block_size :] = 0
    kernel(out, q, k, v, cache, replace(batch, block_tables=tables))


def short_ids(kernel: Any, spec: Any, out: Any, tokens: Any, table: Any) -> None:
    kernel(out, tokens & 0xFFFF, table)


def first_logits(kernel: Any, spec: Any, values: Any, ids: Any, logits: Any) -> None:
    kernel(values, ids, logits[:, : 1 << 16])


def near_rows(kernel: Any, spec: Any, out: Any, x: Any, rows: Any) -> None:
    kernel(out, x, np.minimum(rows, 511))


def near_positions(kernel: Any, spec: Any, x: Any, positions: Any) -> None:
    kernel(x, positions & 0x7FFF)


WRONG = {
    "rmsnorm by one block": ("rmsnorm", narrow, sizes.test_rmsnorm_of_a_real_size, (1, sizes.DIM)),
    "matmul of few columns": ("matmul", narrow, sizes.test_matmul_of_a_real_size, ("Q4_K", 2, sizes.FFN)),
    "matmul of few rows": ("matmul", narrow, sizes.test_matmul_of_a_real_size, ("F32", sizes.FFN, 256)),
    "matmul of a small grid": ("matmul", first_rows, sizes.test_matmul_of_a_whole_vocabulary, ("Q8_0",)),
    "matmul of few tokens": ("matmul", first_tokens, sizes.test_matmul_of_a_long_prompt, ("Q4_0",)),
    "swiglu of few elements": ("swiglu", first_elements, sizes.test_add_and_swiglu_of_a_real_size, (33, sizes.FFN)),
    "add of few elements": ("add", first_elements, sizes.test_add_and_swiglu_of_a_real_size, (33, sizes.FFN)),
    "attention to few keys": ("attention", first_keys, sizes.test_attention_over_thousands_of_keys, ()),
    "embed of short ids": ("embed", short_ids, sizes.test_embed_of_a_whole_vocabulary, ("Q8_0",)),
    "topk of few logits": ("topk", first_logits, sizes.test_topk_of_a_whole_vocabulary, (1,)),
    "gather of few rows": ("gather", near_rows, sizes.test_gather_from_a_long_prompt, ()),
    "rope at near positions": ("rope", near_positions, sizes.test_rope_at_far_positions, ("half", 2, 32)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_kernel_for_small_sizes_is_found(case: str) -> None:
    operation, limit, test, arguments = WRONG[case]
    with pytest.raises(AssertionError, match=r"NMSE|did not write|not the largest"):
        test(limited(operation, limit), np.random.default_rng(7), *arguments)
    # and it is the limit that is found
    test(limited(operation, lambda kernel, _, *args: kernel(*args)), np.random.default_rng(7), *arguments)
