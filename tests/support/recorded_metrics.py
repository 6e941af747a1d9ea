"""An implementation of `Metrics` that keeps everything in memory."""

from __future__ import annotations

import contextvars
import gc
from collections import Counter, defaultdict
from contextlib import contextmanager
from itertools import count
from threading import Lock
from weakref import finalize

from aibind_postgres.metrics import INSTRUMENTS

_current = contextvars.ContextVar("current_span", default=None)


class RecordedSpan:
    """A span. `traceparent` identifies it; `ended` are the attributes of its end."""

    def __init__(self, name, attributes, link, parent, number):
        self.name, self.attributes, self.link, self.parent = name, dict(attributes), link, parent
        self.traceparent = f"00-{number:032x}-{number:016x}-01"
        self.ended = None

    @contextmanager
    def activate(self):
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def end(self, attributes):
        assert self.ended is None
        self.ended = dict(attributes)


class RecordedMetrics:
    """Checks each name and attribute against `INSTRUMENTS`."""

    def __init__(self):
        self.counts = Counter()  # by the name, or by the name and the value of the attribute
        self.values = defaultdict(list)
        self.attributes = defaultdict(list)  # of the values
        self.spans = []
        self.stores = []
        self._numbers = count(1)
        self._mutex = Lock()

    def add(self, name, amount, attributes):
        assert INSTRUMENTS[name].kind == "counter"
        assert set(attributes) <= {INSTRUMENTS[name].attribute}
        assert amount > 0
        with self._mutex:
            self.counts[(name, *attributes.values()) if attributes else name] += amount

    def record(self, name, value, attributes):
        assert INSTRUMENTS[name].kind == "histogram"
        assert set(attributes) <= {INSTRUMENTS[name].attribute}
        with self._mutex:
            self.values[name].append(value)
            self.attributes[name].append(dict(attributes))

    def register(self, gauges):
        self.stores.append(gauges)
        return lambda: self.stores.remove(gauges)

    @property
    def gauges(self):
        """The gauges of the only store."""
        [gauges] = self.stores
        found = gauges()
        assert all(INSTRUMENTS[name].kind in ("gauge", "gauge_max") for name in found)
        return found

    def begin_span(self, name, attributes, link):
        span = RecordedSpan(name, attributes, link, _current.get(), next(self._numbers))
        self.spans.append(span)
        return span

    def traceparent(self):
        current = _current.get()
        return None if current is None else current.traceparent


class RaisingMetrics:
    """An adapter that is out of order."""

    def _fail(self, *_):
        raise OSError("the collector is gone")

    add = record = register = begin_span = traceparent = _fail


class _ForgottenStore:
    def __init__(self):
        self.cycle = self


def forget_a_store_during(observe, metrics):
    """Call `observe` with a collection of garbage after each possible allocation: it frees a registered store."""
    for _ in range(50):
        metrics.register(dict)
    thresholds = gc.get_threshold()
    gc.freeze()  # so that the many collections ignore what other tests have left
    try:
        for allocations in range(1, 60):
            gc.collect()
            finalize(_ForgottenStore(), metrics.register(dict)).atexit = False
            gc.set_threshold(allocations)
            observe()
            gc.set_threshold(*thresholds)
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
