"""Finds the installed providers: entry points of the group `llorch.providers`, by name, imported when asked for.

A provider that cannot be used keeps its reason. It never hides the others.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from llorch import __version__
from llorch.errors import BindError, ProviderUnavailableError, UnknownProviderError
from llorch.providers.device import DeviceInfo, Provider
from llorch.providers.hooks import missing, register
from llorch.providers.spec import ACCEPTED_API_VERSIONS

GROUP = "llorch.providers"
TESTING_GROUP = "llorch.providers.testing"  # to be named, never listed or chosen: providers that tests need

_ATTRIBUTES: dict[str, type] = {
    "name": str,
    "summary": str,
    "requires": str,
    "priority": int,
    "batch_invariant": bool,
}
_METHODS = ("devices", "open", "operations")


@dataclass(frozen=True, kw_only=True)
class ProviderStatus:
    """One provider name as it stands here. What a broken one cannot tell is None."""

    name: str
    distribution: str  # where several offer the name: all of them, "a, b"
    version: str
    state: Literal["ok", "absent", "broken"]  # absent: in order, but without a device here
    reason: str | None = None  # where not ok: why, and the next command
    devices: tuple[DeviceInfo, ...] = ()
    summary: str | None = None
    requires: str | None = None
    api_version: int | None = None
    priority: int | None = None
    batch_invariant: bool | None = None


def installed(group: str = GROUP) -> dict[str, list[EntryPoint]]:
    """The entry points by provider name, sorted. Imports nothing; more than one of a name is a conflict."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in sorted(entry_points(group=group), key=lambda e: (e.name, _distribution(e))):
        found.setdefault(entry.name, []).append(entry)
    return found


def load(name: str) -> Provider:
    """Imports a provider; does not look for its devices.

    Raises UnknownProviderError where none is installed under that name, ProviderUnavailableError where it cannot be
    imported, is of another API version, is no provider, or where two distributions offer it.
    """
    found = installed()
    entries = found.get(name) or installed(TESTING_GROUP).get(name)
    if entries is None:
        raise UnknownProviderError(_unknown(name, list(found)))
    return _load(name, entries)


def choose(name: str) -> tuple[Provider, str]:
    """A provider that has a device, and why it is this one.

    A name gives that provider or its error, never another. "auto" gives the one of highest priority that works;
    where none does, the error lists every reason.
    """
    if name != "auto":
        provider = load(name)
        try:
            _devices(provider)
        except ProviderUnavailableError as error:
            raise ProviderUnavailableError(f"provider {name!r}: {error}") from error
        return provider, "chosen by name"
    passed_over: list[str] = []
    for candidate in _by_priority(passed_over):
        try:
            _devices(candidate)
        except ProviderUnavailableError as error:
            passed_over.append(f"{candidate.name}: {error}")
            continue
        skipped = "; ".join(reason.splitlines()[0] for reason in passed_over)
        why = f"auto, the highest priority that works ({candidate.priority})"
        return candidate, f"{why}; passed over {skipped}" if skipped else why
    raise ProviderUnavailableError("\n".join(["no provider works here", *(f"  {reason}" for reason in passed_over)]))


def status() -> list[ProviderStatus]:
    """Every installed provider, highest priority first, broken ones last. Looks for devices, so it may take a while."""
    found = [_status(name, entries) for name, entries in installed().items()]
    return sorted(found, key=lambda s: (s.priority is None, -(s.priority or 0), s.name))


def _by_priority(passed_over: list[str]) -> list[Provider]:
    """All that load, highest priority first; the reasons of the others go to `passed_over`."""
    loaded: list[Provider] = []
    for name, entries in installed().items():
        try:
            loaded.append(_load(name, entries))
        except ProviderUnavailableError as error:
            passed_over.append(str(error))
    return sorted(loaded, key=lambda provider: -provider.priority)


def _status(name: str, entries: Sequence[EntryPoint]) -> ProviderStatus:
    distributions = [_distribution(entry) for entry in entries]
    origin: dict[str, Any] = {
        "name": name,
        "distribution": ", ".join(distribution for distribution, _ in distributions),
        "version": ", ".join(version for _, version in distributions),
    }
    try:
        provider = _load(name, entries)
    except ProviderUnavailableError as error:
        return ProviderStatus(**origin, state="broken", reason=str(error))
    described: dict[str, Any] = {attribute: getattr(provider, attribute) for attribute in _ATTRIBUTES}
    described |= origin | {"api_version": provider.api_version}
    try:
        devices = _devices(provider)
        check_operations(provider)
        return ProviderStatus(**described, state="ok", devices=devices)
    except _BrokenError as error:
        return ProviderStatus(**described, state="broken", reason=str(error))
    except ProviderUnavailableError as error:
        return ProviderStatus(**described, state="absent", reason=str(error))


# ---- one provider ----


class _BrokenError(ProviderUnavailableError):
    """The provider's own mistake, not a lack of hardware."""


def _load(name: str, entries: Sequence[EntryPoint]) -> Provider:
    who = f"provider {name!r} ({_described(entries)})"
    if len(entries) > 1:
        raise _BrokenError(_conflict(name, entries))
    entry = entries[0]
    distribution, _ = _distribution(entry)
    try:
        provider = entry.load()
    except (Exception, SystemExit) as error:
        raise _BrokenError(
            f"{who} cannot be imported: {_reason(error)}{_place(error, entry.module)}. Its entry point is "
            f"{entry.value!r}; {_remedy(entry)}, or uninstall it"
        ) from error
    _check_version(who, distribution, provider)
    try:
        wrong = _malformed(name, provider)
    except Exception as error:
        raise _BrokenError(f"{who}: reading its attributes failed: {_reason(error)}") from error
    if wrong:
        raise _BrokenError(f"{who}: {entry.value!r} is no provider: {wrong}. Tell its author, or uninstall it")
    loaded: Provider = provider
    return loaded


def _check_version(who: str, distribution: str, provider: Any) -> None:
    """First of all checks: under another version everything else may look different."""
    version = getattr(provider, "api_version", None)
    accepted = ACCEPTED_API_VERSIONS
    if not isinstance(version, int) or version in accepted:
        return  # where it is missing, the next check says so
    outdated = distribution if version < accepted.start else "llorch"
    raise _BrokenError(
        f"{who} is built for provider API {version}, llorch {__version__} accepts {accepted.start} to "
        f"{accepted.stop - 1}: `pip install --upgrade {outdated}`"
    )


def _malformed(name: str, provider: Any) -> str | None:
    if isinstance(provider, type):
        return f"it is the class {provider.__name__}, not an object of it"
    for attribute, kind in {"api_version": int, **_ATTRIBUTES}.items():
        value = getattr(provider, attribute, None)
        if value is None:
            return f"the attribute {attribute!r} is missing"
        if not isinstance(value, kind):
            return f"{attribute} is {value!r}, expected {kind.__name__}"
    for method in _METHODS:
        if not callable(getattr(provider, method, None)):
            return f"the method {method}() is missing"
    return None if provider.name == name else f"it calls itself {provider.name!r}, its entry point {name!r}"


def check_operations(provider: Provider) -> None:
    """Raises ProviderUnavailableError for what would fail at every load.

    That is a misspelt hook or argument, an operation without its marker, a required one that is not there.
    """
    try:
        absent = missing(register(provider.operations(), provider.name))
    except BindError as error:
        raise _BrokenError(str(error)) from error
    except (Exception, SystemExit) as error:
        raise _BrokenError(f"provider {provider.name}: operations() failed: {_reason(error)}") from error
    if absent:
        raise _BrokenError(f"provider {provider.name} has no factory for {', '.join(absent)}, which every model needs")


def _devices(provider: Provider) -> tuple[DeviceInfo, ...]:
    """The provider's devices, at least one. Raises ProviderUnavailableError."""
    try:
        devices = tuple(provider.devices())
    except ProviderUnavailableError:
        raise
    except (Exception, SystemExit) as error:
        raise _BrokenError(
            f"failed while it looked for devices: {_reason(error)}{_place(error, type(provider).__module__)}"
        ) from error
    if wrong := [device for device in devices if not isinstance(device, DeviceInfo)]:
        raise _BrokenError(f"devices() gave {wrong[0]!r}, expected DeviceInfo. Tell its author, or uninstall it")
    if not devices:
        raise ProviderUnavailableError(f"found no device; it needs {provider.requires}")
    return devices


# ---- words ----


def _distribution(entry: EntryPoint) -> tuple[str, str]:
    """(name, version); damaged metadata may lack them."""
    if entry.dist is None:
        return "unknown distribution", "unknown version"
    metadata = entry.dist.metadata
    return metadata["Name"] or "unknown distribution", metadata["Version"] or "unknown version"


def _described(entries: Sequence[EntryPoint]) -> str:
    return ", ".join(f"{distribution} {version}" for distribution, version in map(_distribution, entries))


def _conflict(name: str, entries: Sequence[EntryPoint]) -> str:
    distributions = dict.fromkeys(distribution for distribution, _ in map(_distribution, entries))
    uninstall = " or ".join(f"`pip uninstall {distribution}`" for distribution in distributions)
    return f"provider {name!r} is offered {len(entries)} times, by {_described(entries)}; none is used: {uninstall}"


def _unknown(name: str, found: list[str]) -> str:
    close = difflib.get_close_matches(name, ["auto", *found], n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return (
        f"no provider {name!r} is installed.{hint} Installed: {', '.join(found) or 'none'}; "
        "others come with `pip install llorch-provider-...`"
    )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _place(error: BaseException, module: str) -> str:
    """` at FILE:LINE` of a provider's own code, the innermost, or nothing where the error is not of its making."""
    try:
        top = importlib.util.find_spec(module.partition(".")[0])
    except ValueError:  # a module that was made by hand, which is nowhere
        return ""
    if top is None or top.origin is None:
        return ""
    own = Path(top.origin).parent if top.submodule_search_locations else Path(top.origin)
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename is not None:
        places.append((error.filename, error.lineno or 1))
    inside = [f"{file}:{line}" for file, line in places if Path(file).is_relative_to(own)]
    return f" at {inside[-1]}" if inside else ""


def _remedy(entry: EntryPoint) -> str:
    distribution, _ = _distribution(entry)
    if _editable(entry):
        return f"{distribution} is installed editable: mend it there"
    return f"try `pip install --upgrade --force-reinstall {distribution}`"


def _editable(entry: EntryPoint) -> bool:
    """Whether pip installed the distribution with -e: https://packaging.python.org/specifications/direct-url/."""
    text = entry.dist.read_text("direct_url.json") if entry.dist is not None else None
    try:
        return bool(text and json.loads(text)["dir_info"]["editable"])
    except (ValueError, KeyError, TypeError):  # a URL of another kind, or damaged metadata
        return False
