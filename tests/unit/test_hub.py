"""Models of the Hugging Face Hub, from a local server that speaks its API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llorch.core.hub import HubModel, chosen, reference
from llorch.errors import ModelError
from llorch.providers.conformance.models import TinyModel, write_model
from tests.hub_server import COMMIT, Hub, serving
from tests.support import ROOT
from tests.unit.test_model_files import split

PIECE = 10 << 20  # bytes that huggingface_hub takes at once: what it has of a piece that breaks off is lost
LOCATE = """
import sys
from llorch.core.model_files import locate
from llorch.errors import ModelError
told = []
try:
    print(locate(sys.argv[1], lambda fraction, text: told.append((fraction, text))))
except ModelError as error:
    sys.exit(f"ModelError: {error}")
print(*told[-1:], len(told), sorted(told) == told)
"""


class Machine:
    """Runs llorch with a cache of its own, against a hub."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder, self.hub = folder, hub

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        foreign = ("HF_", "HUGGING", "LLORCH_", "TRANSFORMERS_")
        inherited = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith(foreign)}
        mine = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / "hf"), "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env={**inherited, "PYTHONPATH": str(ROOT), **mine, **env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def locate(self, model: str, **env: str) -> tuple[str, str]:
        """(name in the repository, last progress); fails where the model is refused."""
        done = self.run("-c", LOCATE, model, **env)
        assert done.returncode == 0, done.stderr
        path, progress = done.stdout.splitlines()
        assert Path(path).exists()
        return path.partition(f"{COMMIT}/")[2], progress

    def refused(self, model: str, **env: str) -> str:
        done = self.run("-c", LOCATE, model, **env)
        assert done.returncode == 1, done.stdout
        assert "ModelError: " in done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr.partition("ModelError: ")[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(TinyModel(layers=2), tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def machine(tmp_path: Path, tiny: Path) -> Iterator[Machine]:
    data = tiny.read_bytes()
    parts = {f"Q8_0/{path.name}": path.read_bytes() for path in split(tiny, tmp_path)}
    repos = {
        "lab/one": {"README.md": b"one model", "tiny.gguf": data, "mmproj-tiny.gguf": b"an image encoder"},
        "lab/many": {"tiny-Q4_K_M.gguf": data, "tiny-Q6_K.gguf": data + b"\0", "tiny-Q4_K.gguf": data, **parts},
        "lab/odd": {"tiny-a.gguf": data, "tiny-b.gguf": data, "tiny-00001-of-00002.gguf": data},
        "lab/weights": {"README.md": b"no GGUF", "model.safetensors": b"weights"},
        "lab/large": {"large.gguf": data + bytes(3 * PIECE)},
        "lab/gated": {"tiny.gguf": data},
    }
    with serving(Hub(repos, gated={"lab/gated"})) as hub:
        yield Machine(tmp_path, hub)


# ---- names ----


def test_a_path_is_no_model_of_the_hub() -> None:
    assert reference("models/hf.gguf") is None
    assert reference(Path("hf:lab/one:Q8_0")) == HubModel("lab/one", "Q8_0")
    assert reference("hf:lab/one") == HubModel("lab/one", None)


@pytest.mark.parametrize("name", ["hf:", "hf:one", "hf:a/b/c", "hf:lab/one:", "hf:lab/o ne", "hf:/one", "hf:lab/one::"])
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    if name == "hf:lab/one::":
        assert reference(name) == HubModel("lab/one", ":")
        return
    with pytest.raises(ModelError, match=f"{name}: expected hf:OWNER/REPO, hf:OWNER/REPO:FILE or hf:OWNER/REPO:QUANT"):
        reference(name)


NAMES = [
    "x-BF16.gguf",
    "x-IQ4_K.gguf",
    "x-Q4_K.gguf",
    "x-Q4_K_M.gguf",
    "x.Q5_K_S.gguf",
    "x_q6_k.gguf",
    "mmproj-x-Q8_0.gguf",
    "deep/x-Q8_0-00001-of-00002.gguf",
    "deep/x-Q8_0-00002-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, "x-Q4_K_M.gguf"),
        ("q4_k_m", "x-Q4_K_M.gguf"),
        ("Q4_K", "x-Q4_K.gguf"),
        ("iq4_k", "x-IQ4_K.gguf"),
        ("Q5_K_S", "x.Q5_K_S.gguf"),
        ("Q6_K", "x_q6_k.gguf"),
        ("Q8_0", "deep/x-Q8_0-00001-of-00002.gguf"),
        ("x-BF16.gguf", "x-BF16.gguf"),
        ("mmproj-x-Q8_0.gguf", "mmproj-x-Q8_0.gguf"),  # who names it gets it
        ("x-Q8_0-00001-of-00002.gguf", "deep/x-Q8_0-00001-of-00002.gguf"),
    ],
)
def test_a_file_is_named_by_itself_or_by_its_quantisation(wanted: str | None, expected: str) -> None:
    assert chosen(HubModel("lab/x", wanted), NAMES) == expected


def test_without_a_name_the_first_of_the_usual_quantisations_is_meant() -> None:
    left = [name for name in NAMES if "Q4_K" not in name]
    assert chosen(HubModel("lab/x", None), left) == "x.Q5_K_S.gguf"
    assert chosen(HubModel("lab/x", None), ["x-Q2_K.gguf"]) == "x-Q2_K.gguf"


@pytest.mark.parametrize(
    ("wanted", "names", "message"),
    [
        ("Q2_K", NAMES, r"hf:lab/x:Q2_K: no file of the repository is Q2_K; name one: .*hf:lab/x:x-Q4_K_M\.gguf"),
        (None, ["a-Q4_0.gguf", "b-Q4_0.gguf"], r"2 files are Q4_0; name one: hf:lab/x:a-Q4_0\.gguf, hf:lab/x:b-Q4_0"),
        ("Q4_0", ["a-Q4_0.gguf", "b-Q4_0.gguf"], r"2 files are Q4_0; name one: hf:lab/x:a-Q4_0\.gguf, hf:lab/x:b-Q4_0"),
        (None, ["a-Q2_K.gguf", "a-Q3_K.gguf"], r"the repository holds 2 models; name one: hf:lab/x:a-Q2_K\.gguf, "),
        (None, ["a.safetensors"], r"the repository holds no \.gguf model; it has a\.safetensors: name one with models"),
    ],
)
def test_what_may_mean_several_files_or_none_is_an_error_that_lists_them(
    wanted: str | None, names: list[str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        chosen(HubModel("lab/x", wanted), names)


# ---- downloads ----


def test_a_model_is_downloaded_once_and_nothing_else_is(machine: Machine) -> None:
    assert machine.locate("hf:lab/one")[0] == "tiny.gguf"
    assert machine.hub.downloads() == [("tiny.gguf", None)]
    assert {path for _, path, _ in machine.hub.asked} == {
        "/api/models/lab/one?blobs=true",
        "/lab/one/resolve/main/tiny.gguf",
    }
    machine.hub.asked.clear()
    name, progress = machine.locate("hf:lab/one")
    assert (name, progress) == ("tiny.gguf", "0 True")
    assert not machine.hub.downloads()


def test_a_quantisation_in_parts_is_downloaded_whole(machine: Machine) -> None:
    name, progress = machine.locate("hf:lab/many:q8_0")
    assert name == "Q8_0/tiny-00001-of-00003.gguf"
    assert [file for file, _ in machine.hub.downloads()] == [f"Q8_0/tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert progress.startswith("(1.0, 'downloading Q8_0/tiny-00003-of-00003.gguf: ")
    assert progress.endswith("True")  # it only grows


def test_parts_that_the_repository_lacks_are_named(machine: Machine) -> None:
    message = machine.refused("hf:lab/odd:tiny-00001-of-00002.gguf")
    assert "1 of the 2 parts of this model are not in the repository: tiny-00002-of-00002.gguf" in message
    assert not machine.hub.downloads()


def test_a_connection_that_breaks_is_taken_up_where_it_broke(machine: Machine) -> None:
    machine.hub.cut_after = [PIECE + 5000]
    name, progress = machine.locate("hf:lab/large")
    assert machine.hub.downloads() == [("large.gguf", None), ("large.gguf", f"bytes={PIECE}-")]
    assert progress.startswith("(1.0, ")
    cached = next((machine.folder / "hf").rglob(f"{COMMIT}/{name}"))
    assert cached.read_bytes() == machine.hub.repos["lab/large"]["large.gguf"]


def test_a_download_that_does_not_come_back_says_what_broke_and_leaves_no_half_file(machine: Machine) -> None:
    machine.hub.cut_after, machine.hub.statuses = [PIECE + 5000], [200, 503]
    message = machine.refused("hf:lab/large")
    assert len(machine.hub.downloads()) == 2
    assert f"the download of large.gguf from {machine.hub.url} broke off (HfHubHTTPError: Server error '503" in message
    assert "start again when the network and the disk allow it" in message
    assert not list((machine.folder / "hf").rglob("*.incomplete"))


# ---- refusals ----


def test_a_gated_repository_names_its_page_and_the_token(machine: Machine) -> None:
    message = machine.refused("hf:lab/gated")
    assert f"access to the repository is restricted: accept its terms at {machine.hub.url}/lab/gated" in message
    assert "HF_TOKEN" in message
    assert machine.locate("hf:lab/gated", HF_TOKEN="hf_let_me_in")[0] == "tiny.gguf"


def test_a_repository_that_is_not_there_is_named(machine: Machine) -> None:
    assert f"{machine.hub.url}/lab/absent does not exist, or is private: check the name" in machine.refused(
        "hf:lab/absent"
    )


def test_a_file_that_is_not_there_lists_those_that_are(machine: Machine) -> None:
    message = machine.refused("hf:lab/many:tiny-Q9.gguf")
    assert "no file of the repository is tiny-Q9.gguf; name one: hf:lab/many:Q8_0/tiny-00001-of-00003.gguf, " in message


# ---- offline ----


def test_a_model_in_the_cache_loads_without_the_hub(machine: Machine) -> None:
    machine.locate("hf:lab/many:q6_k")
    machine.hub.asked.clear()
    for wanted in ("", ":Q6_K", ":tiny-Q6_K.gguf"):
        assert machine.locate(f"hf:lab/many{wanted}", HF_HUB_OFFLINE="1")[0] == "tiny-Q6_K.gguf"
    assert not machine.hub.asked
    done = machine.run("-c", LOCATE, "hf:lab/many", HF_ENDPOINT="http://127.0.0.1:1")
    assert done.returncode == 0
    assert "http://127.0.0.1:1 was asked and does not answer (ConnectError: " in done.stderr  # said, not silent
    machine.hub.status = 503
    done = machine.run("-c", LOCATE, "hf:lab/many:Q6_K")
    assert done.returncode == 0
    assert f"{machine.hub.url} answers 503, " in done.stderr


@pytest.mark.parametrize(
    ("env", "tried"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, so that nothing was asked"),
        ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "http://127.0.0.1:1 was asked and does not answer (ConnectError: "),
    ],
)
def test_without_hub_and_copy_the_error_says_what_was_tried(machine: Machine, env: dict[str, str], tried: str) -> None:
    message = machine.refused("hf:lab/one", **env)
    assert tried in message
    assert f"the cache {machine.folder}/hf/hub was searched and holds no .gguf file of this repository" in message
    assert "check the network and HF_ENDPOINT, or name a model file of this machine" in message
    machine.locate("hf:lab/many:q6_k")
    message = machine.refused("hf:lab/many:Q4_K_M", **env)
    assert "no file of the repository is Q4_K_M" in message
    assert tried in message
    assert "it holds tiny-Q6_K.gguf" in message


# ---- in the commands ----


def test_the_commands_take_a_model_of_the_hub(machine: Machine) -> None:
    done = machine.run("-m", "llorch", "inspect", "hf:lab/one", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["file"].endswith(f"{COMMIT}/tiny.gguf")
    options = ("--model", "hf:lab/many:Q8_0", "--provider", "numpy-cpu")
    done = machine.run("-m", "llorch", "run", "w1 w2", *options, "--max-tokens", "3", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert "3 tokens" in done.stderr
    done = machine.run("-m", "llorch", "bench", *options, "-p", "8", "-n", "4", "-r", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert {json.loads(line)["test"] for line in done.stdout.splitlines()} == {"pp8", "tg4"}
    assert [file for file, _ in machine.hub.downloads()].count("Q8_0/tiny-00001-of-00003.gguf") == 1


def test_a_path_imports_nothing_of_the_hub() -> None:
    code = (
        "import sys, llorch.core.llm; from llorch.core.model_files import locate; locate('x.gguf'); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "llorch.core.hub" in done.stdout.split()  # the check can fail
    assert "huggingface_hub" not in done.stdout.split()
