"""From a model graph to flat lists of (kernel, args).

A graph is written once, as calls on `Graph`; each call binds one site. A plan is that list with every buffer cut to the
T rows of a step: body plans are kept per number of tokens, head plans per number of output rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llorch.core.binder import Binder
from llorch.core.config import ModelConfig
from llorch.errors import BindError
from llorch.providers.device import Batch, CacheSpec, Device, Inputs, KVCache
from llorch.providers.spec import (
    AddRMSNormSpec,
    AddSpec,
    AttentionSpec,
    EmbedSpec,
    GateUpSwigluSpec,
    GatherSpec,
    Kernel,
    MatmulGroupSpec,
    MatmulSpec,
    OpSpec,
    Pairing,
    RMSNormSpec,
    RopePairSpec,
    RopeSpec,
    Step,
    Tensor,
    TopkSpec,
    operation_of,
)

PLANS_KEPT = 64  # a plan of a 32-layer model is about 300 tuples


@dataclass(frozen=True)
class BoundWeight:
    """A weight as the device holds it."""

    handle: Any
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Buffer:
    """Activations of the largest step; `rows` says which count cuts it: tokens, or output rows."""

    tensor: Tensor
    rows: str


@dataclass(frozen=True)
class CacheLayer:
    """Stands for a layer of the cache, which is allocated when all sites are bound."""

    layer: int


@dataclass(frozen=True)
class Site:
    kernel: Kernel
    args: tuple[Any, ...]
    spec: OpSpec


class Entry(NamedTuple):
    """A line of a plan: `kernel(*args)`, and the tensors it writes by label."""

    kernel: Kernel
    args: tuple[Any, ...]
    outputs: tuple[tuple[str, Tensor], ...]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes that are fixed when a model is bound."""

    max_tokens: int  # of one step
    max_sequences: int
    max_outputs: int  # rows of logits of one step
    max_context: int  # tokens of one sequence


@dataclass(frozen=True)
class Rotation:
    """How a model's heads are rotated."""

    pairing: Pairing
    frequencies: tuple[float, ...]
    magnitude: float = 1.0


class Graph:
    """What a model is written with: buffers, and one method per operation. Labels are GGUF tensor names."""

    def __init__(
        self,
        binder: Binder,
        weights: Mapping[str, BoundWeight],
        limits: Limits,
        cache_spec: CacheSpec,
        inputs: Inputs,
        batch: Batch,
    ) -> None:
        self._binder, self._weights, self._limits = binder, weights, limits
        self.provider = binder.provider
        self._cache_spec = cache_spec
        self.cache: KVCache  # set before the first plan: it takes the memory that binding leaves
        self.inputs, self.batch = inputs, batch
        self.body: list[Site] = []
        self.head: list[Site] = []
        self.topk: dict[int, tuple[Site, Buffer, Buffer]] = {}
        self._sites = self.body
        self.tokens = Buffer(inputs.device["tokens"], "tokens")
        self.positions = Buffer(inputs.device["positions"], "tokens")
        self.output_rows = Buffer(inputs.device["output_rows"], "outputs")
        self.logits: Buffer  # set by the model's `build`

    # ---- buffers and specs ----

    def buffer(self, width: int, dtype: str = "float32") -> Buffer:
        """Activations [rows, width]: rows of tokens, and of outputs once `gather` was called."""
        rows = "tokens" if self._sites is self.body else "outputs"
        return Buffer(self._binder.device.empty((self._max_rows, width), dtype), rows)

    @property
    def _max_rows(self) -> int:
        return self._limits.max_tokens if self._sites is self.body else self._limits.max_outputs

    def _site(self, label: str) -> dict[str, Any]:
        parts = label.split(".")
        layer = int(parts[1]) if parts[0] == "blk" else None
        return {"max_tokens": self._max_rows, "label": label, "layer": layer}

    def _add(self, operation: str, spec: OpSpec, *args: Any) -> None:
        self._sites.append(Site(self._binder.bind(operation, spec), args, spec))

    def _matmul_spec(self, label: str, weight: str | None = None) -> MatmulSpec:
        matrix = self._weights[f"{weight or label}.weight"]
        rows, cols = matrix.shape
        bias = f"{label}.bias" in self._weights
        return MatmulSpec(rows=rows, cols=cols, type=matrix.type, bias=bias, **self._site(label))

    def _rope_spec(self, label: str, heads: int, config: ModelConfig, rotation: Rotation) -> RopeSpec:
        return RopeSpec(
            heads=heads,
            head_dim=config.head_dim,
            pairing=rotation.pairing,
            frequencies=rotation.frequencies,
            magnitude=rotation.magnitude,
            **self._site(label),
        )

    def has(self, name: str) -> bool:
        """Whether the model file holds this tensor."""
        return name in self._weights

    def _weight(self, label: str) -> Any:
        return self._weights[f"{label}.weight"].handle

    def _bias(self, label: str) -> Any:
        bias = self._weights.get(f"{label}.bias")
        return None if bias is None else bias.handle

    # ---- operations ----

    def embed(self, out: Buffer, label: str) -> None:
        weight = self._weights[f"{label}.weight"]
        rows, cols = weight.shape
        spec = EmbedSpec(rows=rows, cols=cols, type=weight.type, **self._site(label))
        self._add("embed", spec, out, self.tokens, weight.handle)

    def rmsnorm(self, out: Buffer, x: Buffer, label: str, eps: float) -> None:
        dim = x.tensor.shape[1]
        self._add("rmsnorm", RMSNormSpec(dim=dim, eps=eps, **self._site(label)), out, x, self._weight(label))

    def add_rmsnorm(self, out: Buffer, x: Buffer, y: Buffer, add_label: str, norm_label: str, eps: float) -> None:
        """x += y, then out = rmsnorm(x)."""
        dim = x.tensor.shape[1]
        spec = AddRMSNormSpec(
            add=AddSpec(dim=dim, **self._site(add_label)),
            norm=RMSNormSpec(dim=dim, eps=eps, **self._site(norm_label)),
            **self._site(norm_label),
        )
        self._add("add_rmsnorm", spec, out, x, y, self._weight(norm_label))

    def add(self, x: Buffer, y: Buffer, label: str) -> None:
        """x += y."""
        self._add("add", AddSpec(dim=x.tensor.shape[1], **self._site(label)), x, x, y)

    def matmul(self, out: Buffer, x: Buffer, label: str, weight: str | None = None) -> None:
        """`weight` names the tensor where it is not the label's own (a tied output)."""
        spec = self._matmul_spec(label, weight or label)
        self._add("matmul", spec, out, x, self._weight(weight or label), self._bias(label))

    def matmul_group(self, outs: Sequence[Buffer], x: Buffer, labels: Sequence[str]) -> None:
        spec = MatmulGroupSpec(parts=tuple(self._matmul_spec(label) for label in labels), **self._site(labels[0]))
        weights, biases = [self._weight(label) for label in labels], [self._bias(label) for label in labels]
        self._add("matmul_group", spec, *outs, x, *weights, *biases)

    def rope_pair(self, q: Buffer, k: Buffer, prefix: str, config: ModelConfig, rotation: Rotation) -> None:
        spec = RopePairSpec(
            q=self._rope_spec(f"{prefix}q_rope", config.n_heads, config, rotation),
            k=self._rope_spec(f"{prefix}k_rope", config.n_kv_heads, config, rotation),
            **self._site(f"{prefix}q_rope"),
        )
        self._add("rope_pair", spec, q, k, self.positions)

    def attention(self, out: Buffer, q: Buffer, k: Buffer, v: Buffer, label: str, config: ModelConfig) -> None:
        site, cache = self._site(label), self._cache_spec
        spec = AttentionSpec(
            heads=config.n_heads,
            kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            scale=config.attention_scale,
            block_size=cache.block_size,
            max_blocks=self.batch.block_tables.shape[1],
            max_sequences=self._limits.max_sequences,
            cache_dtype=cache.dtype,
            # a window that no sequence outgrows is none: kernels without it are simpler
            window=config.window if config.window and config.window < self._limits.max_context else None,
            **site,
        )
        self._add("attention", spec, out, q, k, v, CacheLayer(site["layer"]), self.batch)

    def gate_up_swiglu(self, out: Buffer, x: Buffer, gate: str, up: str, label: str) -> None:
        spec = GateUpSwigluSpec(gate=self._matmul_spec(gate), up=self._matmul_spec(up), **self._site(label))
        weights, biases = (self._weight(gate), self._weight(up)), (self._bias(gate), self._bias(up))
        self._add("gate_up_swiglu", spec, out, x, *weights, *biases)

    def gather(self, x: Buffer, label: str) -> Buffer:
        """The rows whose logits are wanted. What follows is the head of the graph."""
        self._sites = self.head
        dim = x.tensor.shape[1]
        out = self.buffer(dim)
        self._add("gather", GatherSpec(dim=dim, **self._site(label)), out, x, self.output_rows)
        return out

    def candidates(self, logits: Buffer, k: int) -> None:
        """Binds a choice of the k largest, where the device offers it."""
        spec = TopkSpec(vocab=logits.tensor.shape[1], k=k, **self._site(f"top{k}"))
        kernel = self._binder.bind_if_offered("topk", spec)
        if kernel is not None:
            values, ids = self.buffer(k), self.buffer(k, "int32")
            self.topk[k] = (Site(kernel, (values, ids, logits), spec), values, ids)


class Plans:
    """The plans of a bound graph, least recently used dropped."""

    def __init__(self, device: Device, graph: Graph) -> None:
        self._device, self._graph = device, graph
        self._kept: OrderedDict[tuple[str, int, int], list[Entry]] = OrderedDict()

    def body(self, tokens: int) -> list[Entry]:
        """Steps from token ids to the residual stream of `tokens` tokens."""
        return self._plan(("body", tokens, 0), self._graph.body, tokens, 0)

    def head(self, outputs: int, k: int = 0) -> list[Entry]:
        """Steps from the residual stream to `outputs` rows of logits, and to their k largest where k > 0."""
        sites = [*self._graph.head, self._graph.topk[k][0]] if k else self._graph.head
        return self._plan(("head", outputs, k), sites, 0, outputs)

    def _plan(self, key: tuple[str, int, int], sites: Sequence[Site], tokens: int, outputs: int) -> list[Entry]:
        plan = self._kept.get(key)
        if plan is None:
            counts = {"tokens": tokens, "outputs": outputs}
            plan = self._fused([entry for site in sites for _, entry in self._entries(site, counts)])
            self._kept[key] = plan
            if len(self._kept) > PLANS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return plan

    def _fused(self, plan: list[Entry]) -> list[Entry]:
        """The plan as a device that can join neighbouring entries would run it."""
        fuse: Callable[[Sequence[Entry]], Sequence[Entry]] | None = getattr(self._device, "fuse", None)
        if fuse is None:
            return plan
        found, left = list(fuse(plan)), iter(plan)
        # each is looked for behind the one before it, so that their order counts
        if not all(any(entry.outputs is known.outputs for known in left) for entry in found):
            raise BindError(
                "the device's `fuse` gave entries in another order, or with outputs that are not the plan's"
            )
        return found

    def operations(self) -> dict[str, str]:
        """The operation that writes each label, in the order of a plan, every `topk` last."""
        sites = [*self._graph.body, *self._graph.head, *(site for site, _, _ in self._graph.topk.values())]
        written = (part for site in sites for part in self._entries(site, {"tokens": 1, "outputs": 1}))
        return {label: operation_of(spec) for spec, entry in written for label, _ in entry.outputs}

    def _entries(self, site: Site, counts: Mapping[str, int]) -> Iterator[tuple[OpSpec, Entry]]:
        # The body's buffers come uncut to the head's gather: it reads any row of them.
        def cut(arg: Any) -> Any:
            if isinstance(arg, CacheLayer):
                return self._graph.cache.layers[arg.layer]
            if not isinstance(arg, Buffer):
                return arg
            return self._device.rows(arg.tensor, counts[arg.rows]) if counts[arg.rows] else arg.tensor

        return _expand(Step(site.kernel, tuple(cut(arg) for arg in site.args), site.spec))


def expand(step: Step) -> Iterator[Entry]:
    """A step, or what its kernel puts in its place, all the way down."""
    return (entry for _, entry in _expand(step))


def _expand(step: Step) -> Iterator[tuple[OpSpec, Entry]]:
    """As `expand`, each entry with the spec of what it computes."""
    steps: Callable[..., Sequence[Step]] | None = getattr(step.kernel, "steps", None)
    if steps is None:
        yield step.spec, Entry(step.kernel, step.args, outputs_of(step.spec, step.args))
        return
    for part in steps(*step.args):
        if part.spec is step.spec:  # prebound: the site's own arguments say what it writes
            yield step.spec, Entry(part.kernel, part.args, outputs_of(step.spec, step.args))
        else:
            yield from _expand(part)


def outputs_of(spec: OpSpec, args: Sequence[Any]) -> tuple[tuple[str, Tensor], ...]:
    """What a step writes, by label."""
    return tuple((label, args[index]) for label, index in spec.outputs)
