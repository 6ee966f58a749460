"""Models of the Hugging Face Hub: `hf:OWNER/REPO`, and `:FILE` or `:QUANT` behind it where the repository has several.

`huggingface_hub` downloads, goes on where a connection breaks, and keeps the cache; its variables (HF_ENDPOINT,
HF_HOME, HF_TOKEN, HF_HUB_OFFLINE) mean here what they mean there. It is imported when a model of the hub is named, not
before.
"""

from __future__ import annotations

import io
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llorch.core.model_files import choices, parts_of
from llorch.errors import ModelError

log = logging.getLogger(__name__)

PREFIX = "hf:"
# Taken in this order where nothing is named: the first is what most repositories recommend.
DEFAULT_QUANTS = ("Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0", "Q3_K_M", "F16", "BF16")
_REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<wanted>.+))?")
ASK_SECONDS = 10.0
_LISTED = 30
_MEBIBYTE, _GIBIBYTE = 2**20, 2**30

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class HubModel:
    """What a user wrote behind `hf:`."""

    repo: str
    wanted: str | None  # a file's name, or a quantisation's

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f":{self.wanted}" if self.wanted else "")


def reference(model: str | os.PathLike[str]) -> HubModel | None:
    """The model of the hub that is named; None for a path. Raises ModelError where the name cannot be one."""
    text = Path(model).as_posix()
    if not text.startswith(PREFIX):
        return None
    found = _REFERENCE.fullmatch(text.removeprefix(PREFIX))
    if found is None:
        raise ModelError(f"{text}: expected hf:OWNER/REPO, hf:OWNER/REPO:FILE or hf:OWNER/REPO:QUANT (such as Q4_K_M)")
    return HubModel(found["repo"], found["wanted"])


def fetch(model: HubModel, progress: Progress = lambda _fraction, _text: None) -> Path:
    """The path of the model's file, its first part where it is split; downloads what the cache lacks, and no more.

    `progress` gets the share of the bytes and what is downloaded, only where something is. Raises ModelError: no such
    repository or file, no access, several files that could be meant, a download that broke off, no network and no copy.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # with it huggingface_hub asks the hub for more than a model
    try:
        sizes = _listed(model)
    except _UnreachableError as error:
        return _cached(model, error)
    names = _with_parts(model, chosen(model, list(sizes)), sizes)
    bar = _Bar(progress, sum(sizes[name] for name in names))
    paths = [_download(model, name, bar) for name in names]
    return paths[0]


# ---- which file ----


def chosen(model: HubModel, names: Sequence[str]) -> str:
    """The file that is meant among those of the repository: a split model by its first part. Raises ModelError."""
    models = [path.as_posix() for path in choices([PurePosixPath(n) for n in names if n.endswith(".gguf")])]
    if not models:
        some = f"; it has {_enumerated(names)}" if names else ""
        raise ModelError(f"{model}: the repository holds no .gguf model{some}: name one with models in GGUF format")
    if model.wanted is None:
        return _default(model, sorted(models))
    if model.wanted in names:
        return model.wanted
    found = sorted(name for name in models if PurePosixPath(name).name == model.wanted or _is(name, model.wanted))
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(f"{model}: {len(found)} files are {model.wanted}; name one: {_suggested(model, found)}")
    raise ModelError(f"{model}: no file of the repository is {model.wanted}; name one: {_suggested(model, models)}")


def _is(name: str, quant: str) -> bool:
    """Whether a file name says this quantisation. Q4_K is none of Q4_K_M and IQ4_K."""
    return re.search(rf"(?<![^\W_]){re.escape(quant)}(?!\w)", name.removesuffix(".gguf"), re.IGNORECASE) is not None


def _default(model: HubModel, models: Sequence[str]) -> str:
    if len(models) == 1:
        return models[0]
    for quant in DEFAULT_QUANTS:
        found = [name for name in models if _is(name, quant)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ModelError(f"{model}: {len(found)} files are {quant}; name one: {_suggested(model, found)}")
    raise ModelError(f"{model}: the repository holds {len(models)} models; name one: {_suggested(model, models)}")


def _with_parts(model: HubModel, name: str, sizes: Mapping[str, int]) -> list[str]:
    folder = name[: name.rfind("/") + 1]
    names = [folder + part for part in parts_of(name.removeprefix(folder))]
    if missing := [part for part in names if part not in sizes]:
        raise ModelError(
            f"{model}: {len(missing)} of the {len(names)} parts of this model are not in the repository: "
            f"{_enumerated(missing)}; name another file"
        )
    return names


def _suggested(model: HubModel, names: Sequence[str]) -> str:
    return _enumerated([f"{PREFIX}{model.repo}:{name}" for name in names])


def _enumerated(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return ", ".join([*names[:_LISTED], *more])


# ---- the hub ----


class _UnreachableError(Exception):
    """The hub does not answer, or is not to be asked; the message says what was tried."""


def _listed(model: HubModel) -> dict[str, int]:
    """The repository's files and their bytes. Raises ModelError, or _UnreachableError."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        # asked once: the calls that list a tree would try for half a minute before the cache is looked into
        found = HfApi().model_info(model.repo, files_metadata=True, timeout=ASK_SECONDS)
        return {file.rfilename: file.size or 0 for file in found.siblings or ()}
    except OfflineModeIsEnabled:
        raise _UnreachableError("HF_HUB_OFFLINE is set, so that nothing was asked") from None
    except HfHubHTTPError as error:
        if error.response.status_code >= 500:
            raise _UnreachableError(f"{constants.ENDPOINT} answers {error.response.status_code}") from error
        raise _refused(model, error) from error
    except ValueError as error:  # a name that the hub would not take, an answer that is no JSON
        raise ModelError(f"{model}: {constants.ENDPOINT} cannot be asked for it: {error}") from error
    except Exception as error:  # of the HTTP library below huggingface_hub, which changes with its versions
        raise _UnreachableError(f"{constants.ENDPOINT} was asked and does not answer ({_said(error)})") from error


def _refused(model: HubModel, error: Any) -> ModelError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    token = "set HF_TOKEN, or log in with `hf auth login`"
    page = f"{constants.ENDPOINT}/{model.repo}"
    if isinstance(error, GatedRepoError):
        return ModelError(f"{model}: access to the repository is restricted: accept its terms at {page}, then {token}")
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(f"{model}: {page} does not exist, or is private: check the name; if it is private, {token}")
    return ModelError(f"{model}: {page} is refused ({_said(error)}): check the name; if it is private, {token}")


def _download(model: HubModel, name: str, bar: _Bar) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    bar.name = name
    try:
        return Path(hf_hub_download(model.repo, name, tqdm_class=bar.tqdm_class()))
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise _refused(model, error) from error
        raise _broken(model, name, error, constants.ENDPOINT) from error
    except Exception as error:  # of the HTTP library below, the file system, or the hub's own checks
        raise _broken(model, name, error, constants.ENDPOINT) from error


def _broken(model: HubModel, name: str, error: Exception, endpoint: str) -> ModelError:
    return ModelError(
        f"{model}: the download of {name} from {endpoint} broke off ({_said(error)}); start again when the network and "
        f"the disk allow it: files that are whole stay in the cache"
    )


def _said(error: BaseException) -> str:
    """The first line of what a library says."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


# ---- without the hub ----


def _cached(model: HubModel, unreachable: _UnreachableError) -> Path:
    """The file that is meant among those of the cache. Raises ModelError."""
    from huggingface_hub import constants

    files = _in_cache(model.repo)
    tried = f"{unreachable}; the cache {constants.HF_HUB_CACHE} was searched"
    advice = "check the network and HF_ENDPOINT, or name a model file of this machine"
    if not files:
        raise ModelError(f"{model}: {tried} and holds no .gguf file of this repository: {advice}")
    try:
        name = chosen(model, list(files))
        names = _with_parts(model, name, dict.fromkeys(files, 0))
    except ModelError as error:
        raise ModelError(f"{error} ({tried}, it holds {_enumerated(sorted(files))}: {advice})") from error
    log.warning("%s: %s, %s is used", model, unreachable, files[name])
    return files[names[0]]


def _in_cache(repo: str) -> dict[str, Path]:
    """GGUF files by their name in the repository: of the revision that `main` was at last, else of the newest."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [found for found in scan_cache_dir().repos if (found.repo_id, found.repo_type) == (repo, "model")]
    except CacheNotFound:
        return {}
    revisions = [revision for found in repos for revision in found.revisions]
    for revision in sorted(revisions, key=lambda r: ("main" in r.refs, r.last_modified), reverse=True):
        paths = [file.file_path for file in revision.files if file.file_path.suffix == ".gguf"]
        if paths:
            return {path.relative_to(revision.snapshot_path).as_posix(): path for path in sorted(paths)}
    return {}


# ---- progress ----


class _Bar:
    """Adds the bytes of all files up, and passes them on."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.name = ""
        self._progress, self._total, self._done = progress, total, 0
        self._start: tuple[float, int] | None = None

    def add(self, count: int) -> None:
        now = time.monotonic()
        self._start = self._start or (now, self._done)
        self._done += count
        seconds = now - self._start[0]
        rate = f", {(self._done - self._start[1]) / seconds / _MEBIBYTE:.1f} MiB/s" if seconds > 1 else ""
        size = f"{self._done / _GIBIBYTE:.2f} of {self._total / _GIBIBYTE:.2f} GiB"
        self._progress(min(self._done / max(self._total, 1), 1.0), f"downloading {self.name}: {size}{rate}")

    def tqdm_class(self) -> Any:
        """A tqdm that shows nothing itself: what huggingface_hub tells its bars goes on to this one."""
        from tqdm.std import tqdm

        bar = self

        class FileBar(tqdm):  # type: ignore[misc]
            monitor_interval = 0  # no thread for a bar that is not drawn

            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options | {"file": io.StringIO(), "disable": False, "leave": False})
                bar.add(int(self.n))

            def update(self, n: float | None = 1) -> bool | None:
                bar.add(int(n or 0))
                updated: bool | None = super().update(n)
                return updated

            # Where a bar has these two, xet's transfers get none of their own, whose bytes would be counted twice.
            def update_transfer(self, _n: float | None = 1) -> None:
                return None

            def set_transfer_postfix_str(self, *_args: Any, **_options: Any) -> None:
                return None

        return FileBar
