"""What the log says of a start: the settings, the load's progress, and what is served."""

from __future__ import annotations

from typing import Any

import structlog
from pydantic import SecretStr

from llorch import __version__
from llorch.core.llm import LLM
from llorch.http.callback import shown_url
from llorch.http.settings import ServeSettings

log = structlog.stdlib.get_logger(__name__)

PROGRESS_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)


def log_settings(settings: ServeSettings) -> None:
    """Which llorch.toml was read, and what is not the default. Secrets do not appear, those in URLs neither."""
    changed = {
        name: _shown(value)
        for name in sorted(settings.model_fields_set)
        if (value := getattr(settings, name)) != type(settings).model_fields[name].default
    }
    file = None if settings.file is None else str(settings.file.absolute())
    log.info("settings", version=__version__, file=file, changed=changed)


def _shown(value: object) -> Any:
    if isinstance(value, SecretStr):
        return "(secret)"
    if isinstance(value, str) and "://" in value:
        return shown_url(value)
    return value if isinstance(value, bool | int | float | None) else str(value)


class LoadReport:
    """Logs a load's progress, a line at each quarter."""

    def __init__(self, model: str, uri: str) -> None:
        self._model, self._uri = model, uri
        self._due = list(PROGRESS_STEPS)

    def __call__(self, fraction: float, text: str) -> None:
        while self._due and fraction >= self._due[0]:
            step = self._due.pop(0)
            log.info("loading", percent=round(100 * step), model=self._model, uri=self._uri, doing=text)


def served(llm: LLM) -> dict[str, Any]:
    """What the sentences of a start say, for programs."""
    return {
        "model": llm.config.name,
        "provider": llm.provider_name,
        "device": llm.device_info.name,
        "quant_kind": llm.quant_kind,
        "cache_type": llm.cache_type,
        "context": llm.context,
        "parallel": llm.limits.max_sequences,
        "device_bytes": llm.device_bytes,
    }
