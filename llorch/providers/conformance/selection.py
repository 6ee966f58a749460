"""Which providers a test run is about, and their devices, opened once."""

from __future__ import annotations

import fnmatch
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llorch.core.opening import open_device
from llorch.errors import BindError, LlorchError
from llorch.providers import registry
from llorch.providers.conformance.rig import Rig
from llorch.providers.device import Provider
from llorch.providers.spec import Use

EXPECTED_FAILURES = "conformance-xfail.txt"


@dataclass(frozen=True)
class ExpectedFailure:
    """A line of a provider's file of expected failures: a pattern of test names, and why."""

    pattern: str
    reason: str
    source: str  # file and line

    def matches(self, name: str) -> bool:
        # a test's parameters stand in brackets, which fnmatch would take for a set of characters
        return fnmatch.fnmatchcase(name, self.pattern.replace("[", "[[]"))


def expected_failures(module: str) -> list[ExpectedFailure]:
    """What `conformance-xfail.txt` beside a provider's top-level module says: `pattern  # reason` a line.

    Raises pytest.UsageError for a line without a reason.
    """
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is None or spec.origin is None:
        return []
    file = Path(spec.origin).parent / EXPECTED_FAILURES
    if not file.is_file():
        return []
    found = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        pattern, _, reason = (part.strip() for part in line.partition("#"))
        if not pattern:
            continue
        if not reason:
            raise pytest.UsageError(f"{file}, line {number}: {pattern!r} has no reason; write `pattern  # reason`")
        found.append(ExpectedFailure(pattern, reason, f"{EXPECTED_FAILURES}, line {number}"))
    return found


class Selection:
    """`wanted`: provider names between commas, or "all". Raises pytest.UsageError for what cannot be tested."""

    def __init__(self, wanted: str) -> None:
        self._rigs: dict[str, Rig] = {}
        self._providers: dict[str, Provider] = {}
        self._absent: dict[str, str] = {}
        self._failures: dict[str, list[ExpectedFailure]] = {}
        self._matched: set[ExpectedFailure] = set()
        if wanted == "all":
            self._take_all()
        else:
            for name in filter(None, (part.strip() for part in wanted.split(","))):
                self._take(name)

    def _take_all(self) -> None:
        for status in registry.status():
            if status.state == "broken":
                raise pytest.UsageError(f"provider {status.name} is broken: {status.reason}")
            if status.state == "absent":
                self._absent[status.name] = f"provider {status.name} has no device here: {status.reason}"
            else:
                self._take(status.name)

    def _take(self, name: str) -> None:
        try:
            provider = registry.load(name)
            provider.devices()
            registry.check_operations(provider)  # else every test would fail of it
        except LlorchError as error:
            raise pytest.UsageError(str(error)) from error
        self._providers[name] = provider

    def params(self) -> list[Any]:
        """One parameter a provider; those without a device are skipped with the reason."""
        return list(self._providers) + [
            pytest.param(name, marks=pytest.mark.skip(reason=reason)) for name, reason in self._absent.items()
        ]

    def typed_params(self, uses: tuple[Use, ...], kinds: tuple[str, ...] | None) -> list[Any]:
        """(provider, weight type) for every type, of these kinds, that the provider's device takes for all the uses."""
        found: list[Any] = []
        for name in self._providers:
            device = self.rig(name).device
            types = frozenset.intersection(*(frozenset(device.weight_types[use]) for use in uses))
            chosen = [kind for kind in sorted(types) if kinds is None or kind in kinds]
            found += [pytest.param(name, kind, id=f"{name}-{kind}") for kind in chosen]
        absent = self._absent.items()
        return found + [pytest.param(name, "", marks=pytest.mark.skip(reason=reason)) for name, reason in absent]

    def provider(self, name: str) -> Provider:
        return self._providers[name]

    def marks(self, name: str, test: str, needs: int) -> list[pytest.MarkDecorator]:
        """What a provider's age or its own file says of a test, which needs the contract's version `needs`."""
        provider = self._providers.get(name)
        if provider is None:  # it has no device: skipped already
            return []
        expected = [failure for failure in self._expected(name) if failure.matches(test)]
        self._matched.update(expected)
        if provider.api_version < needs:
            reason = f"the test needs provider API {needs}, {name} is built for {provider.api_version}"
            return [pytest.mark.skip(reason=reason)]
        return [pytest.mark.xfail(strict=True, reason=f"{failure.reason} ({failure.source})") for failure in expected]

    def check_expected_failures(self) -> None:
        """Raises pytest.UsageError for the lines of expected failures that no test seen by `marks` matches.

        A file that several providers share is looked at where all of them run.
        """
        lines = [
            f"provider {name}, {failure.source}: {failure.pattern!r} matches no test of the suite: remove the line"
            for name in self._providers
            if self._sharing(name) <= self._providers.keys()
            for failure in self._expected(name)
            if failure not in self._matched
        ]
        if lines:
            raise pytest.UsageError("\n".join(lines))

    def _sharing(self, name: str) -> set[str]:
        """The installed providers of its package, itself among them."""
        packages = {other: entries[0].module.partition(".")[0] for other, entries in registry.installed().items()}
        return {other for other, package in packages.items() if package == packages[name]}

    def _expected(self, name: str) -> list[ExpectedFailure]:
        if name not in self._failures:
            (entry,) = registry.installed()[name]
            self._failures[name] = expected_failures(entry.module)
        return self._failures[name]

    def rig(self, name: str) -> Rig:
        if name not in self._rigs:
            provider = self._providers[name]
            try:
                self._rigs[name] = Rig(provider, open_device(provider))
            except BindError as error:  # what it declares is wrong: one error, and no test
                raise pytest.UsageError(str(error)) from error
        return self._rigs[name]

    def close(self) -> None:
        for rig in self._rigs.values():
            rig.device.close()
