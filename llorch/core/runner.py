"""Runs steps of a bound model: fills the ragged batch, runs the plans, reads the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from llorch.core.plan import Entry, Graph, Limits, Plans
from llorch.errors import EngineError, KernelError, LlorchError
from llorch.providers.device import Batch, Device, Inputs
from llorch.providers.spec import Tensor

PASSED_ON = (LlorchError, MemoryError)  # of what a kernel raises: both say enough, and the engine acts on them


@dataclass
class Chunk:
    """Tokens of one sequence in one step."""

    tokens: Sequence[int]
    start: int  # position of the first
    blocks: Sequence[int]  # the sequence's block table, this chunk's tokens included
    outputs: int = 1  # how many of the last tokens' logits are wanted


def batch_shapes(limits: Limits, max_blocks: int) -> dict[str, tuple[int, ...]]:
    """The int32 inputs of a step."""
    return {
        "tokens": (limits.max_tokens,),
        "positions": (limits.max_tokens,),
        "slots": (limits.max_tokens,),
        "sequence_ids": (limits.max_tokens,),
        "block_tables": (limits.max_sequences, max_blocks),
        "query_starts": (limits.max_sequences + 1,),
        "context_lengths": (limits.max_sequences,),
        "output_rows": (limits.max_outputs,),
    }


def make_batch(inputs: Inputs) -> Batch:
    device = inputs.device
    return Batch(
        positions=device["positions"],
        slots=device["slots"],
        sequence_ids=device["sequence_ids"],
        block_tables=device["block_tables"],
        query_starts=device["query_starts"],
        context_lengths=device["context_lengths"],
    )


def kernel_error(provider: str, site: str, error: Exception) -> KernelError:
    """`site`: the operation and where it stands."""
    return KernelError(f"provider {provider}: its kernel for {site} raised {type(error).__name__}: {error}")


class Runner:
    """One engine thread at a time calls it: all of a device's work goes through here."""

    def __init__(
        self, device: Device, graph: Graph, logits: npt.NDArray[np.float32], limits: Limits, block_size: int
    ) -> None:
        self._device, self._graph, self._limits, self._block_size = device, graph, limits, block_size
        self._plans = Plans(device, graph)
        self._logits = logits  # host memory [max_outputs, vocab]
        self._candidates = {
            k: (np.empty((limits.max_outputs, k), np.float32), np.empty((limits.max_outputs, k), np.int32))
            for k in graph.topk
        }
        self._captured: dict[tuple[int, int, int], Callable[[], None] | None] = {}
        self._sizes = sorted({s for s in device.capture_sizes if s < limits.max_sequences} | {limits.max_sequences})

    @property
    def candidate_sizes(self) -> list[int]:
        """The k for which the device chooses the k largest logits itself."""
        return sorted(self._candidates)

    def logits(self, chunks: Sequence[Chunk]) -> npt.NDArray[np.float32]:
        """Runs a step; logits [outputs, vocab] of the wanted rows in the chunks' order, valid until the next step."""
        rows = self._run(chunks, 0)
        found = self._logits[:rows]
        if rows:
            self._device.read(self._device.rows(self._graph.logits.tensor, rows), found)
        return found

    def candidates(self, chunks: Sequence[Chunk], k: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Runs a step; the k largest logits of each wanted row, and their ids."""
        rows = self._run(chunks, k)
        _, values, ids = self._graph.topk[k]
        all_values, all_ids = self._candidates[k]
        host_values, host_ids = all_values[:rows], all_ids[:rows]
        self._device.read(self._device.rows(values.tensor, rows), host_values)
        self._device.read(self._device.rows(ids.tensor, rows), host_ids)
        return host_values, host_ids

    def entries(self, chunks: Sequence[Chunk]) -> list[Entry]:
        """Fills the batch and returns the step's plan, for callers that look between its lines."""
        tokens, outputs = self._fill(chunks)
        return self._plans.body(tokens) + (self._plans.head(outputs) if outputs else [])

    def _run(self, chunks: Sequence[Chunk], k: int) -> int:
        tokens, outputs = self._fill(chunks)
        if self._device.capture_sizes and tokens == outputs == len(chunks) and self._replay(tokens, k):
            return outputs
        self.run(self._plans.body(tokens))
        if outputs:
            self.run(self._plans.head(outputs, k))
        return outputs

    def run(self, entries: Sequence[Entry]) -> None:
        """Runs lines of a plan. Raises KernelError, which says which one raised something else than llorch's errors."""
        outputs: tuple[tuple[str, Tensor], ...] = ()
        try:
            for kernel, args, outputs in entries:  # noqa: B007  read where a kernel has raised
                kernel(*args)
        except PASSED_ON:
            raise
        except Exception as error:
            label = outputs[0][0]
            site = f"{self._plans.operations()[label]} at {label}"
            raise kernel_error(self._graph.provider, site, error) from error

    def labels(self) -> dict[str, str]:
        """The label of every value that a step writes on its way to the logits, and the operation that writes it.

        Without those of entries that the device has joined with others.
        """
        written = {label for entry in self._plans.body(1) + self._plans.head(1) for label, _ in entry.outputs}
        return {label: name for label, name in self._plans.operations().items() if label in written}

    # ---- the batch ----

    def _fill(self, chunks: Sequence[Chunk]) -> tuple[int, int]:
        """Writes the chunks into the batch and uploads it; returns the numbers of tokens and of wanted rows."""
        self._check(chunks)
        host, batch = self._graph.inputs.host, self._graph.batch
        token, outputs, longest, context = 0, 0, 0, 0
        for s, chunk in enumerate(chunks):
            n = len(chunk.tokens)
            here, end = slice(token, token + n), chunk.start + n
            positions = np.arange(chunk.start, end, dtype=np.int32)
            table = host["block_tables"][s]
            table[: len(chunk.blocks)] = chunk.blocks
            host["tokens"][here] = chunk.tokens
            host["positions"][here] = positions
            host["slots"][here] = table[positions // self._block_size] * self._block_size + positions % self._block_size
            host["sequence_ids"][here] = s
            host["query_starts"][s] = token
            host["context_lengths"][s] = end
            host["output_rows"][outputs : outputs + chunk.outputs] = np.arange(token + n - chunk.outputs, token + n)
            token, outputs = token + n, outputs + chunk.outputs
            longest, context = max(longest, n), max(context, end)
        host["query_starts"][len(chunks)] = token
        batch.tokens, batch.sequences, batch.max_query, batch.max_context = token, len(chunks), longest, context
        self._pad(token, outputs)
        self._graph.inputs.upload()
        return token, outputs

    def _check(self, chunks: Sequence[Chunk]) -> None:
        tokens, outputs = sum(len(chunk.tokens) for chunk in chunks), sum(chunk.outputs for chunk in chunks)
        limits = self._limits
        if tokens > limits.max_tokens or outputs > limits.max_outputs or len(chunks) > limits.max_sequences:
            raise EngineError(
                f"a step of {len(chunks)} sequences, {tokens} tokens and {outputs} outputs is beyond {limits}"
            )

    def _pad(self, tokens: int, outputs: int) -> None:
        """Makes what lies behind the batch harmless, for a replay that is wider than it."""
        if not self._device.capture_sizes:
            return
        host, sequences = self._graph.inputs.host, self._graph.batch.sequences
        host["tokens"][tokens:] = 0
        host["positions"][tokens:] = 0
        host["slots"][tokens:] = 0  # block 0 belongs to nobody
        host["sequence_ids"][tokens:] = -1
        host["query_starts"][sequences + 1 :] = tokens
        host["context_lengths"][sequences:] = 0
        host["output_rows"][outputs:] = 0

    # ---- capture ----

    def _replay(self, tokens: int, k: int) -> bool:
        """Runs a decode step as a captured one, of the next size up. False: the device cannot capture it."""
        batch = self._graph.batch
        size = next(size for size in self._sizes if size >= tokens)
        # a context bound per power of two: the captured host ints must hold for every step that is replayed
        context = min(1 << (batch.max_context - 1).bit_length(), self._limits.max_context)
        key = (size, context, k)
        if key in self._captured and self._captured[key] is None:
            return False
        batch.tokens, batch.sequences, batch.max_query, batch.max_context = size, size, 1, context
        if key not in self._captured:
            run = partial(self.run, self._plans.body(size) + self._plans.head(size, k))
            run()  # a capture may record without running, and what is compiled on first use must not be in it
            self._captured[key] = self._device.capture(run)
        elif (replay := self._captured[key]) is not None:
            replay()
        return True
