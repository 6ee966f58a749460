"""The API against its own description, a few hundred cases of it; `make fuzz-api` runs ten thousand."""

from __future__ import annotations

from pathlib import Path

from tests.server.conftest import Start
from tests.server.fuzz_api import fuzz, options


def test_every_route_answers_as_its_description_says(start: Start, tmp_path: Path) -> None:
    server = start(*options(tmp_path)).wait_healthy()
    found = fuzz(server, 25, "--seed", "1", phases="examples,fuzzing")
    assert found.status == 0, found.output
    assert found.cases > 100
    assert not server.logged("request failed")
    assert server.stderr == ""
    server.close()
