"""`llorch new-provider NAME`: writes a provider's distribution that passes the conformance suite at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from pydantic import Field
from pydantic_settings import CliPositionalArg

from llorch import __version__
from llorch.commands._terminal import console
from llorch.errors import SettingsError
from llorch.settings import CommandSettings, parse

TEMPLATE = "new_provider_template"
SUFFIX = ".tmpl"
PREFIX = "llorch-provider-"
LONGEST = 40
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_RESERVED = {
    "auto": "means the best that works",
    "all": "means every one under pytest --provider",
    "faulty": "is what llorch's own tests call one",
}


class NewProviderSettings(CommandSettings):
    """Write a new provider's package: it passes the conformance suite, and is made yours operation by operation."""

    name: CliPositionalArg[str] = Field(description="name of the provider, as in --provider NAME", examples=["acme"])
    path: Path = Field(Path(), description="folder to write the package's folder into")


def main(argv: Sequence[str]) -> int:
    settings = parse(NewProviderSettings, argv, "llorch new-provider")
    check_name(settings.name)
    folder = write(settings.name, settings.path)
    shown = f"./{folder}" if not folder.is_absolute() else str(folder)
    console().print(
        f"wrote {shown}: the provider {settings.name!r}, which computes with NumPy until you replace it\n"
        f"next:\n"
        f"  pip install -e {shown}\n"
        f"  pytest --pyargs llorch.providers.conformance --provider {settings.name}",
        soft_wrap=True,
    )
    return 0


def check_name(name: str) -> None:
    """Raises SettingsError for what cannot be both a provider's name and part of a distribution's."""
    if not _NAME.fullmatch(name) or len(name) > LONGEST:
        close = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:LONGEST].rstrip("-")
        hint = f"; did you mean {close}?" if close else ""
        raise SettingsError(
            f"NAME: expected lower-case letters, digits and single hyphens between them, at most {LONGEST}, "
            f"not {name!r}{hint}"
        )
    if name.startswith(PREFIX):
        raise SettingsError(f"NAME: expected the provider's name alone, {name.removeprefix(PREFIX)!r}, not {name!r}")
    if name in _RESERVED:
        raise SettingsError(f"NAME: {name!r} {_RESERVED[name]}, so no provider can have it: choose another")
    from llorch.providers import registry  # after parsing: --help and a mistake need no NumPy

    if name in registry.installed():
        raise SettingsError(
            f"NAME: a provider {name!r} is installed already, see `llorch providers`: choose another name"
        )


def write(name: str, where: Path) -> Path:
    """Writes the package for a checked name into a new folder below `where`, and returns that folder.

    Raises SettingsError where it exists already, or cannot be made.
    """
    from llorch.providers import API_VERSION

    folder, package = where / f"{PREFIX}{name}", f"llorch_provider_{name.replace('-', '_')}"
    major, minor = (int(part) for part in __version__.split(".")[:2])
    words = {
        "name": name,
        "package": package,
        "version": f"{major}.{minor}",
        "next_version": f"{major}.{minor + 1}",
        "api_version": str(API_VERSION),
    }
    try:
        folder.mkdir(parents=True)
        for parts, text in _templates(files("llorch.commands").joinpath(TEMPLATE)):
            path = folder.joinpath(*(part.replace("package", package) for part in parts))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template(text).substitute(words), "utf-8")
    except FileExistsError as error:
        raise SettingsError(f"{folder} exists already: remove it, or give another place with --path") from error
    except OSError as error:
        raise SettingsError(f"{folder} cannot be written: {error.strerror}; give another place with --path") from error
    return folder


def _templates(folder: Traversable, parts: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path below the package's folder, text) of every file of the template."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _templates(entry, (*parts, entry.name))
        elif entry.name.endswith(SUFFIX):
            yield (*parts, entry.name.removesuffix(SUFFIX)), entry.read_text("utf-8")
