"""From what a user calls a model to its open file: a path, a directory or pattern that holds one, any part of a split
file, a model of the Hugging Face Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from llorch.core.gguf import GGUFFile, TensorInfo, shown
from llorch.errors import GGUFError, ModelError

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_PARTS = 4096
_LISTED = 20

AnyPath = TypeVar("AnyPath", bound=PurePath)
Progress = Callable[[float, str], None]


def open_model(model: str | os.PathLike[str], progress: Progress = lambda _fraction, _text: None) -> GGUFFile:
    """The model's file, all parts of a split one as one. Raises ModelError where there is none, or not a good one.

    `progress` gets the fraction and the file of a download; nothing where there is none.
    """
    return _open(locate(model, progress))


def locate(model: str | os.PathLike[str], progress: Progress = lambda _fraction, _text: None) -> Path:
    """The path of a model's file: where a directory or a pattern is named, of the one model that is there.

    `hf:OWNER/REPO` is a model of the hub (hub.py), downloaded where the cache lacks it.
    """
    from llorch.core import hub  # it names files with what is below

    if (named := hub.reference(model)) is not None:
        return hub.fetch(named, progress)
    path = Path(model)
    # os.path answers where pathlib raises: behind a directory that may not be searched
    if os.path.isdir(path):
        return _the_one(str(path), _listed(path), "directory")
    if glob.has_magic(str(path)) and not os.path.exists(path):
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
        return _the_one(str(path), [p for p in found if os.path.isfile(p)], "pattern")
    return path


def _listed(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.suffix == ".gguf"]
    except OSError as error:
        raise ModelError(f"{folder}: the directory cannot be read ({error.strerror}); name the model's file") from error


def _the_one(place: str, paths: Sequence[Path], kind: str) -> Path:
    models = sorted(choices(paths))
    if len(models) == 1:
        return models[0]
    if not models:
        raise ModelError(f"{place}: this {kind} holds no .gguf model; name the model's file")
    names = [str(path) for path in models[:_LISTED]]
    more = [f"and {len(models) - _LISTED} more"] if len(models) > _LISTED else []
    raise ModelError(f"{place}: this {kind} holds {len(models)} models; name one of them: {', '.join(names + more)}")


def choices(paths: Sequence[AnyPath]) -> list[AnyPath]:
    """Models among GGUF files: a split one by its first part alone, or the first that is there; no image encoders."""
    first: dict[str, AnyPath] = {}
    for path in sorted(paths, key=str):
        part = _PART.fullmatch(path.name)
        if not path.name.startswith("mmproj"):
            first.setdefault(f"{path.parent}/{part['stem']}-of-{part['count']}" if part else str(path), path)
    return list(first.values())


def parts_of(name: str) -> list[str]:
    """The names of all parts of a split file, from any one's; [name] for a file that is whole."""
    part = _PART.fullmatch(name)
    if part is None:
        return [name]
    return [f"{part['stem']}-{i + 1:05}-of-{part['count']}.gguf" for i in range(int(part["count"]))]


# ---- split files: llama.cpp's tools/gguf-split ----


class SplitModel(GGUFFile):
    """Several files as one: the first part's metadata, and the tensors of all."""

    def __init__(self, parts: Sequence[GGUFFile]) -> None:
        """Use `open_model`. Takes the parts over."""
        first = parts[0]
        self.path, self.version, self.alignment = first.path, first.version, first.alignment
        self.metadata, self._offsets = first.metadata, first._offsets
        self._parts = tuple(parts)
        self._part_of: dict[str, GGUFFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in self.tensors:
                    raise GGUFError(
                        f"{part.path}: tensor {shown(name)} at offset {info.offset}: the same name is "
                        f"in {self._part_of[name].path} at offset {self.tensors[name].offset} already; "
                        "fetch the parts again"
                    )
                self.tensors[name], self._part_of[name] = info, part
        self._check_total()

    def _check_total(self) -> None:
        total = self.get("split.tensors.count", int, len(self.tensors))
        if total != len(self.tensors):
            raise GGUFError(
                f"{self.path}: {self.where('split.tensors.count')} is {total}, the {len(self._parts)} parts hold "
                f"{len(self.tensors)} tensors; fetch the parts again"
            )

    def file_of(self, name: str) -> Path:
        return self._part_of[name].path if name in self._part_of else self.path

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        if name not in self._part_of:
            raise GGUFError(f"{self.path}: tensor {shown(name)} is missing; the parts hold {len(self.tensors)} tensors")
        return self._part_of[name].data(name)

    def close(self) -> None:
        for part in self._parts:
            part.close()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)


def _open(path: Path) -> GGUFFile:
    """The file, or with it all others of a split model. The name says where they are, the metadata that they belong."""
    with ExitStack() as opened:
        file = opened.enter_context(GGUFFile.open(path))
        count = _split_field(file, "count", 1)
        if count == 1:
            opened.pop_all()
            return file
        if not 1 < count <= _MOST_PARTS:
            raise GGUFError(f"{path}: {file.where('split.count')} is {count}, expected 1 to {_MOST_PARTS}")
        parts = [opened.enter_context(GGUFFile.open(part)) for part in _part_paths(path, count)]
        for number, part in enumerate(parts):
            _check_part(part, number, count)
        model = SplitModel(parts)
        file.close()
        opened.pop_all()
        return model


def _part_paths(path: Path, count: int) -> list[Path]:
    names = parts_of(path.name)
    if len(names) != count:
        number = len(names) if _PART.fullmatch(path.name) else "none"
        raise GGUFError(
            f"{path}: this is a part of a split model, split.count is {count}, the name says {number}; "
            f"give it the name it had, such as {path.stem}-00001-of-{count:05}.gguf"
        )
    paths = [path.with_name(name) for name in names]
    if missing := [part.name for part in paths if not part.exists()]:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise GGUFError(
            f"{path}: {len(missing)} of the model's {count} parts are missing: {', '.join(missing[:_LISTED])}{more}; "
            f"put them beside this one in {path.parent}"
        )
    return paths


def _check_part(part: GGUFFile, number: int, count: int) -> None:
    found_number, found_count = _split_field(part, "no", 0), _split_field(part, "count", 1)
    for key, found, expected in (("count", found_count, count), ("no", found_number, number)):
        if found != expected:
            raise GGUFError(
                f"{part.path}: {part.where(f'split.{key}')} is {found}, a part of this name must have {expected}: "
                "the parts are mixed up; fetch them again"
            )


def _split_field(file: GGUFFile, key: str, default: Any) -> int:
    return file.get(f"split.{key}", int, default)
