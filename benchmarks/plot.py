"""Draws the pictures of docs/benchmarks.md from what `vs_llamacpp.py --json` has written, a file a model.

python benchmarks/plot.py comparison results/*.json --out docs/benchmarks.svg
python benchmarks/plot.py roofline results/*.json --out docs/roofline.svg
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import gguf
import matplotlib
from vs_llamacpp import PEER

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
    results = [json.loads(path.read_text()) for path in arguments.results]
    draw(sorted(results, key=lambda result: result["bytes_per_token"]))
    pyplot.savefig(arguments.out, metadata={"Date": None})


def _comparison(models: list[dict[str, Any]]) -> None:
    """A row of panels for each shape of model, prefill and decode."""
    shapes: dict[str, list[dict[str, Any]]] = {}
    for result in models:
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
            value, at = row["tokens_per_second"], place + (i - (len(rows) - 1) / 2) * WIDTH
            spread = [[value - row["low"]], [row["high"] - value]]
            label = row["engine"] if place == 0 else None
            colour = GREY if row["engine"] == PEER else BLUE
            panel.bar(at, value, WIDTH, yerr=spread, capsize=3, color=colour, label=label)
        if what == "tg":
            label = "memory bandwidth" if place == 0 else None
            panel.hlines(result["limit_tokens_per_second"], place - WIDTH, place + WIDTH, RED, "dashed", label=label)
    names = [_type(result) for result in results]
    panel.set_xticks(range(len(names)), names)
    panel.margins(y=0.3)  # above the bars there is room for the legend
    panel.legend(loc="upper right", fontsize="small", ncols=2)


def _roofline(results: list[dict[str, Any]]) -> None:
    """Operations a second over operations a byte of weights (Williams, Waterman and Patterson, 2009), of whole models.

    A weight is multiplied and added once a token; a step reads the matrices once. The ridge is at the fastest prefill.
    """
    _, panel = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colours = {name: pyplot.colormaps["tab10"](i) for i, name in enumerate(dict.fromkeys(_type(r) for r in results))}
    speeds, places = [], []
    for result in results:
        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[_type(result)]]
        a_byte = 2 * elements / size
        for row in result["rows"]:
            tokens = int(row["test"][2:]) if row["test"].startswith("pp") else 1
            speeds.append(row["tokens_per_second"] * result["bytes_per_token"] * a_byte / 1e9)
            places.append(a_byte * tokens)
            marker, filled = "^" if tokens > 1 else "o", row["engine"] != PEER
            colour = colours[_type(result)]
            panel.plot(places[-1], speeds[-1], marker, color=colour, markerfacecolor=colour if filled else "none")
    for name, colour in colours.items():
        panel.plot([], [], "s", color=colour, label=name)
    panel.plot([], [], "ko", label="decode, 1 token")
    panel.plot([], [], "k^", label="prefill")
    panel.plot([], [], "ks", markerfacecolor="none", label=PEER)
    bandwidth, most = statistics.median(r["bandwidth_gb_s"] for r in results), max(speeds)
    ridge, left, right = most / bandwidth, min(places) / 2, 2 * max(places)
    panel.plot([left, ridge], [left * bandwidth, most], color=RED, label=f"memory, {bandwidth:.0f} GB/s")
    panel.plot([ridge, right], [most, most], color=RED, linestyle="dotted", label=f"fastest prefill, {most:.0f} Gop/s")
    panel.set(xscale="log", yscale="log", xlabel="operations a byte of weights", ylabel="Gop/s")
    panel.legend(loc="lower right", fontsize="small")


def _type(result: dict[str, Any]) -> str:
    return str(result["model"].partition("-")[2].removesuffix(".gguf"))


if __name__ == "__main__":
    main()
