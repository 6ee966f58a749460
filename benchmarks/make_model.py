"""Writes a Llama model with random weights, for measurements of speed and memory: the text it generates is noise.

    python benchmarks/make_model.py tinyllama Q4_0 tinyllama-Q4_0.gguf

`tinyllama` has the shape of TinyLlama 1.1B; `wide` is that of a wider model with fewer layers (heads of 128, a
feed-forward layer of 8192), which no kernel was tuned on; `tiny` shows in a second that a command works.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llorch.providers.conformance.models import TinyModel, write_model

SHAPES = {
    "tinyllama": {"dim": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "ffn": 5632, "context": 2048},
    "wide": {"dim": 3072, "layers": 10, "heads": 24, "kv_heads": 8, "ffn": 8192, "context": 8192},
    "tiny": {"dim": 256, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 512, "context": 2048},
}
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "F16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=TYPES, help="type of every matrix")
    parser.add_argument("out", type=Path, help="the GGUF file to write")
    arguments = parser.parse_args()
    write_model(TinyModel(type=arguments.type, vocab=32000, **SHAPES[arguments.shape]), arguments.out)


if __name__ == "__main__":
    main()
