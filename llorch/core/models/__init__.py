"""Architecture families: one file each, that reads top to bottom like the paper."""

from __future__ import annotations

# GGUF's general.architecture -> the module that has its `weights` and `build`
ARCHITECTURES = {"llama": "llorch.core.models.llama"}
