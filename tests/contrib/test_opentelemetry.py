"""The adapter for OpenTelemetry, with the real SDK."""

from __future__ import annotations

import asyncio

import pytest
from opentelemetry.metrics import CallbackOptions
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from support.concurrency import async_until
from support.recorded_metrics import forget_a_store_during

from aibind_postgres import AsyncDurableStream, AsyncPostgresStreamStore, DurableStream, PostgresStreamStore
from aibind_postgres.contrib.opentelemetry import OpenTelemetryMetrics
from aibind_postgres.metrics import INSTRUMENTS, Metrics


class Telemetry:
    """An adapter with an SDK that keeps everything in memory."""

    def __init__(self):
        self._reader, self._exporter = InMemoryMetricReader(), InMemorySpanExporter()
        self.meters, self.tracers = MeterProvider([self._reader]), TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.tracers.get_tracer("test")
        self.adapter = OpenTelemetryMetrics(meter_provider=self.meters, tracer_provider=self.tracers)

    @property
    def metrics(self):
        """The metrics by their names."""
        data = self._reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def points(self, name):
        return list(self.metrics[name].data.data_points)

    def spans(self, name):
        return [span for span in self._exporter.get_finished_spans() if span.name == name]


@pytest.fixture
def telemetry():
    found = Telemetry()
    yield found
    found.meters.shutdown()
    found.tracers.shutdown()


def test_it_is_an_adapter(telemetry):
    assert isinstance(telemetry.adapter, Metrics)


def test_every_instrument(telemetry):
    for name, instrument in INSTRUMENTS.items():
        attributes = {} if instrument.attribute is None else {instrument.attribute: "x"}
        if instrument.kind == "counter":
            telemetry.adapter.add(name, 2, attributes)
        elif instrument.kind == "histogram":
            telemetry.adapter.record(name, 3.0, attributes)
    end = telemetry.adapter.register(lambda: {name: 5.0 for name, each in INSTRUMENTS.items()})
    telemetry.adapter.register(lambda: {"aibind.readers.active": 3.0, "aibind.housekeeping.age": 3.0})
    found = telemetry.metrics
    assert found.keys() == INSTRUMENTS.keys()
    for name, instrument in INSTRUMENTS.items():
        [point] = found[name].data.data_points
        assert (found[name].unit, found[name].description) == (instrument.unit, instrument.description)
        assert dict(point.attributes or {}) == ({} if instrument.attribute is None else {instrument.attribute: "x"})
        if instrument.kind == "histogram":
            assert (point.sum, point.count, tuple(point.explicit_bounds)) == (3.0, 1, tuple(instrument.buckets))
    assert telemetry.points("aibind.readers.active")[0].value == 8.0
    assert telemetry.points("aibind.housekeeping.age")[0].value == 5.0
    end()
    assert telemetry.points("aibind.readers.active")[0].value == 3.0


def test_store_that_is_freed_during_a_collection(telemetry):
    observe = telemetry.adapter._observer("aibind.readers.active", sum)
    forget_a_store_during(lambda: observe(CallbackOptions()), telemetry.adapter)


def test_metrics_of_a_store(dsn, tables, telemetry):
    with PostgresStreamStore(dsn, **tables, metrics=telemetry.adapter) as store:
        id = store.create()
        store.append_many(id, ["a", "b"])
        store.stop(id)
        assert telemetry.points("aibind.writers.active")[0].value == 0
    assert telemetry.points("aibind.streams.created")[0].value == 1
    assert dict(telemetry.points("aibind.streams.ended")[0].attributes) == {"state": "stopped"}
    assert telemetry.points("aibind.append.chunks")[0].sum == 2
    assert telemetry.points("aibind.append.duration")[0].count == 1


def is_child(span, parent):
    return span.parent is not None and span.parent.span_id == parent.get_span_context().span_id


def links(span):
    return [link.context.span_id for link in span.links]


def test_producer_is_a_child_of_the_request_and_readers_link_to_it(dsn, tables, telemetry):
    def source():
        with telemetry.tracer.start_as_current_span("model"):
            yield "x"

    with PostgresStreamStore(dsn, **tables, metrics=telemetry.adapter) as store:
        with telemetry.tracer.start_as_current_span("request") as request:
            stream = DurableStream.start(store, source(), session_id="chat")
        stream.wait()
        with telemetry.tracer.start_as_current_span("later request") as later:
            assert b"x" in b"".join(DurableStream.resume(store, stream.id).sse())
    [produced], [read], [model] = map(telemetry.spans, ("aibind.produce", "aibind.read", "model"))
    assert is_child(produced, request)
    assert is_child(model, produced)
    assert is_child(read, later)
    assert links(read) == [produced.context.span_id]
    assert dict(produced.attributes) == {
        "aibind.stream.id": stream.id,
        "gen_ai.conversation.id": "chat",
        "aibind.end_reason": "source_finished",
    }
    assert dict(read.attributes) == {"aibind.stream.id": stream.id}
    assert {produced.status.status_code, read.status.status_code} == {StatusCode.UNSET}


async def test_failed_source(dsn, tables, telemetry):
    async def source():
        yield "x"
        raise LookupError

    async with AsyncPostgresStreamStore(dsn, **tables, metrics=telemetry.adapter) as store:
        stream = await AsyncDurableStream.start(store, source())
        await stream.wait()
    [produced] = telemetry.spans("aibind.produce")
    assert produced.status.status_code is StatusCode.ERROR
    assert produced.attributes["error.type"] == "source_failed"
    [duration] = telemetry.points("gen_ai.client.operation.duration")
    assert dict(duration.attributes) == {"error.type": "LookupError"}


async def test_reader_whose_task_is_cancelled_has_not_failed(dsn, tables, telemetry):
    """As by a web server, when a client disconnects."""

    async def read():
        async for piece in stream.sse():
            pieces.append(piece)

    pieces = []
    async with AsyncPostgresStreamStore(dsn, **tables, metrics=telemetry.adapter) as store:
        await store.append(await store.create("one"), "a")
        stream = await AsyncDurableStream.resume(store, "one")
        reader = asyncio.create_task(read())
        await async_until(lambda: pieces)
        reader.cancel()
        await asyncio.wait([reader])
    [span] = telemetry.spans("aibind.read")
    assert (span.status.status_code, dict(span.attributes)) == (StatusCode.UNSET, {"aibind.stream.id": "one"})


@pytest.mark.parametrize("link", ["", "00-" + "0" * 32 + "-0000000000000000-01", "of the application"])
def test_invalid_traceparent_is_no_link(telemetry, link):
    with telemetry.tracer.start_as_current_span("request"):
        telemetry.adapter.begin_span("aibind.read", {}, link).end({})
    assert telemetry.spans("aibind.read")[0].links == ()


def test_no_current_span(telemetry):
    assert telemetry.adapter.traceparent() is None
