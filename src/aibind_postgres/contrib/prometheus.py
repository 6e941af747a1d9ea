"""Metrics for Prometheus, with the package `prometheus_client`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ..metrics import INSTRUMENTS, Attributes


class PrometheusMetrics:
    """Reports to a registry of `prometheus_client`. Pass one object as `metrics` to all stores of a process.

    Names of times end with `_seconds` and names of counters with `_total`, as in `aibind_append_duration_seconds`.
    Spans are not supported. In the multiprocess mode of `prometheus_client`, gauges are missing.

    Args:
        registry: The registry. Default: the global one.

    Raises:
        ValueError: An object of this class has been registered already.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._gauges = _Gauges()
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for name, instrument in INSTRUMENTS.items():
            label = [] if instrument.attribute is None else [_underscored(instrument.attribute)]
            if instrument.kind == "counter":
                self._counters[name] = Counter(metric_name(name), instrument.description, label, registry=registry)
            elif instrument.kind == "histogram":
                buckets = instrument.buckets or Histogram.DEFAULT_BUCKETS
                self._histograms[name] = Histogram(
                    metric_name(name), instrument.description, label, buckets=buckets, registry=registry
                )
        registry.register(self._gauges)

    def add(self, name: str, amount: int, attributes: Attributes) -> None:
        """Add to a counter."""
        counter = self._counters[name]
        (counter.labels(*attributes.values()) if attributes else counter).inc(amount)

    def record(self, name: str, value: float, attributes: Attributes) -> None:
        """Add a value to a histogram."""
        histogram = self._histograms[name]
        if INSTRUMENTS[name].attribute is not None:
            histogram = histogram.labels(*(attributes.values() or [""]))
        histogram.observe(value)

    def register(self, gauges: Callable[[], Mapping[str, float]]) -> Callable[[], object]:
        """Collect the gauges of a store until the returned function is called."""
        key = object()
        self._gauges.stores[key] = gauges
        return lambda: self._gauges.stores.pop(key, None)

    def begin_span(self, name: str, attributes: Attributes, link: str | None) -> None:
        """Return None, since there are no spans."""

    def traceparent(self) -> None:
        """Return None, since there are no spans."""


class _Gauges(Collector):
    """Asks the stores of this process at each scrape."""

    def __init__(self) -> None:
        self.stores: dict[object, Callable[[], Mapping[str, float]]] = {}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        # A list, since the allocation of a tuple may run the garbage collector, which ends forgotten stores.
        found = [gauges() for gauges in list(self.stores.values())]
        for name, family in self._families():
            if values := [gauges[name] for gauges in found if name in gauges]:
                family.add_metric([], max(values) if INSTRUMENTS[name].kind == "gauge_max" else sum(values))
            yield family

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges without values, so that the registry refuses a second object with the same names."""
        for _, family in self._families():
            yield family

    def _families(self) -> Iterator[tuple[str, GaugeMetricFamily]]:
        for name, instrument in INSTRUMENTS.items():
            if instrument.kind in ("gauge", "gauge_max"):
                yield name, GaugeMetricFamily(metric_name(name), instrument.description)


def metric_name(name: str) -> str:
    """Return the name of a metric in Prometheus. `prometheus_client` adds `_total` to that of a counter."""
    return _underscored(name) + ("_seconds" if INSTRUMENTS[name].unit == "s" else "")


def _underscored(name: str) -> str:
    return name.replace(".", "_")
