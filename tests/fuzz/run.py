"""Runs atheris over the reader and the tokenizer loader: python -m tests.fuzz.run [--seconds 60] [--keep].

New inputs that reach new code go to .cache/fuzz; `--keep` merges the smallest of them into tests/fuzz/corpus. A finding
ends the run with its input in .cache/fuzz-findings: mend what it shows, then add it to the corpus.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["llorch"]):
    from tests.fuzz.target import check

from tests.fuzz.mutate import mutated
from tests.fuzz.seeds import CORPUS, LARGEST, files, small
from tests.support import ROOT

FOUND, FINDINGS = ROOT / ".cache" / "fuzz", ROOT / ".cache" / "fuzz-findings"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=int, default=60)
    options.add_argument("--keep", action="store_true", help="merge what was found before into the corpus, then end")
    given, of_libfuzzer = options.parse_known_args()
    for folder in (FOUND, FINDINGS):
        folder.mkdir(parents=True, exist_ok=True)
    if of_libfuzzer:  # a merge runs the inputs in processes of its own, which it starts with this command
        _fuzz(of_libfuzzer)
    if given.keep:
        _fuzz([f"-max_len={LARGEST}", "-merge=1", str(CORPUS), str(FOUND)])
    dictionary = FOUND.parent / "fuzz.dict"
    dictionary.write_text("".join(f'"{word}"\n' for word in _words()))
    _fuzz(
        [
            f"-max_total_time={given.seconds}",
            f"-max_len={LARGEST}",
            f"-artifact_prefix={FINDINGS}/",
            f"-dict={dictionary}",
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-print_final_stats=1",
            str(FOUND),
            str(CORPUS),
        ]
    )


def _words() -> list[str]:
    """The keys that mean something: mutations would not find them letter by letter."""
    file = small()
    return [str(key) for key in file.fields] + [str(tensor.name) for tensor in file.tensors]


def _fuzz(arguments: list[str]) -> None:
    """Does not return: libFuzzer ends the process, with 0 where it found nothing."""
    path = Path(f"/proc/self/fd/{os.memfd_create('input')}")  # a file in memory, gone with the process
    whole = list(files())

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        return atheris.Mutate(data, largest) if seed % 2 else mutated(whole[seed // 2 % len(whole)], seed)[:largest]

    atheris.Setup(
        [f"{sys.executable} -m tests.fuzz.run", *arguments],
        lambda data: check(data, path) and None,
        custom_mutator=mutate,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
