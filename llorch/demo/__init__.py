"""A small demonstration model, made by examples/demo_model. With it a clone alone proves the checkpoint table."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "llorch-demo.gguf"
