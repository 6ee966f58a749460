"""Chat templates as programs: what they may do, and how each of them that does too much is stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime

import psutil
import pytest

from llorch.core.chat_renderer import Renderer
from llorch.errors import ChatTemplateError, EngineError


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    found = Renderer(seconds=0.5)
    yield found
    found.close()


MESSAGES = [{"role": "user", "content": "Hi <b>\u00e9</b> & 'you'"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos }}{% for m in messages %}{{ m.role }}:{{ m['content'] | length }}{% endfor %}", "<s>user:19"),
        ("{% if true %}\n  x\n  {% endif %}\ny\n", "  x\ny"),  # trim_blocks, lstrip_blocks, no trailing newline
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in range(4) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "013"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi <b>\u00e9</b> & \'you\'"}'),
        ("{{ {'a': [1, none]} | tojson(indent=2) }}", '{\n  "a": [\n    1,\n    null\n  ]\n}'),
        ("{{ messages[0].content }}", "Hi <b>\u00e9</b> & 'you'"),  # no HTML escapes
        ("{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "10"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') }}{{ missing }}", "<a>"),
        ("{% generation %}x{{ 1 + 1 }}{% endgeneration %}", "x2"),
        ("{{ ''.__class__ }}{{ raise_exception.__globals__ }}", ""),  # undefined, as of any name that is not there
    ],
)
def test_a_template_renders_as_hugging_face_renders_it(renderer: Renderer, template: str, expected: str) -> None:
    assert renderer.render(template, {"messages": MESSAGES, "bos": "<s>"}) == expected


def test_strftime_now_is_the_local_time(renderer: Renderer) -> None:
    before = datetime.now()
    shown = datetime.strptime(renderer.render("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}", {}), "%Y-%m-%d %H:%M:%S")
    assert -1 <= (shown - before).total_seconds() <= 5


def test_what_a_template_says_with_raise_exception_is_the_error(renderer: Renderer) -> None:
    with pytest.raises(ChatTemplateError, match="refuses these messages: roles must alternate"):
        renderer.render("{{ raise_exception('roles must alternate') }}", {})


def test_a_template_that_does_not_compile_is_an_error_with_its_line(renderer: Renderer) -> None:
    with pytest.raises(ChatTemplateError, match="cannot be compiled, line 2"):
        renderer.compile("fine\n{% for %}")
    renderer.compile("{{ undefined_at_compile_time }}")


ATTACKS = {
    # Python's internals
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "attribute filter": "{{ (''|attr('__class__')).__mro__ }}",
    "mutation": "{% set _ = messages.append(1) %}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    # time
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 10**(10**8) }}",
    "macros that double": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "sorting": "{{ (range(99999)|list * 200)|sort|length }}",
    "words": "{{ lipsum(n=100000) }}",
    # memory
    "multiplication": "{{ 'x' * 10**9 }}",
    "lists": "{{ [0] * 10**9 }}",
    "padding": "{{ 'x'|center(10**9) }}",
    "padding method": "{{ 'x'.ljust(10**9) }}",
    "printf": "{{ '%1000000000d'|format(1) }}",
    "format width": "{{ '{:1000000000d}'.format(1) }}",
    "doubling": "{% set ns = namespace(s='xx') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "replacing": "{{ ('x' * 100000)|replace('x', 'y' * 100000) }}",
    "joining": "{{ ('x' * 1000000)|join('y' * 100000) }}",
    "batches": "{{ range(3)|batch(10**10, 'x')|list }}",
    # output
    "100 MB": "{% for i in range(1000) %}{{ 'x' * 100000 }}{% endfor %}",
    # stack
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep expression": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "deep blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "deep operators": "{{ " + "-" * 100000 + "1 }}",
}


@pytest.mark.parametrize("template", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_template_that_goes_too_far_is_stopped_and_the_next_one_renders(renderer: Renderer, template: str) -> None:
    began = time.monotonic()
    with pytest.raises(ChatTemplateError, match="the chat template was stopped: "):
        renderer.render(template, {"messages": MESSAGES})
    assert time.monotonic() - began < 5
    assert renderer.render("{{ x }}", {"x": "fine"}) == "fine"


def test_a_template_takes_a_bounded_memory(renderer: Renderer) -> None:
    """The process that runs it, and so the machine: the peak is that of all attacks above, if they ran before."""
    with pytest.raises(ChatTemplateError, match="more than 256 MiB of memory"):
        renderer.render(ATTACKS["doubling"], {})
    assert renderer._process is not None
    assert psutil.Process(renderer._process.pid).memory_info().rss < 400 << 20


def test_the_process_knows_no_variable_of_llorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLORCH_API_KEY", "secret")
    renderer = Renderer()
    try:
        renderer.compile("")
        assert renderer._process is not None
        environment = psutil.Process(renderer._process.pid).environ()
        assert "PATH" in environment
        assert "LLORCH_API_KEY" not in environment
    finally:
        renderer.close()


def test_threads_take_turns(renderer: Renderer) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(renderer.render("{{ i }}" * 1000, {"i": i}))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(found) == [str(i) * 1000 for i in range(8)]


def test_a_process_that_was_killed_is_replaced(renderer: Renderer) -> None:
    renderer.compile("")
    assert renderer._process is not None
    renderer._process.kill()
    renderer._process.wait()
    assert renderer.render("{{ 1 }}", {}) == "1"


def test_close_ends_the_process() -> None:
    renderer = Renderer()
    renderer.compile("")
    process = renderer._process
    assert process is not None
    renderer.close()
    assert process.returncode is not None
    with pytest.raises(EngineError, match="closed"):
        renderer.render("", {})


def test_the_process_ends_with_a_parent_that_dies(tmp_path) -> None:
    """Even in the middle of an endless template, by its own alarm."""
    code = (
        "import os, threading, time\n"
        "from llorch.core.chat_renderer import Renderer\n"
        "r = Renderer(seconds=0.5)\n"
        "r.compile('')\n"
        "print(r._process.pid, flush=True)\n"
        f"t = {ATTACKS['nested loops']!r}\n"
        "threading.Thread(target=lambda: r.render(t, {}), daemon=True).start()\n"
        "time.sleep(0.2)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the process goes on"
        time.sleep(0.05)


def test_a_render_takes_few_milliseconds(renderer: Renderer) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    context = {"messages": MESSAGES * 40}
    renderer.render(template, context)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        renderer.render(template, context)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.01
