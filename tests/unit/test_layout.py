"""The shape of the project: what is public, which way dependencies point, what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llorch.providers
from tests.support import ROOT

PACKAGE = ROOT / "llorch"

SEAM = [
    "ACCEPTED_API_VERSIONS",
    "API_VERSION",
    "OPTIONAL",
    "REQUIRED",
    "AddRMSNormSpec",
    "AddSpec",
    "AttentionSpec",
    "Batch",
    "BindError",
    "CacheSpec",
    "Device",
    "DeviceInfo",
    "DeviceMemoryError",
    "DeviceOptions",
    "EmbedSpec",
    "GateUpSwigluSpec",
    "GatherSpec",
    "HostWeight",
    "Inputs",
    "KVCache",
    "KeptFiles",
    "Kernel",
    "LayerOps",
    "MatmulGroupSpec",
    "MatmulSpec",
    "MemoryInfo",
    "MemoryLimit",
    "MemoryNeed",
    "OpSpec",
    "Provider",
    "ProviderError",
    "ProviderUnavailableError",
    "RMSNormSpec",
    "RopePairSpec",
    "RopeSpec",
    "Step",
    "SwigluSpec",
    "Tensor",
    "TopkSpec",
    "amount",
    "hookimpl",
]


def test_the_public_api_of_the_seam_is_what_it_was() -> None:
    assert sorted(llorch.providers.__all__) == sorted(SEAM)
    assert all(hasattr(llorch.providers, name) for name in SEAM)


PUBLIC_TO_PROVIDERS = {"llorch.providers", "llorch.providers.array", "llorch.providers.host_memory"}


def test_our_providers_import_what_anyone_may() -> None:
    sources = [*ROOT.glob("plugins/*/src/**/*.py"), *ROOT.glob("examples/llorch-provider-*/**/*.py")]
    assert len(sources) > 40
    for path in sources:
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        for node in nodes:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            foreign = {name for name in names if name.split(".")[0] == "llorch"} - PUBLIC_TO_PROVIDERS
            assert not foreign, f"{path}:{node.lineno} imports {foreign}"


def test_the_public_api_of_the_package_is_what_it_was() -> None:
    assert sorted(llorch.__all__) == ["LLM", "Tokenizer", "__version__", "load"]
    assert all(getattr(llorch, name) is not None for name in llorch.__all__)


def imports(path: Path) -> Iterator[str]:
    """Modules of llorch that a file imports when it is imported, or for its types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("llorch"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llorch"):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(folder: str) -> list[Path]:
    return [path for path in (PACKAGE / folder).rglob("*.py") if "conformance" not in path.parts]


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("core", ("llorch.http", "llorch.commands", "llorch.settings", "llorch.providers.numpy_cpu")),
        ("providers", ("llorch.http", "llorch.commands", "llorch.settings", "llorch.core")),
        ("http", ("llorch.commands", "llorch.providers.numpy_cpu", "llorch.providers.registry")),
    ],
)
def test_dependencies_point_one_way(folder: str, forbidden: tuple[str, ...]) -> None:
    found = [(path.name, module) for path in files(folder) for module in imports(path) if module.startswith(forbidden)]
    assert files(folder)
    assert not found


def test_the_built_in_provider_imports_the_seam_alone() -> None:
    modules = set(imports(PACKAGE / "providers" / "numpy_cpu.py"))
    assert modules
    assert all(module.startswith("llorch.providers") for module in modules)


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_llorch_is_light() -> None:
    heavy = {"numpy", "gguf", "litestar", "uvicorn", "pydantic", "numba", "cupy", "pyopencl", "sentencepiece", "rich"}
    assert not heavy & loaded_by("import llorch")
    assert not (heavy - {"numpy"}) & loaded_by("import llorch.providers")
    assert "numpy" in loaded_by("import llorch.core.llm")  # the check can fail


def test_the_pytest_plugin_costs_a_foreign_test_run_nothing() -> None:
    assert not {"numpy", "gguf", "sentencepiece"} & loaded_by("import llorch.pytest_plugin")


def test_no_file_is_a_drawer() -> None:
    long = {path.name: count for path in PACKAGE.rglob("*.py") if (count := len(path.read_text().splitlines())) > 450}
    assert not long
