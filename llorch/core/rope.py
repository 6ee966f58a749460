"""RoPE beyond a model's first context: frequencies and magnitude of each kind of scaling, from GGUF metadata.

Position interpolation: Chen et al., "Extending Context Window of Large Language Models" (2023). YaRN: Peng et al.,
"YaRN: Efficient Context Window Extension" (2023), sections 3.2 to 3.4. LongRoPE: Ding et al. (2024), section 3.2.
Where the papers leave a choice, ggml's `rope_yarn` and llama.cpp's context set-up decide: the files are made for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

ScalingKind = Literal["none", "linear", "yarn", "longrope"]
KINDS: tuple[ScalingKind, ...] = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """In brackets the GGUF key behind `<architecture>.rope.scaling.`."""

    kind: ScalingKind = "none"  # type
    factor: float = 1.0  # factor: how many times the original context
    original_context: int  # original_context_length
    attention_factor: float = 1.0  # attn_factor: the magnitude's own factor
    beta_fast: float = 32.0  # yarn_beta_fast: pairs that turn more often than this over the original context stay
    beta_slow: float = 1.0  # yarn_beta_slow: pairs that turn less often are interpolated
    extrapolation: float = 1.0  # yarn_ext_factor: how much of YaRN's ramp applies

    def frequencies(self, dim: int, base: float, factors: npt.NDArray[np.float32] | None = None) -> tuple[float, ...]:
        """Radians per position of each of `dim` / 2 pairs: base^(-2i/dim) / factor_i (RoFormer, section 3.2.2), scaled.

        `factors` [dim / 2]: `rope_freqs.weight` of Llama 3, or LongRoPE's.
        """
        plain = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
        if factors is not None:
            plain = plain / factors.astype(np.float64)
        interpolated = plain / (1.0 if self.kind == "none" else self.factor)
        if self.kind == "yarn":
            kept = self.extrapolation * self._ramp(dim, base)
            interpolated = interpolated * (1 - kept) + plain * kept
        return tuple(float(f) for f in interpolated)

    def _ramp(self, dim: int, base: float) -> npt.NDArray[np.float64]:
        """1 for pairs that keep their frequency, 0 for those that are interpolated, [dim / 2] (YaRN, section 3.2)."""
        low = max(0.0, math.floor(self._pair_of(self.beta_fast, dim, base)))
        high = min(dim - 1.0, math.ceil(self._pair_of(self.beta_slow, dim, base)))
        ramp = (np.arange(dim // 2, dtype=np.float64) - low) / max(0.001, high - low)
        return 1.0 - np.clip(ramp, 0.0, 1.0)

    def _pair_of(self, rotations: float, dim: int, base: float) -> float:
        """The (fractional) pair that turns this often over the original context."""
        return dim * math.log(self.original_context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    @property
    def magnitude(self) -> float:
        """What rotated queries and keys are multiplied by: YaRN's 0.1 ln(factor) + 1 (section 3.4), LongRoPE's own."""
        if self.kind != "yarn" or self.extrapolation == 0:
            return self.attention_factor
        return self.attention_factor * (0.1 * math.log(max(self.factor, 1.0)) + 1.0)

    def factors(self, host: Mapping[str, npt.NDArray[np.float32]], context: int) -> npt.NDArray[np.float32] | None:
        """The tensor of the file that divides the frequencies in a context of this length, if any.

        As in llama.cpp the context that is served decides between LongRoPE's two, not the length of one prompt:
        keys that are in the cache cannot be turned again.
        """
        if self.kind != "longrope":
            return host.get("rope_freqs.weight")
        return host["rope_factors_long.weight" if context > self.original_context else "rope_factors_short.weight"]
