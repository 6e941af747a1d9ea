"""Metrics: the interface of adapters, and the table of everything that stores report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

Attributes: TypeAlias = Mapping[str, str]


class Span(Protocol):
    """A span of a trace, as of a producer or of a reader."""

    def activate(self) -> AbstractContextManager[object]:
        """Return a context manager inside which this is the current span: new spans are its children."""

    def end(self, attributes: Attributes) -> None:
        """End the span. The attributes contain `error.type` after a failure."""


@runtime_checkable
class Metrics(Protocol):
    """Receives the measurements of stores, for a monitoring system. Pass it to the store as `metrics`.

    `aibind_postgres.contrib.opentelemetry` and `aibind_postgres.contrib.prometheus` contain implementations. The names
    are those of `INSTRUMENTS`; a release may add others.

    Several threads call the methods at the same time. One of them may run an event loop, so the methods must not block.
    If a method raises, callers of the store are not affected. The first exception of a store is logged as a warning.
    """

    def add(self, name: str, amount: int, attributes: Attributes) -> None:
        """Add a positive number to a counter."""

    def record(self, name: str, value: float, attributes: Attributes) -> None:
        """Add a value to a histogram."""

    def register(self, gauges: Callable[[], Mapping[str, float]]) -> Callable[[], object]:
        """Collect the gauges of one store: call `gauges` at each collection, from any thread.

        The values of several stores are added. For the kind `gauge_max`, the largest value counts instead.

        Args:
            gauges: Returns the values by the names of the gauges.

        Returns:
            A function that ends the collection. It is called when the store is closed or garbage-collected.
        """

    def begin_span(self, name: str, attributes: Attributes, link: str | None) -> Span | None:
        """Begin a span, as a child of the current one.

        Args:
            name: `aibind.produce` or `aibind.read`.
            attributes: `aibind.stream.id`, and for the stream of a conversation `gen_ai.conversation.id`.
            link: The `traceparent` of the span to link to, or None.

        Returns:
            The span, or None if the adapter has no traces.
        """

    def traceparent(self) -> str | None:
        """Return the current span as a W3C `traceparent`, or None. A new stream keeps it in its metadata."""


class Instrument(NamedTuple):
    """One metric.

    Attributes:
        kind: The values of a `gauge` in several stores are added; of those of a `gauge_max`, the largest one counts.
        unit: `s` for seconds, or what is counted, in braces, as in UCUM.
        description: The meaning.
        attribute: The name of the only attribute, or None.
        buckets: The upper bounds of a histogram, or None.
    """

    kind: Literal["counter", "histogram", "gauge", "gauge_max"]
    unit: str
    description: str
    attribute: str | None = None
    buckets: Sequence[float] | None = None


STREAMS_CREATED = "aibind.streams.created"
STREAMS_ENDED = "aibind.streams.ended"
APPEND_DURATION = "aibind.append.duration"
APPEND_CHUNKS = "aibind.append.chunks"
DELIVERY_DURATION = "aibind.delivery.duration"
STREAMS_NOTIFIED = "aibind.streams.notified"
NOTIFICATIONS_RECEIVED = "aibind.notifications.received"
POLLS = "aibind.polls"
RECONNECTS = "aibind.listener.reconnects"
SWITCHES = "aibind.listener.switches"
RETRIES = "aibind.database.retries"
LEASES_EXPIRED = "aibind.leases.expired"
HOUSEKEEPING_ROWS = "aibind.housekeeping.rows"
HOUSEKEEPING_FAILURES = "aibind.housekeeping.failures"
HOUSEKEEPING_AGE = "aibind.housekeeping.age"
WRITERS_ACTIVE = "aibind.writers.active"
READERS_ACTIVE = "aibind.readers.active"
STORES_LISTENING = "aibind.stores.listening"
STORES_POLLING = "aibind.stores.polling"
SOURCE_DURATION = "gen_ai.client.operation.duration"
TIME_TO_FIRST_CHUNK = "gen_ai.client.operation.time_to_first_chunk"
TIME_PER_CHUNK = "gen_ai.client.operation.time_per_output_chunk"

_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000)
_SHORT_TIMES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_MODEL_TIMES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)

INSTRUMENTS: Mapping[str, Instrument] = {
    STREAMS_CREATED: Instrument("counter", "{stream}", "Streams that this process has created"),
    STREAMS_ENDED: Instrument("counter", "{stream}", "Streams that calls of this process have ended", "state"),
    APPEND_DURATION: Instrument(
        "histogram", "s", "Time from the call of an append until its chunks are durable", buckets=_SHORT_TIMES
    ),
    APPEND_CHUNKS: Instrument("histogram", "{chunk}", "Chunks that one statement has stored", buckets=_COUNTS),
    DELIVERY_DURATION: Instrument(
        "histogram", "s", "Time from the insertion of a chunk to its delivery to a waiting reader", buckets=_SHORT_TIMES
    ),
    STREAMS_NOTIFIED: Instrument("counter", "{stream}", "Streams named in notifications that this process has sent"),
    NOTIFICATIONS_RECEIVED: Instrument("counter", "{notification}", "Notifications received by the LISTEN connection"),
    POLLS: Instrument("counter", "{poll}", "Queries for changes without a notification"),
    RECONNECTS: Instrument("counter", "{connection}", "LISTEN connections opened after the loss of one"),
    SWITCHES: Instrument("counter", "{switch}", "Switches between notifications and polling, by the new mode", "mode"),
    RETRIES: Instrument("counter", "{attempt}", "Attempts repeated because the server could not be reached"),
    LEASES_EXPIRED: Instrument("counter", "{stream}", "Streams ended by this process because of an expired lease"),
    HOUSEKEEPING_ROWS: Instrument("counter", "{row}", "Rows that the housekeeper of this process has changed", "kind"),
    HOUSEKEEPING_FAILURES: Instrument("counter", "{failure}", "Parts of housekeeping that failed in this process"),
    HOUSEKEEPING_AGE: Instrument(
        "gauge_max",
        "s",
        "Time since the last housekeeping that succeeded in this process or ran in another one, or since the start",
    ),
    WRITERS_ACTIVE: Instrument("gauge", "{writer}", "Writers in this process, also those of producers"),
    READERS_ACTIVE: Instrument("gauge", "{reader}", "Readers in this process that follow a stream"),
    STORES_LISTENING: Instrument("gauge", "{store}", "Stores with readers or writers woken by notifications"),
    STORES_POLLING: Instrument("gauge", "{store}", "Stores with readers or writers woken by polling alone"),
    SOURCE_DURATION: Instrument(
        "histogram", "s", "Time from the start to the end of a source", "error.type", _MODEL_TIMES
    ),
    TIME_TO_FIRST_CHUNK: Instrument("histogram", "s", "Time to the first item of a source", buckets=_MODEL_TIMES),
    TIME_PER_CHUNK: Instrument("histogram", "s", "Time to each further item of a source", buckets=_MODEL_TIMES),
}
