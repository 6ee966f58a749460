"""The long run in short; `make soak` has ten minutes of it, and a closer look at the memory."""

from __future__ import annotations

from pathlib import Path

from tests.server.conftest import Start
from tests.server.soak import complaints, options, soak


def test_a_mixed_load_leaves_no_request_stuck_and_its_counters_add_up(start: Start, tmp_path: Path) -> None:
    server = start(*options(tmp_path)).wait_healthy()
    report = soak(server, 20)
    print(report)
    assert report.problems == []
    assert report.missing == 0
    assert report.growth < 0.05
    done = {name.split()[0] for name in report.done}
    assert done == {"execute", "whole", "streamed", "chat", "leave", "cancel", "bad_body", "look"}
    assert complaints(server) == []
    server.close()
