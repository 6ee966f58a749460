"""The process: binds, loads, announces, serves, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import cast

import structlog
import uvicorn

from llorch.core.engine_thread import EngineThread
from llorch.core.llm import LLM, load
from llorch.core.loader import Progress
from llorch.demo import DEMO_NOTICE
from llorch.errors import EngineError, LlorchError, SettingsError
from llorch.http.app import create_app
from llorch.http.callback import announce
from llorch.http.heartbeat import beat
from llorch.http.logs import configure_logging
from llorch.http.protocol import LimitedProtocol, Limits
from llorch.http.service import Worker
from llorch.http.settings import ServeSettings
from llorch.http.start_log import LoadReport, log_settings, served
from llorch.http.stream import Timing
from llorch.http.traces import Tracer

log = structlog.stdlib.get_logger(__name__)

BACKLOG = 2048
ACCEPT_TOGETHER = 16  # connections in one round of the event loop, about 2 ms of it
# the event loop and the engine share the interpreter: at Python's 5 ms the loop may wait that long at each system call
SWITCH_SECONDS = 0.0002
ENGINE_STOP_SECONDS = 5.0
CONNECTION_SECONDS = 2  # for connections to close once no job is left; a client that does not read never does
IDLE_CONNECTION_SECONDS = 75  # longer than an orchestrator's pause between two health checks
SAME_SIGNAL_SECONDS = 0.1  # supervisors that signal a process and its group send one wish twice
LAST_SECONDS = 1.0  # of a worker whose engine is given up: who watches /health is to see why
MOST_DESCRIPTORS = 65536
OWN_DESCRIPTORS = 128  # files that are open beside the connections: libraries, the model, the device

Loading = Callable[[], contextlib.AbstractContextManager[Progress]]


def serve(settings: ServeSettings, loading: Loading | None = None) -> None:
    """Runs a worker until a signal ends it. Raises LlorchError when it cannot start or go on.

    `loading` shows a load's progress on a terminal; without it, and where lines are read by programs, it is logged.
    """
    as_json = configure_logging(settings.log_format, settings.log_level)
    log_settings(settings)
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        listener = bind(settings)
    except SettingsError as error:
        log.error("cannot start", reason=str(error))
        raise
    with contextlib.closing(listener):
        asyncio.run(WorkerProcess(settings, listener, None if as_json else loading).run())


def bind(settings: ServeSettings) -> socket.socket:
    """A listening socket. Raises SettingsError where the address is taken, unknown, or open to others without a key."""
    host, port = settings.host, settings.port
    try:
        # IPPROTO_TCP said aloud: asyncio sets TCP_NODELAY on no other, and each event would wait 40 ms for an ACK
        found = socket.getaddrinfo(host or None, port, 0, socket.SOCK_STREAM, socket.IPPROTO_TCP, socket.AI_PASSIVE)
    except OSError as error:
        raise SettingsError(f"--host {host} is no address of this machine: {error.strerror}") from error
    family, kind, protocol, _, address = found[0]
    if not ipaddress.ip_address(address[0]).is_loopback and not settings.api_keys and not settings.insecure:
        raise SettingsError(f"--host {host} can be reached by others: set LLORCH_API_KEY, or allow it with --insecure")
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last run may linger
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        hint = "choose another with --port, or --port 0 for any that is free"
        raise SettingsError(f"cannot listen on {host} port {port} ({error.strerror}): {hint}") from error
    return listener


class QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers: they close the listener at once, and clients would be refused, not told."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # asyncio takes one number for the listener's backlog and for the connections that it accepts in a row
        for listener in sockets or []:
            listener.listen(BACKLOG)


class WorkerProcess:
    """One run of `llorch serve`."""

    def __init__(self, settings: ServeSettings, listener: socket.socket, loading: Loading | None = None) -> None:
        self._settings, self._listener = settings, listener
        self._loopback = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        self._worker_id = settings.worker_id or uuid.uuid4().hex
        self._uri = settings.uri or _uri(settings.host, listener.getsockname()[1])
        self._engine = EngineThread(
            self._load,
            max_queue=settings.max_queue,
            step_timeout=settings.step_timeout,
            on_fatal=self._on_fatal,
            queue_timeout=settings.queue_timeout,
            mixed_chunk=settings.mixed_chunk,
            max_running_per_key=settings.max_running_per_key,
        )
        self._loading = loading or self._logged_loading
        self._tracer = Tracer() if settings.traces else None
        self._failure: BaseException | None = None
        self._signalled: float | None = None

    async def run(self) -> None:
        """Serves until a signal comes or the start fails; then finishes what runs. Raises what made the start fail."""
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        worker = self._worker()
        server = self._server(worker)
        with self._signals():
            serving = asyncio.create_task(server.serve(sockets=[self._listener]))
            serving.add_done_callback(lambda _: self._stopping.set())
            starting = asyncio.create_task(self._start(worker))
            starting.add_done_callback(self._started)
            heart = asyncio.create_task(self._beat(worker, starting))
            await self._stopping.wait()
            self._log_end(starting)
            starting.cancel()
            await worker.drain(self._settings.shutdown_timeout if self._engine.fatal is None else LAST_SECONDS)
            if self._engine.fatal is not None:
                await asyncio.sleep(LAST_SECONDS)
            server.should_exit = True
            await serving
            heart.cancel()
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)
            await self._stop_engine()
        if self._failure is not None:
            raise self._failure
        log.info("stopped")

    def _log_end(self, starting: asyncio.Task[None]) -> None:
        """Why the worker ends, and that it does where there is something to end."""
        if self._failure is not None:
            failed = "cannot start" if not starting.done() or starting.exception() is not None else "worker failed"
            log.error(failed, reason=str(self._failure))
        if self._engine.ready or self._failure is None:
            log.info("shutting down", timeout_s=self._settings.shutdown_timeout)

    def _on_fatal(self) -> None:
        """On a thread of the engine's: nothing can be served any more, and a supervisor is to see it."""
        self._failure = self._engine.fatal
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends already
            self._loop.call_soon_threadsafe(self._stopping.set)

    async def _stop_engine(self) -> None:
        # neither a load that is under way nor a step that hangs can be told to end
        wait = ENGINE_STOP_SECONDS if self._engine.ready else LAST_SECONDS if self._engine.fatal else 0.0
        if not await asyncio.to_thread(self._engine.stop, wait):
            # the interpreter must not be taken down under a thread that is within the device's library
            log.warning("the engine thread is still busy: ended without it")
            if self._failure is not None:
                print(f"llorch: error: {self._failure}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1 if self._failure is not None else 0)

    def _worker(self) -> Worker:
        settings = self._settings
        timing = Timing(settings.keep_alive, settings.metrics_interval, settings.request_timeout)
        return Worker(self._engine, max_tokens_limit=settings.max_tokens_limit, timing=timing, tracer=self._tracer)

    def _limits(self) -> Limits:
        settings, descriptors = self._settings, _raise_descriptor_limit()
        most = max(1, descriptors - OWN_DESCRIPTORS)
        return Limits(settings.read_timeout, settings.write_timeout, most)

    def _server(self, worker: Worker) -> QuietServer:
        config = uvicorn.Config(
            create_app(worker, self._settings, loopback=self._loopback),
            log_config=None,
            access_log=False,
            backlog=ACCEPT_TOGETHER,
            http=cast(type[asyncio.Protocol], partial(LimitedProtocol, limits=self._limits())),
            server_header=False,
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=IDLE_CONNECTION_SECONDS,
            timeout_graceful_shutdown=CONNECTION_SECONDS,
        )
        return QuietServer(config)

    # ---- the start ----

    async def _start(self, worker: Worker) -> None:
        """Loads the model and tells the pool manager."""
        llm = await self._loaded()
        worker.metrics.built(llm)
        for line in llm.start_lines:
            log.info(line)
        if self._settings.is_demo:
            log.warning(DEMO_NOTICE)
        load_s = round(llm.load_seconds, 2)
        await self._check_chat(llm)
        # what has been loaded stays: each full collection would look through all of it again, for some 50 ms
        gc.collect()
        gc.freeze()
        log.info("ready", uri=self._uri, **served(llm), worker_id=self._worker_id, load_s=load_s)
        if self._settings.callback_url is not None:
            await self._announce(self._settings.callback_url, llm)

    async def _check_chat(self, llm: LLM) -> None:
        """A chat template that cannot be used costs the chat route alone."""
        problem = await asyncio.to_thread(llm.chat.problem)
        if problem is not None:
            log.log(logging.WARNING if llm.chat.available else logging.INFO, "no chat completions", reason=problem)

    def _started(self, starting: asyncio.Task[None]) -> None:
        """A worker that cannot start ends, and says why."""
        if not starting.cancelled() and (error := starting.exception()) is not None:
            self._failure = error
            self._stopping.set()

    async def _loaded(self) -> LLM:
        done = asyncio.Event()

        def wake() -> None:
            # a model that is ready after the process was told to end finds the loop closed
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(done.set)

        self._engine.on_ready = self._engine.on_failed = wake
        with self._loading() as self._show_load:  # ends with this task, so a terminal gets its cursor back
            self._engine.start()
            await done.wait()
        error = self._engine.load_error
        if isinstance(error, LlorchError):
            raise error
        if error is not None or self._engine.llm is None:
            raise EngineError(f"loading failed: {type(error).__name__}: {error}") from error
        return self._engine.llm

    def _load(self, progress: Progress) -> LLM:
        """On the engine's thread."""

        def report(fraction: float, text: str) -> None:
            progress(fraction, text)
            self._show_load(fraction, text)

        report(0.0, "starting")
        with self._settings.explaining():
            return load(self._settings.model, **self._settings.load_options(), progress=report)

    def _logged_loading(self) -> contextlib.AbstractContextManager[Progress]:
        return contextlib.nullcontext(LoadReport(str(self._settings.model), self._uri))

    async def _beat(self, worker: Worker, starting: asyncio.Task[None]) -> None:
        """From when the worker is ready; one that cannot start has no heart."""
        await asyncio.wait([starting])
        settings = self._settings
        if settings.heartbeat_url is not None and not starting.cancelled() and starting.exception() is None:
            await beat(worker, settings.heartbeat_url, self._worker_id, settings.heartbeat_interval)

    async def _announce(self, url: str, llm: LLM) -> None:
        registration = {
            "worker_id": self._worker_id,
            "vram_bytes": llm.device_bytes,
            "uri": self._uri,
            "model_ref": llm.model_ref,
            "worker_type": llm.provider_name,
            "memory_architecture": llm.device_info.memory_architecture,
            "capabilities": ["text-gen"],
        }
        settings = self._settings
        await announce(url, registration, timeout=settings.callback_timeout, pause=settings.callback_pause)

    # ---- signals ----

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            numbers.append(signal.SIGHUP)  # the terminal went away
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = now
            self._loop.call_soon_threadsafe(self._stopping.set)
        elif now - self._signalled > SAME_SIGNAL_SECONDS:
            print("llorch: a second signal: ended at once", file=sys.stderr, flush=True)
            os._exit(128 + number)


def _uri(host: str, port: int) -> str:
    """Where the worker can be reached from outside: a wildcard address is nobody's to connect to."""
    name = socket.gethostname() if host in ("", "0.0.0.0", "::") else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _raise_descriptor_limit() -> int:
    """Lets this process have as many connections as the system allows it, which is often more than it starts with."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return sys.maxsize
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
