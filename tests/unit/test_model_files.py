"""What a user may call a model: a file, a directory, a pattern, any part of a split file."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import llorch
from llorch.cli import main
from llorch.core.model_files import choices, locate, open_model, parts_of
from llorch.errors import GGUFError, ModelError
from llorch.providers.conformance.models import TinyModel, write_model
from tests.gguf_copy import copy_fields, finish

TINY = TinyModel(layers=2)
PROMPT = [1, 50, 100, 200, 7]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_model(TINY, tmp_path_factory.mktemp("whole") / "tiny.gguf")


@pytest.fixture(scope="module")
def expected(whole) -> np.ndarray:
    with load(whole) as llm:
        return llm.logits(PROMPT)


def load(model: str | Path) -> llorch.LLM:
    return llorch.load(model, provider="numpy-cpu", parallel=1)


# ---- split files, as llama.cpp's gguf-split writes them ----


def split(
    source: Path, folder: Path, count: int = 3, *, tensors: Sequence[Sequence[str]] | None = None, total: int = 0
) -> list[Path]:
    """The model in parts; the first has all metadata. `tensors`: names by part, in turn by default."""
    reader = gguf.GGUFReader(source)
    names = tensors or [[t.name for t in reader.tensors][i::count] for i in range(count)]
    paths = []
    for number in range(count):
        path = folder / f"tiny-{number + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            copy_fields(reader, writer)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", total or len(reader.tensors))
        for tensor in reader.tensors:
            if tensor.name in names[number]:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        paths.append(finish(writer, path))
    return paths


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_of_a_split_model_loads_all_of_it(whole, expected, tmp_path, given) -> None:
    parts = split(whole, tmp_path)
    with load(parts[given]) as llm:
        np.testing.assert_array_equal(llm.logits(PROMPT), expected)
        assert llm.model_ref == str(parts[0])
        assert llm.config.name == "conformance"
    assert llorch.Tokenizer.from_gguf(parts[given]).vocab_size == TINY.vocab


def test_a_first_part_may_hold_metadata_alone(whole, expected, tmp_path) -> None:
    names = [t.name for t in gguf.GGUFReader(whole).tensors]
    parts = split(whole, tmp_path, 2, tensors=[[], names])
    with load(parts[1]) as llm:
        np.testing.assert_array_equal(llm.logits(PROMPT), expected)


def test_a_split_model_has_the_bytes_and_tensors_of_all_parts(whole, tmp_path) -> None:
    parts = split(whole, tmp_path)
    with open_model(parts[0]) as file, open_model(whole) as one:
        assert file.nbytes == sum(part.stat().st_size for part in parts)
        assert file.tensors.keys() == one.tensors.keys()
        assert file.file_of(gguf.GGUFReader(parts[2]).tensors[0].name) == parts[2]
        assert all(np.array_equal(file.data(name), one.data(name)) for name in one.tensors)
        with pytest.raises(GGUFError, match=f"tensor absent is missing; the parts hold {len(one.tensors)} tensors"):
            file.data("absent")


def test_closing_a_split_model_closes_its_parts(whole, tmp_path) -> None:
    parts = split(whole, tmp_path)
    file = open_model(parts[1])
    assert str(parts[2]) in Path("/proc/self/maps").read_text()
    file.close()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def _missing(parts: list[Path]) -> None:
    parts[1].unlink()


def _swapped(parts: list[Path]) -> None:
    spare = parts[1].with_suffix(".spare")
    parts[1].rename(spare)
    parts[2].rename(parts[1])
    spare.rename(parts[2])


def _renamed(parts: list[Path]) -> None:
    parts[0].rename(parts[0].with_name("tiny.gguf"))
    parts[0] = parts[0].with_name("tiny.gguf")


def _of_another_count(parts: list[Path]) -> None:
    for i, part in enumerate(parts):
        part.rename(part.with_name(f"tiny-{i + 1:05}-of-00004.gguf"))
        parts[i] = part.with_name(f"tiny-{i + 1:05}-of-00004.gguf")


def _foreign(parts: list[Path]) -> None:
    other = parts[0].parent / "other"
    other.mkdir()
    whole = write_model(TINY, other / "tiny.gguf")
    shutil.copy(split(whole, other, 4)[1], parts[1])


def _twice(parts: list[Path]) -> None:
    folder = parts[0].parent / "again"
    folder.mkdir()
    whole = write_model(TINY, folder / "tiny.gguf")
    names = [t.name for t in gguf.GGUFReader(whole).tensors]
    again = split(whole, folder, tensors=[names[0::3], names[1::3], [*names[2::3], names[0]]])
    shutil.copy(again[2], parts[2])


def _damaged(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[2].read_bytes()[:-1000])


BROKEN: dict[str, tuple[Callable[[list[Path]], None], str]] = {
    "a part is missing": (
        _missing,
        r"1 of the model's 3 parts are missing: tiny-00002-of-00003\.gguf; put them beside",
    ),
    "two parts are swapped": (
        _swapped,
        r"00002-of-00003\.gguf: .*split\.no at offset \d+ is 2, .* must have 1: .*mixed",
    ),
    "a part under another name": (_renamed, r"split\.count is 3, the name says none; .*tiny-00001-of-00003\.gguf"),
    "names of another count": (_of_another_count, r"split\.count is 3, the name says 4"),
    "a part of another split": (_foreign, r"00002-of-00003\.gguf: .*split\.count at offset \d+ is 4, .* must have 3"),
    "a tensor in two parts": (_twice, r"00003-of-00003\.gguf: tensor .* at offset \d+: the same name is in .*00001-of"),
    "a part is cut off": (_damaged, r"00003-of-00003\.gguf: tensor .* at offset \d+: data ends at byte \d+, the file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_split_model_is_refused(whole, tmp_path, case) -> None:
    breaks, message = BROKEN[case]
    parts = split(whole, tmp_path)
    breaks(parts)
    with pytest.raises(GGUFError, match=message) as caught:
        load(parts[0])
    assert str(tmp_path) in str(caught.value)
    del caught  # its traceback holds what is read
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(), "a part is still mapped"


def test_parts_that_hold_fewer_tensors_than_they_say_are_refused(whole, tmp_path) -> None:
    parts = split(whole, tmp_path, total=99)
    with pytest.raises(GGUFError, match=r"split\.tensors\.count at offset \d+ is 99, the 3 parts hold 21 tensors"):
        load(parts[0])


def test_names_of_parts() -> None:
    assert parts_of("m-00002-of-00003.gguf") == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert parts_of("m-2-of-3.gguf") == ["m-2-of-3.gguf"]


# ---- directories and patterns ----


def test_a_directory_with_one_model_is_that_model(whole, tmp_path) -> None:
    shutil.copy(whole, tmp_path)
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"an image encoder is no model")
    (tmp_path / "readme.txt").write_text("no model")
    assert locate(tmp_path) == tmp_path / "tiny.gguf"
    with load(tmp_path) as llm:
        assert llm.model_ref == str(tmp_path / "tiny.gguf")


def test_a_directory_with_one_split_model_is_that_model(whole, expected, tmp_path) -> None:
    split(whole, tmp_path)
    with load(tmp_path) as llm:
        np.testing.assert_array_equal(llm.logits(PROMPT), expected)


def test_a_directory_with_several_models_is_an_error_that_lists_them(whole, tmp_path, capsys) -> None:
    split(whole, tmp_path)
    shutil.copy(whole, tmp_path / "a.gguf")
    message = rf"this directory holds 2 models; name one of them: {tmp_path}/a\.gguf, {tmp_path}/tiny-00001-of-00003"
    with pytest.raises(ModelError, match=message):
        load(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "holds 2 models" in capsys.readouterr().err


@pytest.mark.parametrize(("pattern", "count"), [("*.gguf", 30), ("a-1*.gguf", 10)])
def test_a_pattern_with_many_models_lists_some(tmp_path, pattern, count) -> None:
    for i in range(30):
        (tmp_path / f"a-{i:02}.gguf").touch()
    with pytest.raises(
        ModelError, match=rf"this pattern holds {count} models; name one of them: .*a-10\.gguf"
    ) as error:
        load(str(tmp_path / pattern))
    assert ("and 10 more" in str(error.value)) == (count > 20)


def test_a_pattern_with_one_model_is_that_model(whole, tmp_path) -> None:
    shutil.copy(whole, tmp_path / "one.gguf")
    (tmp_path / "two.gguf").touch()
    assert locate(tmp_path / "o*.gguf") == tmp_path / "one.gguf"


@pytest.mark.parametrize(("name", "kind"), [("", "directory"), ("*.gguf", "pattern")])
def test_a_place_without_models_is_an_error(tmp_path, name, kind) -> None:
    with pytest.raises(ModelError, match=rf"this {kind} holds no \.gguf model; name the model's file"):
        load(str(tmp_path / name))


def test_a_name_that_looks_like_a_pattern_is_the_file_of_that_name(whole, tmp_path) -> None:
    shutil.copy(whole, tmp_path / "odd[1].gguf")
    assert locate(tmp_path / "odd[1].gguf") == tmp_path / "odd[1].gguf"


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(GGUFError, match=r"absent\.gguf: no such file"):
        load(tmp_path / "absent.gguf")


def test_choices_take_a_split_model_once(tmp_path) -> None:
    names: list[Any] = [
        "b-00002-of-00002.gguf",
        "b-00001-of-00002.gguf",
        "b-00001-of-00003.gguf",
        "c.gguf",
        "mmproj.gguf",
    ]
    found = choices([tmp_path / name for name in names])
    assert [path.name for path in found] == ["b-00001-of-00002.gguf", "b-00001-of-00003.gguf", "c.gguf"]


@pytest.mark.parametrize("name", ["locked", "locked/model.gguf", "locked/*.gguf"])
def test_a_directory_that_may_not_be_read_is_an_error(tmp_path, monkeypatch, name) -> None:
    (tmp_path / "locked").mkdir()

    def refuse(*_args: Any, **_kwargs: Any) -> None:  # root may read everything, so chmod proves nothing
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ModelError, match=r"Permission denied|permission denied|holds no \.gguf model"):
        load(tmp_path / name)
