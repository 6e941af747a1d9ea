"""Metrics and traces for OpenTelemetry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Counter, Histogram, MeterProvider, Observation
from opentelemetry.trace import Link, Status, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ..metrics import INSTRUMENTS, Attributes

_SCOPE = "aibind_postgres"
_PROPAGATOR = TraceContextTextMapPropagator()


class OpenTelemetryMetrics:
    """Reports to OpenTelemetry. Pass one object as `metrics` to all stores of a process.

    Args:
        meter_provider: Receives the metrics. Default: the global one.
        tracer_provider: Receives the spans. Default: the global one.
    """

    def __init__(
        self, *, meter_provider: MeterProvider | None = None, tracer_provider: TracerProvider | None = None
    ) -> None:
        self._tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)
        meter = metrics.get_meter(_SCOPE, meter_provider=meter_provider)
        self._stores: dict[object, Callable[[], Mapping[str, float]]] = {}  # functions that return gauges
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for name, instrument in INSTRUMENTS.items():
            text, unit = instrument.description, instrument.unit
            if instrument.kind == "counter":
                self._counters[name] = meter.create_counter(name, unit, text)
            elif instrument.kind == "histogram":
                self._histograms[name] = meter.create_histogram(
                    name, unit, text, explicit_bucket_boundaries_advisory=instrument.buckets
                )
            elif instrument.kind == "gauge":
                meter.create_observable_up_down_counter(name, [self._observer(name, sum)], unit, text)
            else:
                meter.create_observable_gauge(name, [self._observer(name, max)], unit, text)

    def add(self, name: str, amount: int, attributes: Attributes) -> None:
        """Add to a counter."""
        self._counters[name].add(amount, attributes)

    def record(self, name: str, value: float, attributes: Attributes) -> None:
        """Add a value to a histogram."""
        self._histograms[name].record(value, attributes)

    def register(self, gauges: Callable[[], Mapping[str, float]]) -> Callable[[], object]:
        """Observe the gauges of a store until the returned function is called."""
        key = object()
        self._stores[key] = gauges
        return lambda: self._stores.pop(key, None)

    def _observer(
        self, name: str, combine: Callable[[Iterable[float]], float]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(options: CallbackOptions) -> Iterable[Observation]:
            # A list, since the allocation of a tuple may run the garbage collector, which ends forgotten stores.
            values = [found[name] for gauges in list(self._stores.values()) if name in (found := gauges())]
            return [Observation(combine(values))] if values else []

        return observe

    def begin_span(self, name: str, attributes: Attributes, link: str | None) -> OpenTelemetrySpan:
        """Begin a span. It links to the span of a valid `traceparent`."""
        carrier = {} if link is None else {"traceparent": link}
        linked = trace.get_current_span(_PROPAGATOR.extract(carrier, trace.set_span_in_context(trace.INVALID_SPAN)))
        context = linked.get_span_context()
        links = [Link(context)] if context.is_valid else []
        return OpenTelemetrySpan(self._tracer.start_span(name, attributes=attributes, links=links))

    def traceparent(self) -> str | None:
        """Return the current span as a W3C `traceparent`, or None."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return carrier.get("traceparent")


class OpenTelemetrySpan:
    """A span. Use `begin_span` of `OpenTelemetryMetrics`."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def activate(self) -> AbstractContextManager[object]:
        """Return a context manager inside which this is the current span."""
        return trace.use_span(self._span, record_exception=False, set_status_on_exception=False)

    def end(self, attributes: Attributes) -> None:
        """End the span, with an error if the attributes contain `error.type`."""
        self._span.set_attributes(attributes)
        if "error.type" in attributes:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()
