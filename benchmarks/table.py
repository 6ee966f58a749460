"""Prints the tables of docs/benchmarks.md from what `vs_llamacpp.py --json` has written, a file a model.

python benchmarks/table.py results/*.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vs_llamacpp import PEER

HEAD = """
| weights | prefill, llama.cpp | llorch | ratio | decode, llama.cpp | llorch | ratio | memory, GB/s | of the limit |
|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    results = [json.loads(path.read_text()) for path in parser.parse_args().results]
    shape = None
    for result in sorted(results, key=lambda r: (r["model"].partition("-")[0], r["bytes_per_token"])):
        name, _, weights = result["model"].removesuffix(".gguf").partition("-")
        if name != shape:
            shape = name
            print(f"\n{name}, {result['threads']} threads, medians of {result['rounds']} rounds{HEAD}")
        cells = [cell for what in ("pp", "tg") for cell in _cells(result["rows"], what)]
        (share,) = (row["of_limit"] for row in result["rows"] if row["of_limit"] is not None)
        print(f"| {weights} | {' | '.join(cells)} | {result['bandwidth_gb_s']:.1f} | {share:.0%} |")


def _cells(rows: list[dict[str, Any]], what: str) -> list[str]:
    """llama.cpp's tokens a second, llorch's, and their ratio with its spread; a dash without the peer."""
    found = {row["engine"]: row for row in rows if row["test"].startswith(what)}
    peer = found.pop(PEER, None)
    (own,) = found.values()
    speed = f"{own['tokens_per_second']:.1f}"
    if peer is None:
        return ["-", speed, "-"]
    ratio = f"**{own['to_peer']:.2f}** ({own['to_peer_low']:.2f} to {own['to_peer_high']:.2f})"
    return [f"{peer['tokens_per_second']:.1f}", speed, ratio]


if __name__ == "__main__":
    main()
