"""Trains the demo model and writes its GGUF file.

    pip install 'llorch[demo]'
    python examples/demo_model/train.py --out llorch/demo/llorch-demo.gguf

The corpus is made while training by the grammar beside this file; nothing is read and nothing is downloaded. Seeded: the
same versions on the same machine with the same number of threads give the same file.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from corpus import batches, train_vocabulary
from export import write_gguf
from model import Llama, Shape
from torch.nn import functional

HELD_OUT_SEED = 10_000_019  # the grammar's texts that no step has trained on


def main() -> None:
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    shape = Shape()
    arguments.work.mkdir(parents=True, exist_ok=True)
    vocabulary_path = arguments.work / "vocabulary.model"
    vocabulary = train_vocabulary(vocabulary_path, shape.vocab, arguments.seed)
    model = Llama(shape)
    _log(arguments, f"# {sum(p.numel() for p in model.parameters())} weights, torch {torch.__version__}, {arguments}")
    optimizer = torch.optim.AdamW(_groups(model), lr=arguments.lr, betas=(0.9, 0.98))
    stream = batches(vocabulary, arguments.seed, arguments.rows, shape.context)
    started = time.monotonic()
    for step in range(1, arguments.steps + 1):
        rate = _learning_rate(step, arguments.steps, arguments.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _loss(model, torch.from_numpy(next(stream)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % arguments.log_every == 0 or step == arguments.steps:
            held_out = evaluate(model, vocabulary, arguments.rows)
            seconds = time.monotonic() - started
            _log(arguments, f"{step} loss {loss.item():.4f} held-out {held_out:.4f} lr {rate:.5f} {seconds:.0f} s")
            torch.save({"model": model.state_dict(), "step": step}, arguments.work / "checkpoint.pt")
            write_gguf(arguments.out, model, vocabulary_path, held_out, step * arguments.rows * shape.context)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("llorch-demo.gguf"), help="the GGUF file (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("demo-training"), help="vocabulary, log, checkpoint")
    parser.add_argument("--steps", type=int, default=2400, help="of 8,192 tokens each (%(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="sequences of 1,024 tokens in a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=100, help="steps between evaluations (%(default)s)")
    return parser.parse_args()


def _groups(model: Llama) -> list[dict[str, object]]:
    """Weight decay for matrices, none for norms."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [
        {"params": matrices, "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]


def _learning_rate(step: int, steps: int, highest: float, warmup: int = 60) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    if step < warmup:
        return highest * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return highest * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def _loss(model: Llama, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Llama, vocabulary: object, rows: int) -> float:
    """Mean cross-entropy (nats a token) on fresh documents."""
    stream = batches(vocabulary, HELD_OUT_SEED, rows, model.shape.context)  # type: ignore[arg-type]
    return _loss(model, torch.from_numpy(next(stream))).item()


def _log(arguments: argparse.Namespace, line: str) -> None:
    print(line, flush=True)
    with (arguments.work / "train.log").open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
