"""`demo`: a writer, a reader that is killed half-way, and a reader that goes on from there, each a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .._sync.stream_store import PostgresStreamStore
from ..models import StreamChunk

if TYPE_CHECKING:
    from .target import Target

_DELAY = "0.013"  # seconds between two words
_ALONE = 0.7  # seconds in which nobody reads
_LONGEST = 60.0  # seconds after which something must have gone wrong


def show(dsn: str, target: Target) -> bool:
    """Run the demonstration and return whether what arrived is what was written."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    text = Path(__file__).with_name("demo.txt").read_text("utf-8")
    stream_id = f"demo-{uuid.uuid4()}"
    tables = [target.chunks_table, target.status_table]
    options = [f"--chunks-table={target.chunks_table}", f"--status-table={target.status_table}"]
    reader = "aibind_postgres.cli.demo_reader"

    with (
        PostgresStreamStore(dsn, chunks_table=target.chunks_table, status_table=target.status_table) as store,
        ExitStack() as ending,
    ):
        store.get_status(stream_id)  # so that missing tables are told before anything starts
        ending.callback(store.delete, stream_id)
        processes = ending.enter_context(_Processes(dsn))
        console.print("A writer stores a text, word by word. A first reader follows it live:\n", style="bold")
        writer = processes.start("aibind_postgres.cli", "write", stream_id, "--by=word", f"--delay={_DELAY}", *options)
        assert writer.stdin is not None  # it is a pipe
        with writer.stdin:
            writer.stdin.write(text)
        while store.get_status(stream_id) is None and writer.poll() is None:
            time.sleep(0.01)

        first = processes.start(reader, stream_id, "0", *tables)
        seen_by_first = _follow(first, console, "cyan", kill_after=len(text.split()) // 2)
        last = seen_by_first[-1].seq if seen_by_first else 0
        console.print(f"\n\nThe first reader was killed after chunk {last}. The writer goes on …", style="bold red")
        time.sleep(_ALONE)
        console.print(f"A second reader goes on behind chunk {last}:\n", style="bold")
        second = processes.start(reader, stream_id, str(last), *tables)
        seen_by_second = _follow(second, console, "green")

        failures = [process.stderr.read() for process in (writer, second) if process.wait() != 0 and process.stderr]
        written = store.get_status(stream_id)

    seen = [*seen_by_first, *seen_by_second]
    total = written.total_chunks if written else 0
    arrived = "".join(chunk.data for chunk in seen)
    table = Table(title="\nWhat arrived", title_justify="left", title_style="bold")
    for heading in ("", "chunks", "characters"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("written", f"1 … {total}", str(len(text)))
    for name, style, chunks in (("first reader", "cyan", seen_by_first), ("second reader", "green", seen_by_second)):
        numbers = f"{chunks[0].seq} … {chunks[-1].seq}" if chunks else "none"
        table.add_row(name, numbers, str(sum(len(chunk.data) for chunk in chunks)), style=style)
    console.print(table)

    in_order = [chunk.seq for chunk in seen] == list(range(1, total + 1))
    if in_order and arrived == text and seen_by_first and seen_by_second and not failures:
        console.print("What arrived is what was written: nothing is missing, nothing came twice.", style="bold green")
        return True
    console.print("What arrived is NOT what was written.", *failures, sep="\n", style="bold red")
    return False


def _follow(reader: subprocess.Popen[str], console: Console, style: str, kill_after: int = 0) -> list[StreamChunk]:
    """Print what a reader reports until it ends, and return it; kill the reader after so many chunks."""
    chunks: list[StreamChunk] = []
    for line in reader.stdout or ():
        if not line.endswith("\n"):
            break  # killed in the middle of a report: that chunk has not arrived
        chunks.append(StreamChunk(*json.loads(line)))
        console.print(chunks[-1].data, style=style, end="")
        if len(chunks) == kill_after:
            reader.kill()
    return chunks


class _Processes:
    """Processes of this package, none of which outlives the `with` block, or takes too long."""

    def __init__(self, dsn: str) -> None:
        self._environment = {**os.environ, "DATABASE_URL": dsn}  # others can read a command line
        self._started: list[subprocess.Popen[str]] = []
        self._alarm = threading.Timer(_LONGEST, self._kill)
        self._alarm.daemon = True

    def start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
            encoding="utf-8",
        )
        self._started.append(process)
        return process

    def __enter__(self) -> _Processes:
        self._alarm.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._alarm.cancel()
        self._kill()
        for process in self._started:
            with process:  # closes its pipes and waits
                pass

    def _kill(self) -> None:
        for process in self._started:
            process.kill()
