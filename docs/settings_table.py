"""The settings of `llorch serve` as a table: `python docs/settings_table.py` writes it into serving.md."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llorch.demo import DEMO_MODEL
from llorch.http.settings import ServeSettings

PAGE = Path(__file__).parent / "serving.md"
BEGIN, END = "<!-- settings, from the code: python docs/settings_table.py -->\n", "<!-- end of settings -->\n"


def table() -> str:
    rows = [_row(name, field) for name, field in ServeSettings.model_fields.items()]
    return "".join(["| option | default | |\n|---|---|---|\n", *rows])


def _row(name: str, field: FieldInfo) -> str:
    option = f"--{name.replace('_', '-')}"
    choices = _choices(field.annotation)
    values = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    sentence = (field.description or "").strip()
    return f"| `{option}` | {_default(field)} | {sentence[:1].upper()}{sentence[1:]}.{values} |\n"


def _choices(annotation: object) -> tuple[str, ...]:
    """The values of a Literal, also within a union."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for part in get_args(annotation) if (found := _choices(part))), ())


def _default(field: FieldInfo) -> str:
    if field.default in (None, False, [], PydanticUndefined):
        return ""
    return "the demo model" if field.default == DEMO_MODEL else f"`{field.default}`"


def written(page: str) -> str:
    """The page with the table as the code has it."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
