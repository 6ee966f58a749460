"""What a Llama model has to move and compute on a GPU, and what that leaves as the best speed: pure arithmetic.

A decode step reads every weight of its products once and the cache of each sequence; a prompt computes two operations
a weight and token. Whichever of memory and arithmetic takes longer is the limit (the roofline model of Williams,
Waterman and Patterson, 2009). GB are 10^9 bytes; a multiplication and an addition are two operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf

KERNELS_A_LAYER, LAUNCH_SECONDS = 6, 2e-6  # of the budget that the targets were planned with
PLANNED_SHARE = 0.75  # of the bandwidth that products reach there
PLANNED_ATTENTION, PLANNED_REST = 0.2e-3, 0.2e-3  # seconds: attention at context 512; norm, logits, top-k and host


@dataclass(frozen=True)
class Shape:
    """A model's."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * (self.dim // self.heads)

    @property
    def matrices(self) -> dict[str, int]:
        """Weights of the products of one layer, by the label of the step that makes them."""
        return {
            "attn_q": self.dim * (self.dim + 2 * self.kv_dim),  # with k and v
            "attn_output": self.dim * self.dim,
            "ffn_swiglu": 2 * self.dim * self.ffn,  # gate and up
            "ffn_down": self.dim * self.ffn,
        }

    @property
    def layer_weights(self) -> int:
        return sum(self.matrices.values())

    @property
    def output_weights(self) -> int:
        return self.vocab * self.dim

    @property
    def product_weights(self) -> int:
        """Weights that a step multiplies with: all but the embedding, which is looked up."""
        return self.layers * self.layer_weights + self.output_weights


SHAPES = {
    "llama2-7b": Shape(4096, 32, 32, 32, 11008, 32000),
    "tinyllama": Shape(2048, 22, 32, 4, 5632, 32000),
    "tiny": Shape(256, 2, 4, 2, 512, 512),
}


@dataclass(frozen=True)
class Rates:
    """Measured on the card, in the same run."""

    copy_gb_s: float  # bytes read and written by copies within its memory
    tflop_s: float  # 8192 x 8192 x 8192 products of halves, or of what fits

    def seconds(self, nbytes: float, operations: float) -> float:
        """The least time for so much."""
        return max(nbytes / (self.copy_gb_s * 1e9), operations / (self.tflop_s * 1e12))


def weight_bytes(weights: int, kind: str) -> float:
    """Bytes of so many weights of a GGML type, or of bf16."""
    if kind == "bf16":
        return 2 * weights
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return weights * size / elements


def cache_bytes(shape: Shape, context: int) -> int:
    """Bytes of one sequence's keys and values, in halves, that one step reads."""
    return 2 * 2 * shape.layers * shape.kv_dim * context


def decode_work(shape: Shape, kind: str, context: int, sequences: int) -> tuple[float, float]:
    """(bytes, operations) of a step with one token a sequence."""
    nbytes = weight_bytes(shape.product_weights, kind) + sequences * cache_bytes(shape, context)
    attention = 4 * shape.layers * shape.dim * context
    return nbytes, sequences * (2 * shape.product_weights + attention)


def prefill_work(shape: Shape, kind: str, tokens: int) -> tuple[float, float]:
    """(bytes, operations) of a prompt from its start, with the logits of its last token."""
    pairs = tokens * (tokens + 1) // 2  # of a token and one that it sees
    operations = 2 * shape.layers * shape.layer_weights * tokens + 4 * shape.layers * shape.dim * pairs
    return weight_bytes(shape.product_weights, kind), operations + 2 * shape.output_weights


def decode_limit(shape: Shape, kind: str, context: int, sequences: int, rates: Rates) -> float:
    """Tokens a second."""
    return sequences / rates.seconds(*decode_work(shape, kind, context, sequences))


def prefill_limit(shape: Shape, kind: str, tokens: int, rates: Rates) -> float:
    """Tokens a second."""
    return tokens / rates.seconds(*prefill_work(shape, kind, tokens))


def step_limit(shape: Shape, label: str, kind: str, context: int, rates: Rates) -> float | None:
    """The least seconds of one step of a decode plan; None where all it moves are a token's activations."""
    if label == "attention":
        return rates.seconds(cache_bytes(shape, context) / shape.layers, 4 * shape.dim * context)
    weights = {**shape.matrices, "output": shape.output_weights}.get(label)
    return None if weights is None else rates.seconds(weight_bytes(weights, kind), 2 * weights)


def predicted(shape: Shape, kind: str, rates: Rates) -> dict[str, float]:
    """The planned seconds of a decode step at context 512, part by part."""
    moved = weight_bytes(shape.layers * shape.layer_weights, kind)
    return {
        "products": moved / (PLANNED_SHARE * rates.copy_gb_s * 1e9),
        "launches": KERNELS_A_LAYER * shape.layers * LAUNCH_SECONDS,
        "attention": PLANNED_ATTENTION,
        "the rest": PLANNED_REST,
    }


def part_of(label: str) -> str:
    """The part of the budget that a step of a decode plan counts in, by its label without its layer."""
    if label in ("attn_q", "attn_output", "ffn_swiglu", "ffn_down"):
        return "products"
    if label == "attention":
        return "attention"
    if label in ("token_embd", "output_rows", "output_norm", "output") or label.startswith("top"):
        return "the rest"
    return "launches"  # norms, additions, rotations: they move next to nothing
