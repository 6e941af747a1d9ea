"""The benchmark of fleets: a short run with its tables, lost tokens, and the rules and formulas."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("fleet_figures", "fleet_process", "fleet_run", "sizing")
    return SimpleNamespace(**{name: import_module(f"benchmarks.{name}") for name in names})


def run(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_run_and_tables(tmp_path):
    results, page = tmp_path / "fleet.json", shutil.copy(ROOT / "docs" / "scale.md", tmp_path)
    run("benchmarks.fleet", "--processes", 2, "--tokens", 60, "--seconds", 2, "--json", results)
    about = json.loads(results.read_text("utf-8"))
    [found] = about["runs"]
    assert found["tokens"] > 0
    assert found["deliveries"] > 0
    assert found["listening"] == 3
    assert found["statements"]["read"] > 0
    # The tables do not depend on whether this machine keeps up.
    results.write_text(json.dumps({**about, "runs": [{**found, "tokens": 120, "seconds": 2.0}]}), "utf-8")
    run("benchmarks.sizing", results, "--page", page)
    text = Path(page).read_text("utf-8")
    assert "| 2 processes, 62 streams of" in text
    assert "| 60,000 | 2,000 |" in text


def test_wrong_tokens_fail(modules):
    process = modules.fleet_process
    written = process.Content().followed_by("one").followed_by("two")
    swapped = process.Content().followed_by("two").followed_by("one")

    def report(*read):
        return process.Report(written={"a": written}, read=[("a", content) for content in read])

    modules.fleet_run.check([report(written, written)], 2)
    for read, readers in [
        ([written], 2),
        ([swapped], 1),
        ([process.Content().followed_by("one")], 1),
        ([written.followed_by("two")], 1),
    ]:
        with pytest.raises(RuntimeError, match="reader"):
            modules.fleet_run.check([report(*read)], readers)


def test_failed_processes(modules):
    class Pipe:
        def __init__(self, *answers):
            self._answers = list(answers)

        def poll(self, timeout):
            return bool(self._answers)

        def recv(self):
            if isinstance(answer := self._answers.pop(), Exception):
                raise answer
            return answer

    assert modules.fleet_run.receive(Pipe("ready"), 1) == "ready"
    for pipe, text in [(Pipe(), "sent nothing"), (Pipe(EOFError()), "died"), (Pipe("Error: x"), "failed: Error: x")]:
        with pytest.raises(RuntimeError, match=text):
            modules.fleet_run.receive(pipe, 1)


def test_times_in_tokens(modules):
    for now in (0.0, 12.5, 167.77, 10_000.0):
        token = modules.fleet_process.stamp(now)
        assert len(token) == 4
        assert modules.fleet_process.delay_of(token, now + 3) == pytest.approx(3, abs=2e-5)


def test_largest_fleet(modules):
    largest = modules.fleet_figures.largest
    assert largest(64, 100_000, 1_000) == (64, 2_000, 4_000, 24.0, True)
    assert largest(2, 100_000, 1_000)[:4] == (64, 2_000, 4_000, 0.75)
    assert largest(64, 100_000, 1_000).tokens == 48_000
    assert largest(4, 100_000, 100)[:3] == (7, 219, 438)  # by connections
    assert largest(4, 4_096, 1_000)[0] == 16  # by memory
    assert largest(1_000, 100_000, 1_000).rate == 30


def test_streams_are_spread(modules):
    size = modules.fleet_figures.Size(8, 20, 400, 1.0)
    streams = [str(number) for number in range(20)]
    parts = list(modules.fleet_run.parts(None, size, streams))
    assert sorted(stream for part in parts for stream in part.written) == sorted(streams)
    assert sorted(stream for part in parts for stream in part.read) == sorted(streams * 20)
    own = sum(stream in part.written for part in parts for stream in part.read)
    assert 0 < own < 400 / 4


def test_costs_of_two_causes(modules):
    shares = modules.sizing.shares
    assert shares([(100, 10, 100 * 2 + 10 * 3), (50, 400, 50 * 2 + 400 * 3)]) == pytest.approx((2, 3))
    assert shares([(100, 0, 200)]) == pytest.approx((2, 0))
    assert shares([(10, 10, 20), (100, 10, 210)])[1] == 0  # not negative


def test_costs_of_runs(modules):
    figures, sizing = modules.fleet_figures, modules.sizing
    size = figures.Size(4, 10, 20, 1.0)

    def run(tokens, received, idle_received, size=size):
        values = dict.fromkeys(figures.Run.__annotations__, 0)
        found = {
            "size": size._replace(rate=tokens / 100),
            "seconds": 10.0,
            "tokens": tokens,
            "received": received,
            "processor": tokens * 0.002 + received * 0.001,
            "server_processor": tokens * 0.003 + received * 0.0005,
            "idle_received": idle_received,
            "idle_processor": idle_received * 0.001,
            "disk": tokens * 200,
            "wal": tokens * 500,
        }
        return figures.Run(**{**values, **found})

    polling = run(1_000, 0, 1, size._replace(notify=False))
    found = sizing.costs([run(100, 200, 50), run(1_000, 400, 100), polling])
    assert found == pytest.approx((0.002, 0.001, 0.003, 0.0005, 200, 500, 0))
    with pytest.raises(ValueError, match="no fleet has kept up"):
        sizing.costs([polling])


def test_sizes(modules):
    sizing = modules.sizing
    costs = sizing.Costs(0.0004, 0.00002, 0.0003, 0.00002, 200.0, 400.0, 50.0)
    small, large = sizing.sizing(100, costs), sizing.sizing(60_000, costs)
    assert small.processes == 2
    assert small.steps == []
    assert small.notifications == 100
    assert large.processes > 60_000 * 0.0004
    assert large.steps == [
        "a pooler or `max_connections`",
        "archiving",
        "time partitions",
        "several databases or Citus",
    ]
    assert large.disk == 60_000 * 86_400 * 200
    assert sizing.notifications(60_000, 64) == 1_000
    assert sizing.notifications(60_000, 5) == 500
    assert sizing.notifications(60_000, 200) == 2_000
