"""`demo`: a writer, a reader that is killed halfway, and a reader that resumes from there, each in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from contextlib import ExitStack
from importlib import resources
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .._sync.stream_store import PostgresStreamStore
from ..models import StreamChunk
from .standard_streams import output_console

if TYPE_CHECKING:
    from .target import Target

_DELAY = "0.013"  # seconds after each word
_PAUSE = 0.7  # seconds between the two readers
_TIMEOUT = 60.0  # seconds after which the processes are killed


def run(dsn: str, target: Target) -> bool:
    """Run the demonstration. Return whether the readers received exactly the text that was written."""
    console = output_console(soft_wrap=True)
    text = resources.files(__package__).joinpath("demo.txt").read_text("utf-8")
    stream_id = f"demo-{uuid.uuid4()}"
    tables = [target.chunks_table, target.status_table]
    options = [f"--chunks-table={target.chunks_table}", f"--status-table={target.status_table}"]
    reader = "aibind_postgres.cli.demo_reader"

    with (
        PostgresStreamStore(dsn, chunks_table=target.chunks_table, status_table=target.status_table) as store,
        ExitStack() as stack,
    ):
        store.get_status(stream_id)  # reports missing tables before any process starts
        stack.callback(store.delete, stream_id)
        processes = stack.enter_context(_Processes(dsn))
        console.print("A writer stores a text word by word. The first reader follows it live:\n", style="bold")
        writer = processes.start("aibind_postgres.cli", "write", stream_id, "--by=word", f"--delay={_DELAY}", *options)
        assert writer.stdin is not None  # stdin is a pipe
        with writer.stdin:
            writer.stdin.write(text)
        while store.get_status(stream_id) is None and writer.poll() is None:
            time.sleep(0.01)

        first = processes.start(reader, stream_id, "0", *tables)
        first_chunks = _follow(first, console, "cyan", kill_after=len(text.split()) // 2)
        last = first_chunks[-1].seq if first_chunks else 0
        console.print(f"\n\nThe first reader was killed after chunk {last}. The writer continues …", style="bold red")
        time.sleep(_PAUSE)
        console.print(f"The second reader resumes after chunk {last}:\n", style="bold")
        second = processes.start(reader, stream_id, str(last), *tables)
        second_chunks = _follow(second, console, "green")

        failures = [process.stderr.read() for process in (writer, second) if process.wait() != 0 and process.stderr]
        status = store.get_status(stream_id)

    received = [*first_chunks, *second_chunks]
    total = status.total_chunks if status else 0
    table = Table(title="\nSummary", title_justify="left", title_style="bold")
    for heading in ("", "chunks", "characters"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("written", f"1 … {total}", str(len(text)))
    for name, style, chunks in (("first reader", "cyan", first_chunks), ("second reader", "green", second_chunks)):
        numbers = f"{chunks[0].seq} … {chunks[-1].seq}" if chunks else "none"
        table.add_row(name, numbers, str(sum(len(chunk.data) for chunk in chunks)), style=style)
    console.print(table)

    in_order = [chunk.seq for chunk in received] == list(range(1, total + 1))
    same_text = "".join(chunk.data for chunk in received) == text
    if in_order and same_text and first_chunks and second_chunks and not failures:
        console.print("The readers received the whole text: no gap and no duplicate.", style="bold green")
        return True
    console.print("The readers did NOT receive the text that was written.", *failures, sep="\n", style="bold red")
    return False


def _follow(reader: subprocess.Popen[str], console: Console, style: str, kill_after: int = 0) -> list[StreamChunk]:
    """Print and return the chunks that a reader process reports. Kill it after `kill_after` chunks, if not 0."""
    chunks: list[StreamChunk] = []
    for line in reader.stdout or ():
        if not line.endswith("\n"):
            break  # killed while it printed this line
        chunks.append(StreamChunk(*json.loads(line)))
        console.print(chunks[-1].data, style=style, end="")
        if len(chunks) == kill_after:
            reader.kill()
    return chunks


class _Processes:
    """Starts modules of this package as processes. Kills them at the end of the block, or after a timeout."""

    def __init__(self, dsn: str) -> None:
        self._environment = {**os.environ, "DATABASE_URL": dsn}  # a command line is visible to other users
        self._started: list[subprocess.Popen[str]] = []
        self._timer = threading.Timer(_TIMEOUT, self._kill)
        self._timer.daemon = True

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
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._kill()
        for process in self._started:
            with process:  # closes its pipes and waits
                pass

    def _kill(self) -> None:
        for process in self._started:
            process.kill()
