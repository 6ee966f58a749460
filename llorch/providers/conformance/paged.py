"""Sequences that grow step by step, in a device's paged cache and, beside it, on the host for the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llorch.providers.conformance import oracle
from llorch.providers.conformance.rig import Rig
from llorch.providers.device import Batch, CacheSpec
from llorch.providers.spec import AttentionSpec

Float = npt.NDArray[np.float32]


class PagedSequences:
    """`tables[s]` is the block table of sequence s."""

    def __init__(self, rig: Rig, spec: AttentionSpec, rng: np.random.Generator, tables: list[list[int]]) -> None:
        self.rig, self.spec, self.rng, self.tables = rig, spec, rng, tables
        self.cache = rig.device.kv_cache(
            CacheSpec(
                layers=2,
                kv_heads=spec.kv_heads,
                head_dim=spec.head_dim,
                block_size=spec.block_size,
                blocks=max(max(table) for table in tables) + 1,
                dtype=spec.cache_dtype,
            )
        )
        self._layer = 1  # the second of two: a provider that ignores the layer is found
        self._kernel = rig.bind("attention", spec)
        self._width = spec.kv_heads * spec.head_dim
        self.keys: list[Float] = [self._none() for _ in tables]
        self.values: list[Float] = [self._none() for _ in tables]
        self._inputs = rig.device.inputs(
            {
                "slots": (spec.max_tokens,),
                "positions": (spec.max_tokens,),
                "sequence_ids": (spec.max_tokens,),
                "block_tables": (spec.max_sequences, spec.max_blocks),
                "query_starts": (spec.max_sequences + 1,),
                "context_lengths": (spec.max_sequences,),
            }
        )

    def _none(self) -> Float:
        return np.empty((0, self._width), np.float32)

    def replace(self, s: int, table: list[int]) -> None:
        """A new, empty sequence in the place of s."""
        self.tables[s] = table
        self.keys[s] = self.values[s] = self._none()

    def truncate(self, s: int, length: int) -> None:
        self.keys[s], self.values[s] = self.keys[s][:length], self.values[s][:length]

    def copy(self, source: int, target: int) -> None:
        """Makes `target` the same sequence as `source`, in blocks of its own."""
        for src, dst in zip(self.tables[source], self.tables[target], strict=True):
            self.cache.copy(src, dst)
        self.keys[target], self.values[target] = self.keys[source], self.values[source]

    def step(self, counts: dict[int, int], padded: int = 0) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
        """Adds counts[s] tokens to each sequence s, in one batch; what the kernel gave, and what the oracle says.

        `padded` rows are added behind the batch, with host ints as upper bounds, as in a captured step.
        """
        found, queries = self._run(counts, padded)
        expected = []
        for s, q in queries.items():
            exact_q, exact_k, exact_v = (a.astype(np.float64) for a in (q, self.keys[s], self.values[s]))
            expected.append(oracle.attention(exact_q, exact_k, exact_v, len(exact_k) - len(exact_q), self.spec))
        return found, np.concatenate(expected)

    def grow(self, counts: dict[int, int]) -> None:
        """A step whose result nobody looks at: the oracle would take long for a whole prompt."""
        self._run(counts, 0)

    def _run(self, counts: dict[int, int], padded: int) -> tuple[npt.NDArray[Any], dict[int, Float]]:
        """What the kernel gave, and the queries of each sequence."""
        spec, tokens = self.spec, sum(counts.values())
        # row by row: a token's q, k and v do not depend on how many come after it
        drawn = self._normal(tokens + padded, spec.heads * spec.head_dim + 2 * self._width)
        q, k, v = np.split(drawn, [spec.heads * spec.head_dim, spec.heads * spec.head_dim + self._width], axis=1)
        queries, at = {}, 0
        for s, count in counts.items():
            here = slice(at, at + count)
            queries[s] = q[here]
            self.keys[s] = np.concatenate([self.keys[s], k[here]])
            self.values[s] = np.concatenate([self.values[s], v[here]])
            at += count
        out, (device_q, device_k, device_v) = self.rig.output(*q.shape), map(self.rig.input, (q, k, v))
        layer, batch = self.cache.layers[self._layer], self._batch(counts, padded)
        (found,) = self.rig.call(
            self._kernel, spec, padded, out=out, q=device_q, k=device_k, v=device_v, cache=layer, batch=batch
        )
        return found[:tokens], queries

    def _normal(self, rows: int, width: int) -> Float:
        return self.rng.standard_normal((rows, width), dtype=np.float32)

    def _batch(self, counts: dict[int, int], padded: int) -> Batch:
        host, size = self._inputs.host, self.spec.block_size
        tokens, sequences = sum(counts.values()), len(counts)
        for array in host.values():
            array[...] = 0
        host["sequence_ids"][...] = -1
        at = 0
        for row, (s, count) in enumerate(counts.items()):
            positions = np.arange(len(self.keys[s]) - count, len(self.keys[s]))
            table = np.array(self.tables[s])
            here = slice(at, at + count)
            host["positions"][here], host["sequence_ids"][here] = positions, row
            host["slots"][here] = table[positions // size] * size + positions % size
            host["block_tables"][row, : len(table)] = table
            host["context_lengths"][row] = len(self.keys[s])
            at += count
            host["query_starts"][row + 1 :] = at
        self._inputs.upload()
        device = self._inputs.device
        most = max(counts.values()), max(len(self.keys[s]) for s in counts)
        return Batch(
            positions=device["positions"], slots=device["slots"], sequence_ids=device["sequence_ids"],
            block_tables=device["block_tables"], query_starts=device["query_starts"],
            context_lengths=device["context_lengths"], tokens=tokens + padded,
            sequences=min(sequences + (padded and 2), self.spec.max_sequences), max_query=most[0],
            max_context=most[1] + 16 * bool(padded),
        )  # fmt: skip
