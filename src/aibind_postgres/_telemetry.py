"""The metrics of one store: the adapter, whose exceptions are logged, never raised; spans; the times of a source."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import count
from time import monotonic
from typing import Any, TypeVar

from .metrics import SOURCE_DURATION, TIME_PER_CHUNK, TIME_TO_FIRST_CHUNK, Attributes, Metrics, Span

logger = logging.getLogger("aibind_postgres.metrics")

T = TypeVar("T")
StoreT = TypeVar("StoreT")
NO_ATTRIBUTES: Attributes = {}
TRACEPARENT = "traceparent"  # the key in the metadata of a stream
SAMPLE_PAUSE = 1.0  # seconds between two measurements of the time from a writer to a reader


class StoreMetrics:
    """The adapter of one store. Its exceptions are logged, the first one as a warning.

    Raises:
        TypeError: The adapter lacks a method of `Metrics`.
    """

    def __init__(self, metrics: Metrics) -> None:
        if not isinstance(metrics, Metrics):
            raise TypeError(f"metrics must have the methods of aibind_postgres.metrics.Metrics, unlike {metrics!r}")
        self._metrics = metrics
        self._failures = count()
        self._sampled_at = 0.0

    def add(self, name: str, amount: int, attributes: Attributes = NO_ATTRIBUTES) -> None:
        """Add to a counter. Zero is not reported."""
        if amount:
            try:
                self._metrics.add(name, amount, attributes)
            except Exception:
                self._log_failure()

    def record(self, name: str, value: float, attributes: Attributes = NO_ATTRIBUTES) -> None:
        """Add a value to a histogram."""
        try:
            self._metrics.record(name, value, attributes)
        except Exception:
            self._log_failure()

    def register(self, gauges: Callable[[], Mapping[str, float]]) -> Callable[[], object]:
        """Report gauges until the returned function is called."""
        unregister = self.guarded(lambda: self._metrics.register(gauges), None)
        return lambda: self.guarded(unregister, None) if unregister is not None else None

    def begin_span(self, name: str, attributes: Attributes, link: str | None) -> Span | None:
        """Begin a span, or return None if the adapter has no traces."""
        return self.guarded(lambda: self._metrics.begin_span(name, attributes, link), None)

    def traceparent(self) -> str | None:
        """Return the current span as a W3C `traceparent`, or None."""
        return self.guarded(self._metrics.traceparent, None)

    def with_traceparent(self, metadata: Any) -> Any:
        """Return the metadata of a new stream with the current span added, if they are an object without the key."""
        if metadata is not None and (not isinstance(metadata, dict) or TRACEPARENT in metadata):
            return metadata
        traceparent = self.traceparent()
        return metadata if traceparent is None else {**(metadata or {}), TRACEPARENT: traceparent}

    def begin_sample(self, now: float) -> bool:
        """Return True if the time from a writer to a reader should be measured now."""
        is_due = now - self._sampled_at >= SAMPLE_PAUSE
        if is_due:
            self._sampled_at = now
        return is_due

    def guarded(self, call: Callable[[], T], default: T) -> T:
        """Call the adapter. Return the default if it raises."""
        try:
            return call()
        except Exception:
            self._log_failure()
            return default

    def _log_failure(self) -> None:
        logger.log(
            logging.DEBUG if next(self._failures) else logging.WARNING,
            "metrics of type %s raised an exception, and a measurement is lost; streams are not affected. Further "
            "exceptions are logged at level DEBUG",
            type(self._metrics).__name__,
            exc_info=True,
        )


class StoreSpan:
    """A span whose exceptions are logged, or no span.

    Inside its block it is the current span. If the block raises, the span ends; otherwise it goes on until `end`.

    Args:
        metrics: The metrics of the store, or None.
        name: The name of the span.
        stream_id: The stream id.
        session_id: The id of the conversation of the stream; None by default.
        link: The `traceparent` of the span to link to; None by default.
    """

    def __init__(
        self,
        metrics: StoreMetrics | None,
        name: str,
        stream_id: str,
        session_id: str | None = None,
        link: str | None = None,
    ) -> None:
        self._metrics = metrics
        self._span: Span | None = None
        self._activation: AbstractContextManager[object] | None = None
        self.traceparent: str | None = None
        if metrics is not None:
            attributes = {"aibind.stream.id": stream_id}
            if session_id is not None:
                attributes["gen_ai.conversation.id"] = session_id
            self._span = metrics.begin_span(name, attributes, link)
            if self._span is not None:
                with self:
                    self.traceparent = metrics.traceparent()

    def __enter__(self) -> None:
        if self._metrics is not None and (span := self._span) is not None:
            self._activation = self._metrics.guarded(lambda: _entered(span.activate()), None)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        activation, self._activation = self._activation, None
        if self._metrics is not None and activation is not None:
            self._metrics.guarded(lambda: activation.__exit__(None, None, None), None)
        if error is not None:
            self.end(error_attributes(error))

    def end(self, attributes: Attributes = NO_ATTRIBUTES) -> None:
        """End the span. Safe to repeat."""
        span, self._span = self._span, None
        if self._metrics is not None and span is not None:
            self._metrics.guarded(lambda: span.end(attributes), None)


class SourceTimes:
    """Reports the times of the items of one source, and when its block is left, the duration.

    Args:
        metrics: The metrics of the store.
        began_at: The time at which the source was asked for its first item.
    """

    def __init__(self, metrics: StoreMetrics, began_at: float) -> None:
        self._metrics = metrics
        self._began_at = self._asked_at = began_at
        self._name = TIME_TO_FIRST_CHUNK

    def arrived(self, now: float) -> None:
        """Record that an item has arrived."""
        self._metrics.record(self._name, now - self._asked_at)
        self._name = TIME_PER_CHUNK

    def asked(self, now: float) -> None:
        """Record that the source is asked for the next item, after the previous one has been stored."""
        self._asked_at = now

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._metrics.record(SOURCE_DURATION, monotonic() - self._began_at, error_attributes(error))


def report_gauges(
    metrics: StoreMetrics | None, store: StoreT, gauges_of: Callable[[StoreT], Mapping[str, float]]
) -> Callable[[], object]:
    """Report the gauges of a store until it is freed, or the returned function is called.

    The adapter holds no reference to the store, so that a forgotten store is freed.
    """
    if metrics is None:
        return _do_nothing
    reference = weakref.ref(store)

    def gauges() -> Mapping[str, float]:
        found = reference()
        return {} if found is None else gauges_of(found)

    end = weakref.finalize(store, metrics.register(gauges))
    end.atexit = False
    return end


def error_attributes(error: BaseException | None) -> Attributes:
    """Return the attribute of a failure; none after a success."""
    return NO_ATTRIBUTES if error is None else {"error.type": type(error).__qualname__}


def link_in(metadata: object) -> str | None:
    """Return the `traceparent` in the metadata of a stream."""
    found = metadata.get(TRACEPARENT) if isinstance(metadata, dict) else None
    return found if isinstance(found, str) else None


def _entered(context: AbstractContextManager[object]) -> AbstractContextManager[object]:
    context.__enter__()
    return context


def _do_nothing() -> None:
    pass
