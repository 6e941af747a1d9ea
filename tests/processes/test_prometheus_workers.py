"""The adapter for Prometheus in the multiprocess mode of `prometheus_client`, as in the workers of gunicorn."""

from __future__ import annotations

import os
import subprocess
import sys

WORKER = """
from aibind_postgres import PostgresStreamStore
from aibind_postgres.contrib.prometheus import PrometheusMetrics

with PostgresStreamStore({dsn!r}, metrics=PrometheusMetrics()) as store:
    store.append_many(store.create(), ["a", "b"])
"""
COLLECTOR = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess

registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def run(code, folder):
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout


def test_counters_and_histograms_of_all_workers_are_added(database, tmp_path):
    for _ in range(2):
        run(WORKER.format(dsn=database), tmp_path)
    lines = run(COLLECTOR, tmp_path).splitlines()
    assert "aibind_streams_created_total 2.0" in lines
    assert "aibind_append_chunks_sum 4.0" in lines
    assert "aibind_append_duration_seconds_count 2.0" in lines
    assert [line for line in lines if line.startswith("aibind_writers_active")] == []  # as docs/telemetry.md states
