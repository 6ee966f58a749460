"""A provider's operations as a pluggy plugin: checked against the contract before anything is bound."""

from __future__ import annotations

import difflib

import pluggy

from llorch.errors import BindError
from llorch.providers.spec import OPTIONAL, REQUIRED, LayerOps

OPERATIONS = REQUIRED + OPTIONAL


def register(operations: object, provider: str) -> pluggy.PluginManager:
    """A manager that holds the operations.

    Raises BindError for a hook or an argument that the contract has not, and for an operation without the marker.
    """
    manager = pluggy.PluginManager("llorch")
    manager.add_hookspecs(LayerOps)
    try:
        manager.register(operations, name=provider)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        hint = _did_you_mean(manager, operations)
        raise BindError(
            f"provider {provider}: {' '.join(str(error).split())};{hint} the operations are "
            f"{', '.join(OPERATIONS)} (mark one that this llorch may not know with optionalhook=True)"
        ) from error
    if unmarked := [name for name in OPERATIONS if _is_unmarked(operations, name)]:
        # pluggy passes over it: an optional operation would be decomposed and nobody the wiser
        raise BindError(
            f"provider {provider}: {', '.join(unmarked)} without @hookimpl would never be asked: "
            "mark it as a factory, or name it otherwise"
        )
    return manager


def missing(manager: pluggy.PluginManager) -> list[str]:
    """Required operations without a factory: whatever the model, they will be declined."""
    return [name for name in REQUIRED if not getattr(manager.hook, name).get_hookimpls()]


def _did_you_mean(manager: pluggy.PluginManager, operations: object) -> str:
    """The operations whose names are close to those that the contract has not, or ""."""
    unknown = [hook.name for hook in manager.get_hookcallers(operations) or () if not hook.has_spec()]
    close = [match for name in unknown for match in difflib.get_close_matches(name, OPERATIONS, n=1)]
    return f" did you mean {', '.join(close)}?" if close else ""


def _is_unmarked(operations: object, name: str) -> bool:
    factory = getattr(operations, name, None)  # None: an inherited operation that is taken back
    return callable(factory) and not hasattr(factory, "llorch_impl")
