"""`python -m benchmarks` starts the servers, runs the benchmarks and prints one table."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import psycopg
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from aibind_postgres import embedded

from .archiving import archiving
from .bench import FULL, QUICK, SMOKE, Bench
from .chats import chats
from .concurrent_appends import TARGETS, five_hundred_tasks, separate_stores, threads
from .conversations import conversations
from .fleet import fleet
from .framing import framing
from .leases import leases
from .measure import Row
from .over_http import first_token, http_readers
from .peers import pgbench_program, redis_server
from .readers import fan_out, idle
from .reading import first_chunk, memory, replay
from .replicas import replicas
from .report import as_json, draw, environment, table
from .tail import tail
from .telemetry import telemetry
from .time_partitions import time_partitions
from .writing import batches, import_benchmark, one_producer, ten_million

BENCHMARKS = {
    "one-producer": one_producer,
    **{f"{count}-threads": threads(count) for count in TARGETS},
    "500-tasks": five_hundred_tasks,
    "append-many": batches,
    "leases": leases,
    "chats": chats,
    "tail": tail,
    "telemetry": telemetry,
    "replay": replay,
    "archive": archiving,
    "first-chunk": first_chunk,
    "memory": memory,
    "replicas": replicas,
    "idle-readers": idle,
    "fan-out": fan_out,
    "fleet": fleet,
    "32-stores": separate_stores,
    "conversations": conversations,
    "framing": framing,
    "first-token": first_token,
    "http-readers": http_readers,
    "10-million": ten_million,
    "time-partitions": time_partitions,
    "import": import_benchmark,
}


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Run this benchmark only, repeatable: {', '.join(BENCHMARKS)}.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and shorter rounds, and one million chunks instead of ten.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Only show that the benchmarks work; the figures mean nothing.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write all measurements to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the comparisons to this file, .svg or .png.")] = None,
) -> None:
    """Compare this package with its alternatives in one run."""
    if unknown := set(only or ()) - BENCHMARKS.keys():
        raise typer.BadParameter(
            f"unknown benchmark: {', '.join(sorted(unknown))}; choose from {', '.join(BENCHMARKS)}"
        )
    if plot is not None and (plot.suffix not in (".svg", ".png") or find_spec("matplotlib") is None):
        raise typer.BadParameter("--plot needs a file name that ends in .svg or .png, and the package matplotlib")
    size = SMOKE if smoke else QUICK if quick else FULL
    benchmarks = {name: run for name, run in BENCHMARKS.items() if not only or name in only}
    console = Console(width=None if sys.stdout.isatty() else 180)  # do not wrap lines in a file
    rows: list[Row] = []
    failed = False
    start = time.monotonic()
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    # A thread that refreshes the display would slow down the measurements in this process.
    with ExitStack() as stack, Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("starting the servers", total=len(benchmarks))
        progress.refresh()
        dsn = stack.enter_context(embedded.server(version=18))
        redis = {policy: stack.enter_context(redis_server(policy)) for policy in ("always", "everysec")}
        for name, run in benchmarks.items():

            def step(text: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: {text}", refresh=True)

            step("preparing")
            try:
                rows += run(Bench(dsn, pgbench_program(), redis, size, step))
            except Exception as error:
                failed = True
                rows.append(Row(name, note=f"failed: {type(error).__name__}: {error}"))
            progress.advance(task)
        with psycopg.connect(dsn) as connection:
            postgres = connection.info.parameter_status("server_version") or ""
    console.print(table(rows))
    if json is not None:
        about = {"quick": quick or smoke, "seconds": round(time.monotonic() - start)}
        json.write_text(as_json(rows, {**about, **environment(postgres, redis_version())}), "utf-8")
    if plot is not None:
        draw(rows, plot)
    raise typer.Exit(failed)


def redis_version() -> str:
    if shutil.which("redis-server") is None:
        return "not installed"
    output = subprocess.run(["redis-server", "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"v=(\S+)", output)
    return found[1] if found else output


if __name__ == "__main__":
    typer.run(main)
