"""Draws the pictures of docs/benchmarks.md.

python benchmarks/plot.py comparison results/*.json --out docs/benchmarks.svg       from vs_llamacpp.py --json
python benchmarks/plot.py roofline ops.jsonl --out docs/roofline.svg                from llorch bench --ops --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")  # a file, no window
from matplotlib import pyplot

GREY, BLUE, RED = "#888888", "#2a6fb0", "#b03030"
WIDTH = 0.38  # of a bar; two stand side by side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=["comparison", "roofline"])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pyplot.rcParams["svg.hashsalt"] = "llorch"  # the same figures make the same file
    draw = {"comparison": _comparison, "roofline": _roofline}[arguments.picture]
    draw([path.read_text() for path in arguments.results])
    pyplot.savefig(arguments.out, metadata={"Date": None})


def _comparison(texts: list[str]) -> None:
    """A row of panels for each shape of model, prefill and decode; models are named SHAPE-TYPE.gguf."""
    shapes: dict[str, list[dict[str, Any]]] = {}
    for result in map(json.loads, texts):
        shapes.setdefault(result["model"].partition("-")[0], []).append(result)
    size = {"figsize": (10, 3.4 * len(shapes)), "layout": "constrained", "squeeze": False}
    _, panels = pyplot.subplots(len(shapes), 2, **size)
    for row, (shape, results) in zip(panels, shapes.items(), strict=True):
        for panel, what in zip(row, ("pp", "tg"), strict=True):
            _bars(panel, results, what)
            panel.set(title=f"{shape}: {'prefill' if what == 'pp' else 'decode'}", ylabel="tokens/s")


def _bars(panel: Any, results: list[dict[str, Any]], what: str) -> None:
    for place, result in enumerate(results):
        rows = [row for row in result["rows"] if row["test"].startswith(what)]
        for i, row in enumerate(rows):
            value, at = row["tokens_per_second"], place + (i - 0.5) * WIDTH
            spread = [[value - row["low"]], [row["high"] - value]]
            label = row["engine"] if place == 0 else None
            panel.bar(at, value, WIDTH, yerr=spread, capsize=3, color=(GREY, BLUE)[i], label=label)
        if what == "tg":
            label = "memory bandwidth" if place == 0 else None
            panel.hlines(result["limit_tokens_per_second"], place - WIDTH, place + WIDTH, RED, "dashed", label=label)
    names = [result["model"].partition("-")[2].removesuffix(".gguf") for result in results]
    panel.set_xticks(range(len(names)), names)
    panel.legend()


def _roofline(texts: list[str]) -> None:
    """Operations a second over operations a byte (Williams, Waterman and Patterson, 2009), of the products."""
    timings = [json.loads(line) for text in texts for line in text.splitlines()]
    products = [t for t in timings if t["operation"] in ("matmul", "matmul_group", "gate_up_swiglu") and t["flops"]]
    bandwidth = products[0]["bandwidth_gb_s"]
    _, panel = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colours = dict(
        zip(dict.fromkeys(t["weight_type"] for t in products), pyplot.colormaps["tab10"].colors, strict=False)
    )
    for t in products:
        marker = "o" if t["phase"] == "decode" else "^"
        panel.plot(t["flops"] / t["bytes"], t["gflop_s"], marker, color=colours[t["weight_type"]], alpha=0.8)
    for kind, colour in colours.items():
        panel.plot([], [], "s", color=colour, label=kind)
    panel.plot([], [], "ko", label="decode, 1 token")
    panel.plot([], [], "k^", label=f"prefill, {max(t['tokens'] for t in products)} tokens")
    most = max(t["gflop_s"] for t in products)
    reach = [min(t["flops"] / t["bytes"] for t in products) / 2, 1.5 * max(t["flops"] / t["bytes"] for t in products)]
    ridge = most / bandwidth
    panel.plot([reach[0], ridge], [reach[0] * bandwidth, most], color=RED, label=f"memory, {bandwidth:.0f} GB/s")
    panel.plot([ridge, reach[1]], [most, most], color=RED, linestyle="dotted", label=f"best product, {most:.0f} Gop/s")
    panel.axhline(products[0]["float_gflop_s"], color=GREY, linestyle="dashed", label="float32 products")
    panel.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="Gop/s", title="products of numba-cpu")
    panel.legend(loc="lower right", fontsize="small")


if __name__ == "__main__":
    main()
