"""`pytest --provider NAME[,NAME...]|all`: runs provider tests, llorch's own and anyone's, against installed providers.

pytest imports this module in every run of an environment that has llorch, so it imports nothing itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import numpy as np

    from llorch.providers.conformance.rig import Rig
    from llorch.providers.conformance.selection import Selection
    from llorch.providers.spec import Use

_SELECTION: pytest.StashKey[Selection] = pytest.StashKey()
DEFAULT = "numpy-cpu"
SUITE = "llorch.providers.conformance"
# its files: with -x a wrong kernel is shown by its own test, not by what is made of it
ORDER = ("operations", "fused", "real_sizes", "attention", "device", "models", "models_cache")
_NARROWING = ("keyword", "markexpr", "deselect", "lf")  # options that leave out a part of what was named
PLAIN = ("F32", "F16", "BF16")
COMMON = ("F32", "F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")  # what most models are of: enough of the largest sizes
# fixtures that are a weight type the device takes natively: the uses it takes it for, and which types (None: all)
_TYPED: dict[str, tuple[tuple[Use, ...], tuple[str, ...] | None]] = {
    "weight_type": (("matmul",), None),
    "embed_type": (("embed",), None),
    "tied_type": (("embed", "matmul"), None),
    "plain_type": (("matmul",), PLAIN),
    "common_type": (("matmul",), COMMON),
    "common_embed_type": (("embed",), COMMON),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llorch")
    group.addoption(
        "--provider",
        metavar="NAME[,NAME...]|all",
        default=None,
        help=f"the compute providers that provider tests run against (default: {DEFAULT}); all: every installed one",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "provider_api(version): the test needs this version of the provider contract; older providers skip it",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A provider's tests as old as the provider, and strict about the failures that it expects of itself."""
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("provider_name")  # type: ignore[attr-defined]
        if name is not None:
            mark = item.get_closest_marker("provider_api")
            for decorator in _selection(config).marks(name, item.name, mark.args[0] if mark else 1):
                item.add_marker(decorator)
    _order_the_suite(items)
    narrowed = any(config.getoption(option, None) for option in _NARROWING)
    if not narrowed and set(ORDER) <= {_suite_file(item) for item in items}:
        _selection(config).check_expected_failures()


def _order_the_suite(items: list[pytest.Item]) -> None:
    """By ORDER, in the places that the suite's items have among others."""
    places = [i for i, item in enumerate(items) if _suite_file(item) in ORDER]
    ordered = sorted((items[i] for i in places), key=lambda item: ORDER.index(_suite_file(item)))
    for i, item in zip(places, ordered, strict=True):
        items[i] = item


def _suite_file(item: pytest.Item) -> str:
    """The name of its file as in ORDER, or "" of a test that is not the suite's."""
    package, _, file = getattr(getattr(item, "module", None), "__name__", "").rpartition(".")
    return file.removeprefix("test_") if package == SUITE else ""


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("--provider") is not None:
        _selection(session.config)  # a wrong name ends the run before anything is collected


def pytest_unconfigure(config: pytest.Config) -> None:
    if _SELECTION in config.stash:
        config.stash[_SELECTION].close()


def _selection(config: pytest.Config) -> Selection:
    from llorch.providers.conformance.selection import Selection

    if _SELECTION not in config.stash:
        config.stash[_SELECTION] = Selection(config.getoption("--provider") or DEFAULT)
    return config.stash[_SELECTION]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider_name" not in metafunc.fixturenames:
        return
    selection = _selection(metafunc.config)
    typed = [name for name in _TYPED if name in metafunc.fixturenames]
    if not typed:
        metafunc.parametrize("provider_name", selection.params(), scope="session")
        return
    params = selection.typed_params(*_TYPED[typed[0]])
    metafunc.parametrize(("provider_name", typed[0]), params, scope="session")


@pytest.fixture(scope="session")
def rig(provider_name: str, request: pytest.FixtureRequest) -> Rig:
    """One opened device of the provider, for the whole run."""
    return _selection(request.config).rig(provider_name)


@pytest.fixture(scope="session")
def provider(provider_name: str, request: pytest.FixtureRequest) -> Any:
    return _selection(request.config).provider(provider_name)


@pytest.fixture
def rng() -> np.random.Generator:
    import numpy as np

    return np.random.default_rng(7)
