"""What a model file says of the tensors that its graph reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llorch.providers.spec import Use


@dataclass(frozen=True)
class WeightSpec:
    """A tensor by GGUF name. `tied` names the tensor that stands in where it is absent; "host" stays on the host."""

    name: str
    shape: tuple[int, ...]  # (rows, cols) or (dim,)
    use: Use | Literal["host"]
    tied: str | None = None
    optional: bool = False
