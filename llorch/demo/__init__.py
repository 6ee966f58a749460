"""A small demonstration model, made by examples/demo_model: what is served where no model is named.

With it a clone alone proves the checkpoint table, too.
"""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "llorch-demo.gguf"
DEMO_NOTICE = (
    "no --model was given: this is llorch-demo, a demonstration of 3 million weights that tells small stories and "
    "knows nothing else; for real answers give a Llama-family GGUF file, --model PATH"
)
