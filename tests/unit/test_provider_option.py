"""`pytest --provider`, run as a third party runs it: real distributions on a path, a real pytest process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llorch.providers import conformance
from llorch.pytest_plugin import ORDER

PROVIDER = """
from llorch.providers import DeviceInfo, ProviderUnavailableError
from llorch.providers.numpy_cpu import NumpyOps, NumpyProvider, hookimpl


class Ops(NumpyOps):
    {operation}


class Provider(NumpyProvider):
    name = "{name}"
    api_version = {api_version}

    def devices(self):
        {devices}

    def operations(self):
        return Ops()


provider = Provider()
"""
WRONG_ADD = """
    @hookimpl
    def add(self, spec):
        return lambda out, x, y: out.__setitem__(..., x + 2 * y)
"""
TESTS = """
import pytest


def test_name(provider_name, rig):
    assert rig.provider.name == provider_name


@pytest.mark.provider_api(2)
def test_of_a_later_contract(provider_name):
    raise AssertionError("an older provider must not see this")
"""


class Environment:
    """A folder of distributions and a test file, and pytest over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "test_foreign.py").write_text(TESTS)

    def install(
        self, name: str, *, operation: str = "pass", devices: str = "return super().devices()", api_version: int = 1
    ) -> Path:
        package = self.folder / f"{name}_package"
        package.mkdir()
        source = PROVIDER.format(name=name, operation=operation, devices=devices, api_version=api_version)
        (package / "__init__.py").write_text(source)
        info = self.folder / f"llorch_provider_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llorch-provider-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[llorch.providers]\n{name} = {name}_package:provider\n")
        return package

    def pytest(self, *arguments: str) -> tuple[int, str]:
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *arguments],
            cwd=self.folder, env=environment, text=True, timeout=120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path)


SUITE = "llorch.providers.conformance"
ADD_TESTS = ("--pyargs", "llorch.providers.conformance.test_operations", "-k", "test_add_and_swiglu and 1-1")


def test_the_default_is_numpy_cpu_and_several_names_run_each(environment) -> None:
    status, output = environment.pytest("test_foreign.py")
    assert (status, "test_name[numpy-cpu]" in output) == (0, True)
    environment.install("acme")
    status, output = environment.pytest("test_foreign.py", "--provider", "acme,numpy-cpu")
    assert status == 0
    assert "PASSED test_foreign.py::test_name[acme]" in output
    assert "PASSED test_foreign.py::test_name[numpy-cpu]" in output


def test_a_test_of_a_later_contract_never_breaks_an_older_provider(environment) -> None:
    _, output = environment.pytest("test_foreign.py")
    assert "the test needs provider API 2, numpy-cpu is built for 1" in output
    assert "an older provider must not see this" not in output


def test_an_unknown_name_ends_the_run_before_collection(environment) -> None:
    (environment.folder / "test_foreign.py").write_text("raise RuntimeError('collected')")
    status, output = environment.pytest("test_foreign.py", "--provider", "nunpy-cpu")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "Did you mean numpy-cpu?" in output
    assert "collected" not in output.replace("collected 0", "")


NO_DEVICE = "raise ProviderUnavailableError('no such card: insert one')"


def test_without_a_device_a_named_provider_fails_and_all_skips_it_with_the_reason(environment) -> None:
    environment.install("absent", devices=NO_DEVICE)
    status, output = environment.pytest("test_foreign.py", "--provider", "absent")
    assert (status, "no such card: insert one" in output) == (pytest.ExitCode.USAGE_ERROR, True)
    status, output = environment.pytest("test_foreign.py", "--provider", "all")
    assert status == 0
    assert "provider absent has no device here: no such card: insert one" in output
    assert "PASSED test_foreign.py::test_name[numpy-cpu]" in output


def test_a_broken_provider_is_an_error_under_all(environment) -> None:
    (environment.install("broken") / "__init__.py").write_text("import no_such_module")
    status, output = environment.pytest("test_foreign.py", "--provider", "all")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "provider broken is broken" in output
    assert "no_such_module" in output


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        ("@hookimpl\n    def ad(self, spec): pass", "unknown hook 'ad'"),
        ("@hookimpl\n    def add(self, specification): pass", "specification"),
        ("def add_rmsnorm(self, spec): pass", "add_rmsnorm without @hookimpl"),
    ],
)
def test_operations_that_cannot_be_registered_are_one_error_and_not_a_failure_of_every_test(
    environment, operation, reason
) -> None:
    environment.install("unusable", operation=operation)
    status, output = environment.pytest(*ADD_TESTS, "--provider", "unusable")
    assert status == pytest.ExitCode.USAGE_ERROR
    (line,) = (line for line in output.splitlines() if line.startswith("ERROR"))
    assert line.startswith("ERROR: provider unusable: ")
    assert reason in line


def test_what_a_device_declares_wrongly_is_one_error_too(environment) -> None:
    devices = "NumpyDevice.weight_types = {'embed': {'F32'}, 'matmul': {'Q4_O'}, 'vector': {'F32'}}\n"
    devices += "        return super().devices()"
    package = environment.install("undeclared", devices=devices)
    source = (package / "__init__.py").read_text()
    (package / "__init__.py").write_text(source.replace("import NumpyOps", "import NumpyDevice, NumpyOps"))
    status, output = environment.pytest(*ADD_TESTS, "--provider", "undeclared")
    assert status == pytest.ExitCode.INTERRUPTED  # while tests are collected
    assert "UsageError: provider undeclared: weight_types of its device cpu has 'Q4_O' under 'matmul'" in output
    assert "1 error in" in output.splitlines()[-1]


def test_the_suites_files_come_operations_first_and_whole_models_last(environment) -> None:
    _, output = environment.pytest("-q", "--collect-only", "--pyargs", "test_foreign.py", SUITE)
    names = [Path(line.split("::")[0]).stem for line in output.splitlines() if "::" in line]
    assert list(dict.fromkeys(names)) == ["test_foreign", *(f"test_{name}" for name in ORDER)]
    assert names == sorted(names, key=list(dict.fromkeys(names)).index), "a file's tests are together"
    files = sorted(path.stem for path in Path(conformance.__path__[0]).glob("test_*.py"))
    assert files == sorted(f"test_{name}" for name in ORDER)
    assert ORDER[0] == "operations"
    assert ORDER[-2:] == ("models", "models_cache")


def test_a_wrong_operation_fails_with_what_a_kernel_author_needs(environment) -> None:
    environment.install("wrong", operation=WRONG_ADD.strip())
    status, output = environment.pytest(*ADD_TESTS, "--provider", "wrong")
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "test_add_and_swiglu[wrong-1-1]" in output


def test_expected_failures_are_strict_and_need_a_reason(environment) -> None:
    package = environment.install("wrong", operation=WRONG_ADD.strip())
    (package / "conformance-xfail.txt").write_text("test_add_and_swiglu[wrong-*  # adds twice, issue 7\n")
    status, output = environment.pytest(*ADD_TESTS, "--provider", "wrong")
    assert status == 0
    assert "adds twice, issue 7 (conformance-xfail.txt, line 1)" in output
    right = environment.install("right")
    (right / "conformance-xfail.txt").write_text("test_add_and_swiglu[right-*  # no longer so\n")
    status, output = environment.pytest(*ADD_TESTS, "--provider", "right")
    assert status == pytest.ExitCode.TESTS_FAILED  # strict: a line that is no longer true must go
    assert "no longer so" in output
    (right / "conformance-xfail.txt").write_text("test_add_and_swiglu*\n")
    status, output = environment.pytest(*ADD_TESTS, "--provider", "right")
    assert "has no reason; write `pattern  # reason`" in output
    assert status != 0


def test_an_expected_failure_that_no_test_matches_is_named_where_the_whole_suite_is_collected(environment) -> None:
    package = environment.install("right")
    lines = "test_add_and_swiglu[right-1-1]  # matches\ntest_ad_and_swiglu*  # misspelt\n"
    (package / "conformance-xfail.txt").write_text(lines)
    collect = ("--collect-only", "-q", "--pyargs", "--provider", "right")
    status, output = environment.pytest(*collect, SUITE)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "provider right, conformance-xfail.txt, line 2: 'test_ad_and_swiglu*' matches no test of the suite" in output
    assert "line 1" not in output
    for part in ((SUITE, "-k", "swiglu"), (f"{SUITE}.test_operations",)):
        status, output = environment.pytest(*collect, *part)
        assert (status, "matches no test" in output) == (0, False)
    entries = environment.folder / "llorch_provider_right-1.0.dist-info" / "entry_points.txt"
    entries.write_text(entries.read_text() + "other = right_package:other\n")  # whose tests the line may be about
    assert environment.pytest(*collect, SUITE)[0] == 0
