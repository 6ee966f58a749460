"""`llorch new-provider`: what it writes works at once, in an environment that has only llorch and pytest."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from llorch import cli
from llorch.commands.new_provider import write
from llorch.providers import API_VERSION
from tests.support import ROOT, absent
from tests.unit import plugins

SUITE = "llorch.providers.conformance"
# One test function of every kind; the whole suite takes a minute, and numpy-cpu's run of it is part of `make test`.
SOME_OF_IT = (
    "test_device or test_head_geometries or ragged or decodes_and_prefill or padding or rope or test_rmsnorm or swiglu "
    "or gather or topk or (test_matmul and Q4_K) or (test_embed and F32) or tied or (test_greedy and Q8_0) or touches"
)


# On a busy machine the threads of a product wait for each other far longer than these small products take.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def run(*command: str | Path, cwd: Path, expected: int = 0) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS")} | ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == expected, f"{command}\n{done.stdout[-5000:]}"
    return done.stdout


def fresh_environment(folder: Path) -> Path:
    """The `bin` of a new virtual environment with llorch and pytest from the package index, and nothing else."""
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "pip"), "install", "-q", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "-c", str(ROOT / "constraints.txt"), str(ROOT), "pytest"], text=True, capture_output=True, timeout=300
    )
    if done.returncode and ("Could not find a version" in done.stderr or "No matching" in done.stderr):
        absent("a fresh environment needs a package index, and pip reaches none")
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def test_a_new_provider_passes_the_suite_in_a_fresh_environment(tmp_path) -> None:
    env = fresh_environment(tmp_path / "venv")
    printed = run(env / "llorch", "new-provider", "acme", cwd=tmp_path)
    assert "pytest --pyargs llorch.providers.conformance --provider acme" in printed
    run(env / "pip", "install", "-q", "./llorch-provider-acme", cwd=tmp_path)
    printed = run(env / "pytest", "-q", "--pyargs", SUITE, "--provider", "acme", "-k", SOME_OF_IT, cwd=tmp_path)
    assert int(printed.split(" passed")[0].split()[-1]) > 300
    listed = run(env / "llorch", "providers", cwd=tmp_path)
    assert "acme" in listed
    assert "broken" not in listed
    # `pytest` alone, in the folder: its own tests, then the suite for this provider
    printed = run(env / "pytest", "-q", "--collect-only", cwd=tmp_path / "llorch-provider-acme")
    assert "tests/test_llorch_provider_acme.py::test_the_entry_point_names_this_provider" in printed
    assert "test_operations.py::test_rmsnorm[acme-" in printed
    assert "[numpy-cpu" not in printed
    run(env / "pytest", "-q", "tests", cwd=tmp_path / "llorch-provider-acme")


def test_a_wrong_operation_of_a_new_provider_fails_the_suite(tmp_path) -> None:
    """The test above can fail: one sign changed in what was written is found."""
    folder = write("acme", tmp_path)
    module = folder / "src" / "llorch_provider_acme" / "__init__.py"
    right = module.read_text()
    wrong = right.replace("np.add(x, y, out=out)", "np.subtract(x, y, out=out)")
    assert wrong != right
    site = tmp_path / "site"
    site.mkdir()
    plugins.install(site, "acme", wrong)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--pyargs", SUITE, "--provider", "acme", "-k", "test_add_and_swiglu"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "26 failed" in done.stdout


def test_bare_pytest_takes_the_folders_tests_whatever_other_package_is_called_so(tmp_path) -> None:
    """As that of a checkout of llorch is, where llorch is installed editable."""
    folder, site = write("acme", tmp_path), tmp_path / "site"
    (site / "tests").mkdir(parents=True)
    (site / "tests" / "__init__.py").write_text("")
    (site / "tests" / "test_foreign.py").write_text("def test_of_another_project(): pass\n")
    plugins.install(site, "acme", (folder / "src" / "llorch_provider_acme" / "__init__.py").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only"], cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)}, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/test_llorch_provider_acme.py::test_the_entry_point_names_this_provider" in done.stdout
    assert "test_operations.py::test_rmsnorm[acme-" in done.stdout
    assert "test_of_another_project" not in done.stdout


def test_what_is_written_is_complete_and_named_after_the_provider(tmp_path) -> None:
    folder = write("fast-gpu", tmp_path)
    assert folder == tmp_path / "llorch-provider-fast-gpu"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    package = "llorch_provider_fast_gpu"
    assert files == ["README.md", "pyproject.toml", f"src/{package}/__init__.py", f"tests/test_{package}.py"]
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == "llorch-provider-fast-gpu"
    assert project["project"]["entry-points"]["llorch.providers"] == {"fast-gpu": f"{package}:provider"}
    assert project["tool"]["pytest"]["ini_options"]["addopts"] == "--pyargs --provider fast-gpu"
    source = (folder / "src" / package / "__init__.py").read_text()
    assert f"api_version = {API_VERSION} " in source
    for path in folder.rglob("*"):
        if path.is_file():
            assert "${" not in path.read_text(), path


def test_what_is_written_passes_ruff_as_this_project_does(tmp_path) -> None:
    folder = write("acme", tmp_path)
    config = ROOT / "pyproject.toml"
    ruff = [sys.executable, "-m", "ruff"]
    run(*ruff, "check", "--config", config, "--no-cache", "src", "tests", cwd=folder)
    run(*ruff, "format", "--config", config, "--no-cache", "--check", "src", "tests", cwd=folder)
    for path in folder.rglob("*.py"):
        ast.parse(path.read_text())


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["new-provider", *argv]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Acme", "; did you mean acme?"),
        ("my_gpu", "; did you mean my-gpu?"),
        ("a--b", "; did you mean a-b?"),
        ("x" * 41, f"; did you mean {'x' * 40}?"),
        ("../acme", "; did you mean acme?"),
        ("é", "not 'é'\n"),
        ("", "not ''\n"),
    ],
)
def test_a_name_that_pip_would_change_is_refused(capsys, tmp_path, name, hint) -> None:
    message = refused(capsys, name, "--path", str(tmp_path))
    assert message.startswith("llorch: error: NAME: expected lower-case letters, digits and single hyphens")
    assert hint in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("auto", "'auto' means the best that works, so no provider can have it: choose another"),
        ("faulty", "'faulty' is what llorch's own tests call one, so no provider can have it"),
        ("all", "'all' means every one under pytest --provider"),
        ("numpy-cpu", "a provider 'numpy-cpu' is installed already, see `llorch providers`: choose another name"),
        ("llorch-provider-acme", "expected the provider's name alone, 'acme', not 'llorch-provider-acme'"),
    ],
)
def test_a_name_that_is_taken_is_refused(capsys, tmp_path, name, reason) -> None:
    assert reason in refused(capsys, name, "--path", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(capsys, tmp_path) -> None:
    existing = tmp_path / "llorch-provider-acme"
    existing.mkdir()
    (existing / "work.py").write_text("hours of it")
    message = refused(capsys, "acme", "--path", str(tmp_path))
    assert f"{existing} exists already: remove it, or give another place with --path" in message
    assert [path.name for path in existing.iterdir()] == ["work.py"]


def test_a_place_that_cannot_be_written_is_an_error(capsys, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    message = refused(capsys, "acme", "--path", str(tmp_path / "file"))
    assert "cannot be written: Not a directory; give another place with --path" in message


def test_a_missing_name_is_asked_for(capsys) -> None:
    assert "NAME is missing, for example llorch new-provider acme" in refused(capsys)
