"""The adapter for Prometheus, on real registries, and the files in docs that use its names."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
import yaml
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.parser import text_string_to_metric_families
from support.recorded_metrics import forget_a_store_during

from aibind_postgres import AsyncPostgresStreamStore, PostgresStreamStore
from aibind_postgres.contrib.prometheus import PrometheusMetrics
from aibind_postgres.metrics import INSTRUMENTS, Metrics

DOCS = Path(__file__).parents[2] / "docs"
LABELS = re.compile(r"\b(?:by|on) \((\w+)\)|\{(\w+)=")


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def served(registry):
    """Serve a registry through HTTP. Yield a function that scrapes it."""
    with make_server("127.0.0.1", 0, make_wsgi_app(registry), handler_class=_Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def scrape():
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as response:
                text = response.read().decode()
            return {
                (sample.name, *sample.labels.values()): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }

        try:
            yield scrape
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def registry():
    return CollectorRegistry()


def report_everything(adapter):
    for name, instrument in INSTRUMENTS.items():
        attributes = {} if instrument.attribute is None else {instrument.attribute: "x"}
        if instrument.kind == "counter":
            adapter.add(name, 2, attributes)
        elif instrument.kind == "histogram":
            adapter.record(name, 3.0, attributes)


def test_it_is_an_adapter(registry):
    assert isinstance(PrometheusMetrics(registry), Metrics)


def test_every_instrument_is_exposed(registry):
    adapter = PrometheusMetrics(registry)
    report_everything(adapter)
    gauges = {name: 5.0 for name, each in INSTRUMENTS.items() if each.kind in ("gauge", "gauge_max")}
    adapter.register(lambda: gauges)
    with served(registry) as scrape:
        found = scrape()
    for name, instrument in INSTRUMENTS.items():
        base = name.replace(".", "_") + ("_seconds" if instrument.unit == "s" else "")
        labels = () if instrument.attribute is None else ("x",)
        if instrument.kind == "counter":
            assert found[(f"{base}_total", *labels)] == 2
        elif instrument.kind == "histogram":
            assert (found[(f"{base}_count", *labels)], found[(f"{base}_sum", *labels)]) == (1, 3)
            bounds = {float(key[-1]) for key in found if key[0] == f"{base}_bucket"}
            assert bounds == {*instrument.buckets, float("inf")}
        else:
            assert found[(base,)] == 5


def test_gauges_of_several_stores(registry):
    adapter = PrometheusMetrics(registry)
    end = adapter.register(lambda: {"aibind.readers.active": 2, "aibind.housekeeping.age": 7.0})
    adapter.register(lambda: {"aibind.readers.active": 3, "aibind.housekeeping.age": 5.0})
    with served(registry) as scrape:
        found = scrape()
        assert (found["aibind_readers_active",], found["aibind_housekeeping_age_seconds",]) == (5, 7)
        end()
        found = scrape()
        assert (found["aibind_readers_active",], found["aibind_housekeeping_age_seconds",]) == (3, 5)


def test_store_that_is_freed_during_a_scrape(registry):
    adapter = PrometheusMetrics(registry)
    forget_a_store_during(lambda: next(adapter._gauges.collect()), adapter)


def test_second_adapter_on_one_registry_is_refused(registry):
    PrometheusMetrics(registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PrometheusMetrics(registry)


def test_store(dsn, tables, registry):
    with PostgresStreamStore(dsn, **tables, metrics=PrometheusMetrics(registry)) as store:
        id = store.create()
        store.append_many(id, ["a", "b"])
        store.complete(id)
        with served(registry) as scrape:
            found = scrape()
    assert found["aibind_streams_created_total",] == 1
    assert found["aibind_streams_ended_total", "done"] == 1
    assert (found["aibind_append_chunks_sum",], found["aibind_append_chunks_count",]) == (2, 1)
    assert found["aibind_append_duration_seconds_count",] == 1
    assert found["aibind_writers_active",] == 0


async def test_asynchronous_store(dsn, tables, registry):
    async with AsyncPostgresStreamStore(dsn, **tables, metrics=PrometheusMetrics(registry)) as store:
        await store.append(await store.create(), "a")
    assert registry.get_sample_value("aibind_append_duration_seconds_count") == 1


def test_a_hundred_threads(dsn, tables, registry):
    with PostgresStreamStore(dsn, **tables, metrics=PrometheusMetrics(registry)) as store:
        ids = [store.create() for _ in range(100)]
        with ThreadPoolExecutor(100) as threads:
            assert list(threads.map(lambda id: store.append(id, "x"), ids)) == [1] * 100
    assert registry.get_sample_value("aibind_append_duration_seconds_count") == 100
    assert registry.get_sample_value("aibind_append_chunks_sum") == 100


def expressions():
    dashboard = json.loads((DOCS / "grafana.json").read_text("utf-8"))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
    for rule in rules():
        yield rule["alert"], rule["expr"]


def rules():
    [group] = yaml.safe_load((DOCS / "alerts.yml").read_text("utf-8"))["groups"]
    return group["rules"]


@pytest.mark.parametrize(("place", "expression"), [pytest.param(*each, id=each[0]) for each in expressions()])
def test_queries_name_metrics_of_the_adapter(registry, place, expression):
    adapter = PrometheusMetrics(registry)
    report_everything(adapter)
    names = {sample.name: set() for family in registry.collect() for sample in family.samples}
    names |= {family.name: set() for family in registry.collect() if family.type == "gauge"}
    for family in registry.collect():
        for sample in family.samples:
            names[sample.name] |= sample.labels.keys()
    used = set(re.findall(r"\b(?:aibind|gen_ai)_\w+", expression))
    assert used <= names.keys()
    labels = {label for pair in LABELS.findall(expression) for label in pair if label}
    assert labels <= {"instance"}.union(*(names[name] for name in used))


def test_dashboard_shows_every_metric():
    shown = set(re.findall(r"\b(?:aibind|gen_ai)_\w+", (DOCS / "grafana.json").read_text("utf-8")))
    missing = [name for name in INSTRUMENTS if not any(each.startswith(name.replace(".", "_")) for each in shown)]
    assert missing == []


def test_alerts_are_those_of_the_page():
    page = (DOCS / "telemetry.md").read_text("utf-8")
    assert re.findall(r"^\| `(Aibind\w+)` \|", page, re.MULTILINE) == [rule["alert"] for rule in rules()]
    assert all(rule["labels"]["severity"] in ("warning", "critical") for rule in rules())
