"""The demonstration model that is served where no other is named. Made by examples/demo_model."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "llorch-demo.gguf"
