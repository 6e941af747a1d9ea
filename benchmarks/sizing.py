"""The costs of a fleet, and the table of sizes in docs/scale.md. `python -m benchmarks.sizing fleet.json` writes it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer

from aibind_postgres._notify_pace import MAX_REST, MAX_REST_UNDELAYED, MAX_TRAFFIC

from .fleet_figures import CONNECTIONS, KEPT_UP, RATE, Run, from_json

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"

PROCESS_LOAD = 0.5  # of a core; the rest is for the application and for peaks
ARCHIVED = 10  # bytes of an archived token with its time, at most
SIZES = (100, 500, 2_000, 5_000, 20_000, 60_000)  # tokens/s

# The limits at which a table of sizes recommends the next step.
DEFAULT_CONNECTIONS = 100  # PostgreSQL's max_connections
ARCHIVE_AT, PARTITION_AT = 10e9, 50e9  # bytes for each day
LARGE_SERVER = 16  # cores


class Costs(NamedTuple):
    """Costs on the measured machine. Processor times are seconds."""

    process_token: float  # of the processes, for a token and its two readers
    process_notification: float  # of a process, for a notification that it receives
    server_token: float | None  # of the server; None if it was not measured
    server_notification: float | None  # of the server, for each process that receives it
    disk: float  # bytes of a token
    wal: float
    memory: float  # MiB of a process


class Sizing(NamedTuple):
    tokens: float  # in one second
    processes: int
    notifications: float  # received by each process in one second
    server: float | None  # cores
    connections: int  # at most
    disk: float  # bytes for each day
    archived: float
    wal: float

    @property
    def steps(self) -> list[str]:
        """The next steps for this size."""
        found = {
            "a pooler or `max_connections`": self.connections > DEFAULT_CONNECTIONS,
            "archiving": self.disk >= ARCHIVE_AT,
            "time partitions": self.disk >= PARTITION_AT,
            "several databases or Citus": self.server is not None and self.server > LARGE_SERVER,
        }
        return [step for step, is_due in found.items() if is_due]


def costs(runs: Sequence[Run]) -> Costs:
    """Return the costs that explain the processor times of the fleets that kept up and were notified.

    The cost of a notification for a process is measured directly, by the process that follows none of the streams.
    """
    runs = [run for run in runs if run.reached >= KEPT_UP and run.size.notify]
    if not runs:
        raise ValueError("no fleet has kept up: run smaller ones")
    notification = max(runs, key=lambda run: run.rate(run.idle_received)).idle_cost
    token, _ = shares([(run.tokens, 0.0, max(0.0, run.processor - run.received * notification)) for run in runs])
    servers = [run.server_processor for run in runs if run.server_processor is not None]
    server: tuple[float | None, float | None] = (None, None)
    if len(servers) == len(runs):
        server = shares([(run.tokens, run.received, used) for run, used in zip(runs, servers, strict=True)])
    longest = max(runs, key=lambda run: run.tokens)
    memory = max(run.memory for run in runs)
    return Costs(token, notification, *server, longest.per_token(longest.disk), longest.per_token(longest.wal), memory)


def shares(rows: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """Return a and b, neither negative, so that a * x + b * y is near z for each row (x, y, z).

    Minimizes the squares of the relative errors, so that small fleets count as much as large ones.
    """
    relative = [(x / z, y / z) for x, y, z in rows if z]
    if not relative:
        return 0.0, 0.0
    xx, xy, yy = (sum(row[i] * row[j] for row in relative) for i, j in ((0, 0), (0, 1), (1, 1)))
    x, y = (sum(row[i] for row in relative) for i in (0, 1))
    determinant = xx * yy - xy * xy
    if determinant > 1e-9 * xx * yy:
        a, b = (x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant
        if a >= 0 and b >= 0:
            return a, b
    return (x / xx, 0.0) if x * x * yy >= y * y * xx else (0.0, y / yy)


def notifications(tokens: float, processes: int) -> float:
    """Return the notifications of all processes in one second, at most: `_notify_pace` combines the others."""
    undelayed = processes / MAX_REST_UNDELAYED
    return min(tokens, undelayed, max(MAX_TRAFFIC, processes / MAX_REST))


def sizing(tokens: float, found: Costs) -> Sizing:
    """Return the size of a fleet for so many tokens in one second, with two readers of each."""
    processes = 2
    while True:
        sent = notifications(tokens, processes)
        used = tokens * found.process_token / processes + sent * found.process_notification
        if used <= PROCESS_LOAD or processes > 10_000:
            break
        processes += 1
    server = None
    if found.server_token is not None and found.server_notification is not None:
        server = tokens * found.server_token + processes * sent * found.server_notification
    day = tokens * 86_400
    connections = processes * CONNECTIONS
    return Sizing(tokens, processes, sent, server, connections, day * found.disk, day * ARCHIVED, day * found.wal)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_of_runs(runs: Iterable[Run]) -> str:
    headings = ["fleet", "tokens/s", "reached", "p50", "p99", "connections", "statements/s"]
    headings += ["notifications/s", "processes", "server", "others"]
    return table(headings, map(cells, runs))


def cells(run: Run) -> list[str]:
    used = run.processor + run.idle_processor + (run.server_processor or 0.0)
    return [
        str(run.size),
        f"{run.rate(run.tokens):,.0f}",
        f"{run.reached:.0%}",
        f"{run.p50:,.1f} ms",
        f"{run.p99:,.0f} ms",
        f"{run.pooled} to {run.most_pooled}, and {run.listening}",
        f"{run.rate(sum(run.statements.values())):,.0f}",
        f"{run.each(run.received):,.0f}",
        f"{run.rate(run.processor):.2f}",
        "" if run.server_processor is None else f"{run.rate(run.server_processor):.2f}",
        "" if run.busy is None else f"{max(0.0, run.rate(run.busy - used)):.2f}",
    ]


def table_of_costs(found: Costs) -> str:
    def microseconds(seconds: float | None) -> str:
        return "not measured" if seconds is None else f"{seconds * 1e6:,.0f} µs"

    rows = [
        ("processor time of the processes for a token with two readers (*a*)", microseconds(found.process_token)),
        ("of a process for a notification that it receives (*b*)", microseconds(found.process_notification)),
        ("of the server for a token with two readers (*c*)", microseconds(found.server_token)),
        ("of the server for a process that receives a notification (*d*)", microseconds(found.server_notification)),
        ("disk for a token, with indexes (*e*)", f"{found.disk:,.0f} bytes"),
        ("write-ahead log for a token", f"{found.wal:,.0f} bytes"),
        ("memory of a process", f"{found.memory:,.0f} MiB"),
    ]
    return table(["cost", "measured"], rows)


def table_of_sizes(found: Costs) -> str:
    headings = ["tokens/s", f"answers of {RATE:.0f} tokens/s", "processes", "notifications/s", "server cores"]
    headings += ["connections", "disk for a day", "archived", "WAL for a day", "next step"]
    rows = []
    for tokens in SIZES:
        row = sizing(tokens, found)
        rows.append(
            [
                f"{tokens:,}",
                f"{math.ceil(tokens / RATE):,}",
                f"{row.processes:,}",
                f"{row.notifications:,.0f}",
                "" if row.server is None else f"{row.server:,.1f}",
                f"{row.connections:,}",
                gigabytes(row.disk),
                gigabytes(row.archived),
                gigabytes(row.wal),
                ", ".join(row.steps) or "none",
            ]
        )
    return table(headings, rows)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count < 1e10 else f"{count / 1e9:,.0f} GB"


def conditions(about: dict[str, Any]) -> str:
    """Return the machine and the versions as a sentence."""
    machine, versions = about["machine"], about["versions"]
    named = ("python", "postgresql", "psycopg", "aibind-postgres")
    return (
        f"{machine['cores']} cores, {machine['system']} on {machine['architecture']}, for the server and the fleet; "
        + ", ".join(f"{name} {versions[name]}" for name in named)
        + "."
    )


def filled(page: str, parts: dict[str, str]) -> str:
    """Return a page with these texts between the comments `<!-- NAME -->` and `<!-- end of NAME -->`."""
    for name, text in parts.items():
        marked = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
        page, count = marked.subn(lambda _, text=text: f"{text}\n", page)  # type: ignore[misc]  # a default binds `text`
        if count != 1:
            raise ValueError(f"the page has {count} places for {name!r} instead of one")
    return page


def main(results: Path, page: Path = PAGE) -> None:
    """Write the tables of the figures of fleets to docs/scale.md, or to another page."""
    about = json.loads(results.read_text("utf-8"))
    runs = [from_json(run) for run in about["runs"]]
    found = costs(runs)
    parts = {
        "machine": conditions(about),
        "runs": table_of_runs(runs),
        "costs": table_of_costs(found),
        "sizes": table_of_sizes(found),
    }
    page.write_text(filled(page.read_text("utf-8"), parts), "utf-8")


if __name__ == "__main__":
    typer.run(main)
