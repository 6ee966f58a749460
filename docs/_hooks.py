"""What `mkdocs build` puts into the pages: the table of settings, from the settings themselves."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llorch.http.settings import ServeSettings

MARK = "<!-- settings -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, settings_table()) if MARK in markdown else markdown


def settings_table() -> str:
    """Every setting of `llorch serve` as a Markdown table: option, default, meaning."""
    rows = ["| option | default | |", "|---|---|---|"]
    for name, field in ServeSettings.model_fields.items():
        option = str(field.validation_alias or name).replace("_", "-")
        rows.append(f"| `--{option}` | {_default(field)} | {field.description}{_choices(field)} |")
    return "\n".join(rows)


def _default(field: FieldInfo) -> str:
    return "" if field.default in (None, PydanticUndefined) else f"`{field.default}`"


def _choices(field: FieldInfo) -> str:
    for kind in (field.annotation, *get_args(field.annotation)):
        if get_origin(kind) is Literal:
            return f" ({', '.join(f'`{choice}`' for choice in get_args(kind))})"
    return ""
