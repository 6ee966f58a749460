"""What clients of a server see: the real process, real HTTP, streams that run at once.

    python benchmarks/serving.py model.gguf --provider numba-cpu --llamacpp-python /path/to/venv/bin/python

Three measurements, each the median of its rounds:

- throughput: decoded tokens a second of one client and of many, and of llama.cpp with as many sequences in one batch
  (through llama-cpp-python, in a process of its own: benchmarks/vs_llamacpp.py says how to build it), in turn;
- prefix: the time to the first token of a prompt of 1,020 tokens, new, and again with the first 1,000 in the cache;
- gap: the longest pause between two tokens of eight streams while a prompt of 2,000 tokens is processed, over the time
  that a step with such a chunk of it takes alone.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server import serving

PROMPT_TOKENS, WARMUP_TOKENS = 16, 8
SHARED, OWN = 1000, 20
LONG, STREAMS = 2000, 8
EOS, BYTES = 2, range(3, 259)  # in any Llama vocabulary; the text of a byte waits for the rest of its character


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.worker:
        print(json.dumps(_llamacpp(arguments)))
        return
    result: dict[str, Any] = {"model": arguments.model.name, "provider": arguments.provider}
    for name in arguments.measure.split(","):
        result |= {"throughput": _throughput, "prefix": _prefix, "gap": _gap}[name](arguments)
    print(json.dumps(result, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--measure", default="throughput,prefix,gap", help="of these, between commas (%(default)s)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int, default=_cores(), help="threads of each side (%(default)s, all cores)")
    parser.add_argument("-n", "--tokens", type=int, default=64, help="tokens of each client (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mixed-chunk", type=int, help="that of the server; its default where left out")
    parser.add_argument("--llamacpp-python", help="interpreter that has llama-cpp-python; without it there is no peer")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prompt(seed: object, tokens: int) -> list[int]:
    """Ids that are plain text in any Llama vocabulary."""
    numbers = random.Random(str(seed))
    return [1, *(numbers.randrange(300, 2000) for _ in range(tokens - 1))]


# ---- the server and its clients ----


@contextmanager
def _server(arguments: argparse.Namespace, **options: object) -> Iterator[int]:
    """Its port."""
    with serving(arguments.model, provider=arguments.provider, threads=arguments.threads, **options) as served:
        yield served.port


@dataclass
class Client:
    """One streamed completion; `times` are those of its events with text."""

    port: int
    prompt: list[int]
    tokens: int
    endless: bool = False  # noise must not end itself, nor hold back text; whole rows of logits are read for that
    times: list[float] = field(default_factory=list)
    sent: float = 0.0
    count: int = 0

    def run(self) -> None:
        """Over a bare socket: what a client's own library takes of the processor is not to be measured."""
        body = {"prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        if self.endless:
            body["logit_bias"] = {str(token): -100 for token in (EOS, *BYTES)}
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(content)}"
        )
        received = b""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            self.sent = time.perf_counter()
            connection.sendall(head.encode() + b"\r\n\r\n" + content)
            while part := connection.recv(1 << 16):
                texts = part.count(b'"text":"') - part.count(b'"text":""')
                self.times += [time.perf_counter()] * texts
                received += part
        usage = re.search(rb'"completion_tokens":([0-9]+)', received)
        if usage is None:
            raise SystemExit(f"no answer: {received[:2000].decode()}")
        self.count = int(usage[1])

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.times[0] - self.sent


def _run(clients: list[Client]) -> None:
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _rate(port: int, count: int, tokens: int, seed: object) -> float:
    """Tokens a second of `count` clients together, from the first token of all to the last of the first to end."""
    clients = [Client(port, _prompt((seed, i), PROMPT_TOKENS), tokens) for i in range(count)]
    _run(clients)
    start = max(client.times[0] for client in clients)
    end = min(client.times[-1] for client in clients)
    inside = sum(sum(start < moment <= end for moment in client.times) for client in clients)
    per_event = sum(client.count for client in clients) / sum(len(client.times) for client in clients)
    return inside * per_event / (end - start)


def _steps(port: int) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/debug/engine")
    found = json.loads(connection.getresponse().read())
    connection.close()
    steps: list[dict[str, Any]] = found["steps"]
    return steps


# ---- the measurements ----


def _throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    many = arguments.clients
    ours: dict[int, list[float]] = {1: [], many: []}
    peer: dict[int, list[float]] = {1: [], many: []}
    with _server(arguments, parallel=many, context=256) as port:
        _rate(port, many, WARMUP_TOKENS, "warm-up")
        for i in range(arguments.rounds):
            for count in ours:
                ours[count].append(_rate(port, count, arguments.tokens, (i, count)))
                if arguments.llamacpp_python:
                    peer[count].append(_peer(arguments, count))
                print(
                    f"round {i + 1}, {count} clients: {ours[count][-1]:.1f}, peer {peer[count][-1:]}", file=sys.stderr
                )
    found: dict[str, Any] = {f"tokens_per_second_{count}": statistics.median(rates) for count, rates in ours.items()}
    found["many_over_one"] = statistics.median(ours[many]) / statistics.median(ours[1])
    if arguments.llamacpp_python:
        found |= {f"llamacpp_tokens_per_second_{count}": statistics.median(rates) for count, rates in peer.items()}
        ratios = [mine / theirs for mine, theirs in zip(ours[many], peer[many], strict=True)]
        found["over_llamacpp"], found["over_llamacpp_by_round"] = statistics.median(ratios), ratios
    return found


def _prefix(arguments: argparse.Namespace) -> dict[str, Any]:
    cold, warm = [], []
    with _server(arguments, parallel=2, context=2048) as port:
        _rate(port, 1, WARMUP_TOKENS, "warm-up")
        for i in range(arguments.rounds):
            shared = _prompt(("shared", i), SHARED)
            for kind, times in (("cold", cold), ("warm", warm)):
                client = Client(port, shared + _prompt((kind, i), OWN), 2)
                client.run()
                times.append(client.first)
    found = {"first_token_ms": 1000 * statistics.median(cold), "first_token_shared_ms": 1000 * statistics.median(warm)}
    return found | {"sooner": found["first_token_ms"] / found["first_token_shared_ms"]}


def _gap(arguments: argparse.Namespace) -> dict[str, Any]:
    chunk = {} if arguments.mixed_chunk is None else {"mixed_chunk": arguments.mixed_chunk}
    gaps, plain, alone = [], [], []
    size = arguments.mixed_chunk or 128
    with _server(arguments, parallel=STREAMS + 1, context=2048, **chunk) as port:
        _rate(port, 1, WARMUP_TOKENS, "warm-up")
        for i in range(arguments.rounds):
            # the last chunk of the prompt, which sees most context, as a step of its own
            before = _prompt(("long", i), LONG - size)
            Client(port, before, 1).run()
            Client(port, before + _prompt(("rest", i), size), 1).run()
            steps = [
                step for step in _steps(port) if not step["decodes"] and step["prompt_tokens"] in range(size, size + 33)
            ]
            alone.append(steps[-1]["milliseconds"])
            streams = [
                Client(port, _prompt(("stream", i, j), PROMPT_TOKENS), 400, endless=True) for j in range(STREAMS)
            ]
            threads = [threading.Thread(target=stream.run) for stream in streams]
            for thread in threads:
                thread.start()
            while not all(len(stream.times) > 20 for stream in streams):
                time.sleep(0.01)
            long = Client(port, _prompt(("beside", i), LONG), 1)
            long.run()
            ended = long.times[0]
            for thread in threads:
                thread.join()
            for stream in streams:
                for earlier, later in zip(stream.times, stream.times[1:], strict=False):
                    (gaps if long.sent < later and earlier < ended else plain).append((later - earlier) * 1000)
    found = {"chunk_ms": statistics.median(alone), "worst_gap_ms": max(gaps), "usual_gap_ms": statistics.median(plain)}
    return found | {"gap_over_chunk": found["worst_gap_ms"] / found["chunk_ms"]}


# ---- llama.cpp ----


def _peer(arguments: argparse.Namespace, count: int) -> float:
    command = [arguments.llamacpp_python, __file__, str(arguments.model), "--worker", str(count)]
    command += ["--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp failed with status {done.returncode}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def _llamacpp(arguments: argparse.Namespace) -> float:
    """Tokens a second of `worker` sequences, one token of each in a batch."""
    import llama_cpp as lib
    import numpy as np

    count = arguments.worker
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(arguments.model).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_seq_max = 256 * count, 512, count
    params.n_threads = params.n_threads_batch = arguments.threads
    context = lib.llama_init_from_model(model, params)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(512, 0, 1)

    def step(entries: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted)"""
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if lib.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")

    def chosen(row: int) -> int:
        return int(np.argmax(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, row), shape=(vocab,))))

    following = []
    for s in range(count):
        prompt = _prompt((0, s), PROMPT_TOKENS)
        step([(token, i, s, i == len(prompt) - 1) for i, token in enumerate(prompt)])
        following.append(chosen(len(prompt) - 1))
    began = 0.0
    for i in range(WARMUP_TOKENS + arguments.tokens):
        if i == WARMUP_TOKENS:
            began = time.perf_counter()
        step([(following[s], PROMPT_TOKENS + i, s, True) for s in range(count)])
        following = [chosen(s) for s in range(count)]
    return count * arguments.tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
