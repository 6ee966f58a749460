"""OpenTelemetry traces, of the extra `otel`: a span for each request, and within it its queue, prefill and decode.

OpenTelemetry's own variables say where they go (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, ...). The SDK sends
them in the background; the event loop never waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

    def record(self, job: Job) -> None:
        """A request that is over, as one trace."""
        from opentelemetry.trace import set_span_in_context

        moments = job.moments
        attributes: dict[str, Any] = {"llorch.job_id": job.job_id[:128], "llorch.cached_tokens": moments.cached_tokens}
        if isinstance(job.last, Ended):
            attributes |= {"gen_ai.usage.output_tokens": job.last.tokens_out, "llorch.outcome": job.last.reason.value}
        elif job.last is not None:
            attributes["llorch.outcome"] = job.last.error.code
        root = self._tracer.start_span("request", start_time=_ns(moments.accepted), attributes=attributes)
        within = set_span_in_context(root)
        for name, begin, end in moments.spans():
            self._tracer.start_span(name, within, start_time=_ns(begin)).end(_ns(end))
        root.end(_ns(moments.over))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def _ns(seconds: float) -> int:
    return int(seconds * NANOSECONDS)
