"""A provider's operations as a pluggy plugin: checked against the contract before anything is bound."""

from __future__ import annotations

import pluggy

from llorch.errors import BindError
from llorch.providers.spec import OPTIONAL, REQUIRED, LayerOps


def register(operations: object, provider: str) -> pluggy.PluginManager:
    """A manager that holds the operations. Raises BindError for a hook or an argument that the contract has not."""
    manager = pluggy.PluginManager("llorch")
    manager.add_hookspecs(LayerOps)
    try:
        manager.register(operations, name=provider)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise BindError(
            f"provider {provider}: {' '.join(str(error).split())}; the operations are "
            f"{', '.join(REQUIRED + OPTIONAL)} (mark one that this llorch may not know with optionalhook=True)"
        ) from error
    return manager


def missing(manager: pluggy.PluginManager) -> list[str]:
    """Required operations without a factory: whatever the model, they will be declined."""
    return [name for name in REQUIRED if not getattr(manager.hook, name).get_hookimpls()]
