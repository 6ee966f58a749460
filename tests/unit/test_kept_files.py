"""What a provider keeps between starts, and what becomes of it where nothing can be kept."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from llorch.providers import KeptFiles

PROGRAM = (
    "from pathlib import Path; import sys; from llorch.providers import KeptFiles;"
    "KeptFiles(Path(sys.argv[1]), '').get('x', lambda: b'A' * 100000, 'makes x')"
)


def remade() -> bytes:
    raise AssertionError("it is made again")


def test_what_was_made_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "a" / "b"
    assert KeptFiles(folder, "").get("x", lambda: b"made", "acme compiles x") == b"made"
    assert [r.getMessage() for r in caplog.records] == [f"acme compiles x (once, kept in {folder})"]
    assert KeptFiles(folder, "").get("x", remade, "acme compiles x") == b"made"
    assert [path.name for path in folder.iterdir()] == ["x"]
    assert len(caplog.records) == 1


def test_a_folder_that_cannot_be_written_costs_time_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").touch()
    kept = KeptFiles(tmp_path / "file" / "below", "compiles for half a minute")
    assert [kept.get(name, name.encode, f"acme compiles {name}") for name in ("x", "y")] == [b"x", b"y"]
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert str(kept.folder) in warning
    assert "Not a directory" in warning
    assert "each start compiles for half a minute" in warning
    assert "acme compiles x (at each start)" in caplog.text


def test_a_folder_that_is_full_is_warned_of_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    kept = KeptFiles(tmp_path, "compiles")
    assert kept.get("x", lambda: b"made", "acme compiles x") == b"made"
    kept.write("y", b"made")
    assert caplog.text.count("No space left on device") == 1


def test_a_folder_of_others_that_holds_what_is_needed_needs_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    KeptFiles(tmp_path, "").write("x", b"made")
    kept = KeptFiles(tmp_path, "compiles")
    kept.problem = "Read-only file system"
    assert kept.get("x", remade, "acme compiles x") == b"made"
    assert not caplog.records


def test_a_command_shows_it_as_a_plain_line_and_a_program_does_not(tmp_path: Path) -> None:
    command = "from llorch.commands._terminal import log_plainly; log_plainly();"
    for before, shown in ((command, "makes x"), ("", "")):
        run = [sys.executable, "-c", before + PROGRAM, str(tmp_path / str(len(before)))]
        said = subprocess.run(run, check=True, capture_output=True, text=True).stderr
        assert said.startswith(shown)
        assert len(said.splitlines()) == bool(shown)


def test_first_starts_that_coincide_leave_one_whole_file(tmp_path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"A" * 100000
