"""Opens a provider's device, and checks what it declares before anything relies on it."""

from __future__ import annotations

import difflib
from collections.abc import Set
from typing import Any, get_args

import gguf

from llorch.errors import BindError
from llorch.providers.device import Device, DeviceOptions, Provider
from llorch.providers.spec import Use

USES: tuple[str, ...] = get_args(Use)


def open_device(provider: Provider, name: str | None = None, options: DeviceOptions | None = None) -> Device:
    """The provider's device of that name, its best by default.

    Raises BindError where its `weight_types` lacks a use or names a GGML type that there is not; what `Provider.open`
    raises passes.
    """
    device = provider.open(name, options)
    if wrong := _wrong(device.weight_types):
        device.close()
        raise BindError(f"provider {provider.name}: weight_types of its device {device.info.name} {wrong}")
    return device


def _wrong(weight_types: object) -> str | None:
    if not hasattr(weight_types, "keys"):
        return f"is a {type(weight_types).__name__}, expected a mapping of {', '.join(USES)} to sets of GGML types"
    declared: dict[Any, Any] = dict(weight_types)  # type: ignore[call-overload]
    known = gguf.GGMLQuantizationType.__members__
    for use in USES:
        if use not in declared:
            others = f"; it has {', '.join(map(repr, declared))}" if declared else ""
            return f"has no key {use!r}, for the types that it takes as {use}{others}"
        types = declared[use]
        if not isinstance(types, Set):
            return f"has {types!r} under {use!r}, expected a set of GGML type names"
        if unknown := sorted(str(kind) for kind in types if kind not in known):
            written = unknown[0].upper().replace("O", "0")  # the letter is in no type's name
            close = difflib.get_close_matches(written, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
            return f"has {unknown[0]!r} under {use!r}, which is no GGML type{hint}"
    return None
