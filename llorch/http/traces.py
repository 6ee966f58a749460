"""OpenTelemetry traces, of the extra `otel`: a span for each request, and within it its queue, prefill and decode.

OpenTelemetry's own variables say where they go (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, ...). The SDK sends
them in the background; the event loop never waits for it. A request that says which trace it belongs to (W3C's
`traceparent`, or what OTEL_PROPAGATORS names) is a part of that one, and recorded if that is.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from llorch.core.requests import Ended
from llorch.errors import SettingsError

if TYPE_CHECKING:
    from llorch.http.job import Job

NANOSECONDS = 1_000_000_000


class Tracer:
    """Raises SettingsError where the extra is not installed."""

    def __init__(self) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise SettingsError(f"--traces needs OpenTelemetry ({error}): pip install 'llorch[otel]'") from error
        resource = Resource.create({SERVICE_NAME: "llorch"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("llorch")

    def following(self, app: ASGIApp) -> ASGIApp:
        """The application, its requests within the traces of those who sent them."""
        from opentelemetry import context, propagate

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != ScopeType.HTTP:
                await app(scope, receive, send)
                return
            headers = defaultdict(list)
            for name, value in scope["headers"]:
                headers[name.decode("latin-1")].append(value.decode("latin-1"))
            before = context.attach(propagate.extract(headers))
            try:
                await app(scope, receive, send)
            finally:
                context.detach(before)

        return traced

    def record(self, job: Job) -> None:
        """A request that is over, as one trace or a part of its sender's. To be called where the request is served."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        moments = job.moments
        attributes: dict[str, Any] = {"llorch.job_id": job.job_id[:128], "llorch.cached_tokens": moments.cached_tokens}
        if isinstance(job.last, Ended):
            attributes |= {"gen_ai.usage.output_tokens": job.last.tokens_out, "llorch.outcome": job.last.reason.value}
        elif job.last is not None:
            attributes["llorch.outcome"] = job.last.error.code
        root = self._tracer.start_span(
            "request", kind=SpanKind.SERVER, start_time=_ns(moments.accepted), attributes=attributes
        )
        within = set_span_in_context(root)
        for name, begin, end in moments.spans():
            self._tracer.start_span(name, within, start_time=_ns(begin)).end(_ns(end))
        root.end(_ns(moments.over))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def _ns(seconds: float) -> int:
    return int(seconds * NANOSECONDS)
