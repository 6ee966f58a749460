"""Discovery of providers, over real distributions on a temporary path."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from llorch.errors import ProviderUnavailableError, UnknownProviderError
from llorch.providers import API_VERSION, registry
from llorch.providers.registry import ProviderStatus
from tests.unit.plugins import install, source

ABSENT = "raise ProviderUnavailableError('no ACME card found: check `acme-info`')"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for module in set(sys.modules) - before:
        if module.startswith(("llorch_provider_", "acme_")):
            del sys.modules[module]


def status_of(name: str) -> ProviderStatus:
    (found,) = (status for status in registry.status() if status.name == name)
    return found


# ---- states ----


def test_numpy_cpu_is_found_through_its_entry_point() -> None:
    (entry,) = registry.installed()["numpy-cpu"]
    assert entry.value == "llorch.providers.numpy_cpu:provider"
    assert status_of("numpy-cpu").state == "ok"


def test_listing_imports_nothing(site: Path) -> None:
    install(site, "lazy", "raise RuntimeError('imported')")
    assert "lazy" in registry.installed()
    assert "llorch_provider_lazy" not in sys.modules


def test_a_working_plugin_is_ok_and_loads(site: Path) -> None:
    install(site, "fast", source("fast", priority=7), version="2.3")
    assert registry.load("fast").name == "fast"
    status = status_of("fast")
    assert (status.state, status.reason) == ("ok", None)
    assert (status.distribution, status.version) == ("llorch-provider-fast", "2.3")
    assert (status.priority, status.api_version, status.batch_invariant) == (7, API_VERSION, True)
    assert [device.name for device in status.devices] == ["dev:0"]


def test_a_broken_import_keeps_its_reason(site: Path) -> None:
    install(site, "crashing", "import no_such_vendor_library", version="0.9")
    with pytest.raises(ProviderUnavailableError) as caught:
        registry.load("crashing")
    for part in ("ModuleNotFoundError: No module named 'no_such_vendor_library'", "llorch-provider-crashing 0.9"):
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert status_of("crashing").state == "broken"


BROKEN = {
    "a name": (
        "import os\n\n\ndef kernels():\n    return Nope\n\n\nkernels()\n",
        "NameError: name 'Nope' is not defined",
        5,
    ),
    "syntax": ("import os\nx = = 1\n", "SyntaxError: ", 2),
    "in a library": ("import json\n\njson.loads('{')\n", "JSONDecodeError: ", 3),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_import_says_in_which_line_of_the_plugin(site: Path, case: str) -> None:
    text, reason, line = BROKEN[case]
    install(site, "crashing", text)
    with pytest.raises(ProviderUnavailableError) as caught:
        registry.load("crashing")
    assert reason in str(caught.value)
    assert f" at {site / 'llorch_provider_crashing.py'}:{line}. Its entry point" in str(caught.value)
    assert "pip install --upgrade --force-reinstall llorch-provider-crashing" in str(caught.value)


def test_an_editable_plugin_that_cannot_be_imported_is_to_be_mended_not_installed_again(site: Path) -> None:
    install(site, "crashing", "Nope")
    record = site / "llorch_provider_crashing-1.0.dist-info" / "direct_url.json"
    record.write_text('{"url": "file:///somewhere", "dir_info": {"editable": true}}')
    with pytest.raises(ProviderUnavailableError, match="installed editable: mend it there, or uninstall") as caught:
        registry.load("crashing")
    assert "reinstall" not in str(caught.value)
    record.write_text('{"url": "https://somewhere", "archive_info": {}}')
    with pytest.raises(ProviderUnavailableError, match="--force-reinstall"):
        registry.load("crashing")


def test_devices_that_raise_say_in_which_line_of_the_plugin(site: Path) -> None:
    install(site, "acme", source("acme", devices="return [Nope]"))
    with pytest.raises(ProviderUnavailableError, match=r"name 'Nope' is not defined at .*llorch_provider_acme\.py:13$"):
        registry.choose("acme")


def test_a_plugin_that_exits_on_import_is_only_broken(site: Path) -> None:
    install(site, "quitting", "raise SystemExit('licence expired')")
    status = status_of("quitting")
    assert status.state == "broken"
    assert "SystemExit: licence expired" in (status.reason or "")


def test_an_entry_point_that_names_nothing_is_broken(site: Path) -> None:
    install(site, "empty", source("empty"), target="no_such_object")
    assert "no_such_object" in (status_of("empty").reason or "")


@pytest.mark.parametrize(
    ("version", "outdated"), [(API_VERSION + 1, "llorch"), (0, "llorch-provider-other")], ids=["newer", "older"]
)
def test_another_api_version_names_both_numbers_and_what_to_upgrade(site: Path, version: int, outdated: str) -> None:
    # built for another API, it may lack what this one asks for: the version is what must be reported
    install(site, "other", f"class P:\n    api_version = {version}\n\nprovider = P()\n")
    with pytest.raises(ProviderUnavailableError) as caught:
        registry.load("other")
    assert f"provider API {version}, llorch" in str(caught.value)
    assert f"accepts 1 to {API_VERSION}" in str(caught.value)
    assert f"`pip install --upgrade {outdated}`" in str(caught.value)
    assert status_of("other").state == "broken"


def test_two_distributions_of_one_name_are_both_refused(site: Path) -> None:
    install(site, "twin", source("twin"), distribution="acme-one", version="1.0")
    install(site, "twin", source("twin"), distribution="acme-two", version="2.0")
    with pytest.raises(ProviderUnavailableError) as caught:
        registry.load("twin")
    for part in ("acme-one 1.0", "acme-two 2.0", "`pip uninstall acme-one`", "`pip uninstall acme-two`"):
        assert part in str(caught.value)
    status = status_of("twin")
    assert (status.state, status.distribution, status.version) == ("broken", "acme-one, acme-two", "1.0, 2.0")
    assert not {"acme_one", "acme_two"} & set(sys.modules)


@pytest.mark.parametrize(
    ("module", "wrong"),
    [
        (source("odd").replace("priority = 10", "pass"), "the attribute 'priority' is missing"),
        (source("odd").replace("api_version = 1", "pass"), "the attribute 'api_version' is missing"),
        (source("odd").replace("priority = 10", "priority = 'high'"), "priority is 'high', expected int"),
        (source("odd").replace("def open", "def open_it"), "the method open() is missing"),
        (source("even"), "it calls itself 'even', its entry point 'odd'"),
        (source("odd").replace("provider = Provider()", "provider = Provider"), "it is the class Provider"),
        ("provider = None", "the attribute 'api_version' is missing"),
        (source("odd").replace("summary = ", "summary = property(lambda self: 1 / 0) #"), "ZeroDivisionError"),
        (source("odd", devices="return ['gpu']"), "devices() gave 'gpu', expected DeviceInfo"),
        (source("odd", devices="return 1 / 0"), "ZeroDivisionError: division by zero"),
    ],
)
def test_a_malformed_provider_says_what_is_wrong(site: Path, module: str, wrong: str) -> None:
    install(site, "odd", module)
    status = status_of("odd")
    assert status.state == "broken"
    assert wrong in (status.reason or "")


def test_a_provider_without_its_hardware_is_absent(site: Path) -> None:
    install(site, "acme", source("acme", devices=ABSENT))
    status = status_of("acme")
    assert (status.state, status.reason) == ("absent", "no ACME card found: check `acme-info`")
    assert status.priority == 10  # what it can tell without a device is told


def test_a_provider_that_lists_no_device_is_absent(site: Path) -> None:
    install(site, "acme", source("acme", devices="return []"))
    status = status_of("acme")
    assert status.state == "absent"
    assert "found no device; it needs a test" in (status.reason or "")


def test_a_broken_plugin_does_not_hide_the_others(site: Path) -> None:
    install(site, "crashing", "1 / 0")
    install(site, "fast", source("fast"))
    states = {status.name: status.state for status in registry.status()}
    assert states["crashing"] == "broken"
    assert states["fast"] == states["numpy-cpu"] == "ok"


def test_an_unknown_name_gives_a_suggestion_and_the_installed_list() -> None:
    with pytest.raises(UnknownProviderError) as caught:
        registry.load("numpycpu")
    assert "no provider 'numpycpu' is installed. Did you mean numpy-cpu?" in str(caught.value)
    assert "pip install llorch-provider-" in str(caught.value)
    with pytest.raises(UnknownProviderError, match=r"Installed: .*numpy-cpu"):
        registry.load("zzz")


# ---- choice ----


def test_auto_takes_the_highest_priority_that_works(site: Path) -> None:
    install(site, "low", source("low", priority=1000))
    install(site, "high", source("high", priority=2000))
    provider, why = registry.choose("auto")
    assert provider.name == "high"
    assert "2000" in why
    assert "passed over" not in why


def test_auto_says_which_were_passed_over_and_why(site: Path) -> None:
    install(site, "acme", source("acme", priority=3000, devices=ABSENT))
    install(site, "crashing", "1 / 0")
    install(site, "high", source("high", priority=2000))
    install(site, "low", source("low", priority=1000, devices="raise ProviderUnavailableError('never asked')"))
    provider, why = registry.choose("auto")
    assert provider.name == "high"
    assert "acme: no ACME card found" in why
    assert "provider 'crashing' (llorch-provider-crashing 1.0) cannot be imported: ZeroDivisionError" in why
    assert "never asked" not in why


def test_auto_lists_every_reason_where_none_works(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "acme", source("acme", devices=ABSENT))
    install(site, "crashing", "1 / 0")
    monkeypatch.setattr(sys, "path", [str(site), sysconfig.get_path("stdlib")])  # without numpy-cpu
    with pytest.raises(ProviderUnavailableError) as caught:
        registry.choose("auto")
    assert "no ACME card found" in str(caught.value)
    assert "ZeroDivisionError" in str(caught.value)


def test_a_named_provider_without_a_device_is_an_error_not_a_fallback(site: Path) -> None:
    install(site, "acme", source("acme", devices=ABSENT))
    with pytest.raises(ProviderUnavailableError, match="provider 'acme': no ACME card found"):
        registry.choose("acme")


def test_a_named_provider_is_chosen_whatever_its_priority(site: Path) -> None:
    install(site, "high", source("high", priority=2000))
    provider, why = registry.choose("numpy-cpu")
    assert (provider.name, why) == ("numpy-cpu", "chosen by name")


# ---- operations that would fail at every load ----

OPERATIONS = {
    "a misspelt hook": ("matmul_grop", "broken", r"matmul_grop.*did you mean matmul_group\? the operations are embed"),
    "nothing but a right hook": ("matmul", "broken", "no factory for embed, rmsnorm, rope, attention"),
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_operations_that_no_model_could_use_are_a_broken_state(site, case) -> None:
    hook, state, reason = OPERATIONS[case]
    text = source("acme").replace(
        "        from llorch.providers.numpy_cpu import NumpyOps\n\n        return NumpyOps()\n",
        "        return Ops()\n",
    )
    ops = "from llorch.providers import hookimpl\n\nclass Ops:\n    @hookimpl\n"
    ops += f"    def {hook}(self, spec):\n        return None\n"
    assert "return Ops()" in text
    install(site, "acme", ops + text)
    (status,) = (status for status in registry.status() if status.name == "acme")
    assert status.state == state
    assert re.search(reason, status.reason or "")
