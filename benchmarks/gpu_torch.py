"""The same model in PyTorch: transformers' LlamaForCausalLM in bf16 with random weights, eager and compiled.

The cache is static, as torch.compile needs it (`reduce-overhead`: CUDA graphs); eager gets the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from gpu_limits import Shape


class Peer:
    """A model on a device ("cuda", or "cpu" to try this file out)."""

    def __init__(self, shape: Shape, longest: int, device: str = "cuda") -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        self._torch, self._device, self._vocab = torch, torch.device(device), shape.vocab
        self._config = LlamaConfig(
            hidden_size=shape.dim,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            intermediate_size=shape.ffn,
            vocab_size=shape.vocab,
            max_position_embeddings=longest,
            tie_word_embeddings=False,
        )
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with self._device:
            self._model = LlamaForCausalLM(self._config).eval()
        torch.set_default_dtype(default)
        self._forward: Callable[..., Any] = self._model.forward

    def compile(self) -> None:
        """From here on steps of one token are compiled; prompts, whose shapes are seen once, stay eager."""
        self._forward = self._torch.compile(self._model.forward, mode="reduce-overhead")

    def decode(self, sequences: int, context: int, steps: int, passes: int) -> float:
        """Tokens a second of steps behind a context, with greedy choice; the median of the passes."""
        torch, longest, rates = self._torch, context + steps, []
        with torch.inference_mode():
            cache, ids = self._cache(longest), self._ids(sequences, context)
            positions = [torch.full((sequences, 1), at, device=self._device) for at in range(context, longest)]
            for i in range(passes + 1):  # the first compiles
                cache.reset()
                found = self._model.forward(input_ids=ids, past_key_values=cache, logits_to_keep=1)
                token = found.logits.argmax(-1)
                self._wait()
                start = time.perf_counter()
                for position in positions:
                    found = self._forward(input_ids=token, past_key_values=cache, position_ids=position)
                    token = found.logits.argmax(-1).clone()  # a replay overwrites what it gave before
                self._wait()
                rates += [sequences * steps / (time.perf_counter() - start)] if i else []
        return statistics.median(rates)

    def prefill(self, tokens: int, passes: int) -> float:
        """Tokens a second of a prompt, with the logits of its last token."""
        with self._torch.inference_mode():
            cache, ids, rates = self._cache(tokens), self._ids(1, tokens), []
            for i in range(passes + 1):
                cache.reset()
                self._wait()
                start = time.perf_counter()
                self._model.forward(input_ids=ids, past_key_values=cache, logits_to_keep=1)
                self._wait()
                rates += [tokens / (time.perf_counter() - start)] if i else []
        return statistics.median(rates)

    def _cache(self, longest: int) -> Any:
        from transformers import StaticCache

        return StaticCache(config=self._config, max_cache_len=longest)

    def _ids(self, sequences: int, tokens: int) -> Any:
        return self._torch.randint(0, self._vocab, (sequences, tokens), device=self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()
