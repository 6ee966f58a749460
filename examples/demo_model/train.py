"""Trains the demo model and writes its GGUF file.

    pip install 'llorch[demo]'
    python examples/demo_model/train.py --out llorch/demo/llorch-demo.gguf

The corpus is made while training by the grammar beside this file; nothing is read and nothing is downloaded. Seeded: the
same versions on the same machine with the same number of threads give the same file, also where training was interrupted
and went on from its checkpoint (`--resume`).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import sentencepiece
import torch
from corpus import PADDING, batch, train_vocabulary
from export import write_gguf
from model import Llama, Shape
from probe import copies
from torch.nn import functional

HELD_OUT = "held-out"  # a seed that no step has


def main() -> None:
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    shape = Shape()
    arguments.work.mkdir(parents=True, exist_ok=True)
    vocabulary_path = arguments.work / "vocabulary.model"
    if arguments.resume:  # with the pieces that it has learnt, whatever the grammar writes by now
        vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary_path))
    else:
        vocabulary = train_vocabulary(vocabulary_path, shape.vocab, arguments.seed)
    model = Llama(shape)
    optimizers = _optimizers(model, arguments.lr)
    step = tokens = 0
    checkpoint = arguments.work / "checkpoint.pt"
    if arguments.resume:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, tokens = saved["step"], saved["tokens"]
    _log(
        arguments,
        f"# {sum(p.numel() for p in model.parameters())} weights, torch {torch.__version__}, from step {step}, {arguments}",
    )
    started = time.monotonic()
    while step < arguments.steps:
        step += 1
        rate = _learning_rate(step, arguments)
        longest = _longest(step, arguments, shape)
        sums = _sums(step, arguments)
        seed = f"{arguments.seed}/{step}"
        parts = [torch.from_numpy(part) for part in batch(vocabulary, seed, arguments.tokens, longest, sums)]
        loss = _step(model, optimizers, parts, rate)
        tokens += sum(int((part != PADDING).sum()) for part in parts)
        if step % arguments.log_every == 0 or step == arguments.steps:
            held_out = evaluate(model, vocabulary)
            known, invented = copies(model, vocabulary)
            _log(arguments, f"{step} loss {loss:.4f} held-out {held_out:.4f} copied {known:.2f} invented {invented:.2f} "
                            f"lr {rate:.5f} {tokens} tokens {time.monotonic() - started:.0f} s")  # fmt: skip
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save({**state, "step": step, "tokens": tokens}, checkpoint)
            write_gguf(arguments.out, model, vocabulary_path, held_out, tokens)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("llorch-demo.gguf"), help="the GGUF file (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("demo-training"), help="vocabulary, log, checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--steps", type=int, default=2400, help="(%(default)s)")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[48, 128, 256], help="ids of a row at first (%(default)s)"
    )
    parser.add_argument(
        "--row-steps", type=int, nargs="+", default=[300, 600, 1000], help="until which step (%(default)s)"
    )
    parser.add_argument(
        "--decay-steps", type=int, default=600, help="steps in which the rate falls, at last (%(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="in a step (%(default)s)")
    parser.add_argument(
        "--sums", type=int, nargs=2, default=[48, 96], metavar=("MORE", "AT_LAST"),
        help="more sums in a step once rows are longer, and while the rate falls: they are facts, to be heard often (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--lr", type=float, default=6e-3, help="highest learning rate (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=100, help="steps between evaluations (%(default)s)")
    return parser.parse_args()


def _optimizers(model: Llama, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.blk.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": [model.token_embd.weight], "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98)),
    ]


def _learning_rate(step: int, arguments: argparse.Namespace, warmup: int = 50) -> float:
    """Linear warm-up, constant, then linear to nothing: how long it is constant may be decided while it trains."""
    return float(arguments.lr * min(step / warmup, (arguments.steps - step + 1) / arguments.decay_steps, 1.0))


def _longest(step: int, arguments: argparse.Namespace, shape: Shape) -> int:
    """Ids of a row. At first rows hold questions and the beginnings of stories: most of what can be learnt there is to copy."""
    stages = zip(arguments.rows, arguments.row_steps, strict=True)
    return next((length for length, until in stages if step <= until), shape.context)


def _sums(step: int, arguments: argparse.Namespace) -> int:
    """How many sums the step has besides its documents: the first rows, being short, have many as it is."""
    if step <= arguments.row_steps[0]:
        return 0
    return int(arguments.sums[step > arguments.steps - arguments.decay_steps])


def _step(model: Llama, optimizers: list[torch.optim.Optimizer], parts: list[torch.Tensor], rate: float) -> float:
    """One update. Returns the loss in nats a token."""
    targets = sum(int((part[:, 1:] != PADDING).sum()) for part in parts)
    total = 0.0
    for part in parts:
        loss = summed_loss(model, part) / targets
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def summed_loss(model: Llama, part: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the part's ids, in nats, padding left out. Products are in bfloat16, twice as fast where a CPU has it."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(part[:, :-1].clamp(min=0))
    return functional.cross_entropy(
        logits.float().flatten(0, 1), part[:, 1:].flatten(), ignore_index=PADDING, reduction="sum"
    )


@torch.no_grad()
def evaluate(model: Llama, vocabulary: sentencepiece.SentencePieceProcessor, tokens: int = 16384) -> float:
    """Mean cross-entropy (nats a token) on fresh documents."""
    parts = [torch.from_numpy(part) for part in batch(vocabulary, HELD_OUT, tokens, model.shape.context)]
    targets = sum(int((part[:, 1:] != PADDING).sum()) for part in parts)
    return sum(summed_loss(model, part).item() for part in parts) / targets


def _log(arguments: argparse.Namespace, line: str) -> None:
    print(line, flush=True)
    with (arguments.work / "train.log").open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
