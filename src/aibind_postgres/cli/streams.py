"""The commands that write, read, list, end and delete streams."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from enum import Enum
from itertools import islice
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from .._sync.stream_store import PostgresStreamStore
from ..errors import StreamNotFoundError
from ..models import ErasureResult, StreamInfo
from . import reading, writing
from .options import (
    ALL_TABLES,
    STREAM_TABLES,
    After,
    Events,
    Id,
    Json,
    Raw,
    Sse,
    Yes,
    examples,
    with_target,
)
from .standard_streams import output_console
from .target import (
    DONE,
    FAILED,
    Target,
    confirm,
    exit_with,
    open_both_stores,
    open_store,
    require_terminal,
)
from .text_output import COLUMNS, aligned_pages, describe_stream, fields, pages, stream_row

app = typer.Typer()

WATCH_INTERVAL = 2.0  # seconds


class By(str, Enum):
    """Units of input that `write` stores as one chunk."""

    CHAR = "char"
    WORD = "word"
    LINE = "line"


class State(str, Enum):
    """States of a stream."""

    ACTIVE = "active"
    DONE = "done"
    STOPPED = "stopped"
    ERROR = "error"


@app.command(epilog=examples("write notes < notes.txt", "write answer --by word --delay 0.05"))
@with_target(*STREAM_TABLES, must_choose=False)
def write(
    target: Target,
    id: Id,
    by: Annotated[By, typer.Option("--by", help="Unit that is stored as one chunk.")] = By.LINE,
    delay: Annotated[float, typer.Option("--delay", metavar="SECONDS", min=0, help="Pause after each chunk.")] = 0.0,
) -> None:
    """Store standard input as a new stream, as it arrives.

    The input is text in UTF-8. Its end completes the stream. Ctrl-C ends the stream in state stopped. SIGTERM, SIGHUP
    and input that is not text end it in state error. Text that arrived before is stored, also an unfinished last line.
    A chunk that contains U+0001 is stored with another U+0001 before it, so that it is read as text and not as a named
    event.
    """
    with open_store(target) as store:
        raise typer.Exit(writing.write(store, id, by.value, delay))


@app.command(epilog=examples("tail answer", "tail answer --after 120", "tail answer --events | jq .data"))
@with_target(*STREAM_TABLES, must_choose=False)
def tail(
    target: Target,
    id: Id,
    after: After = 0,
    raw: Raw = False,
    events: Events = False,
    sse: Sse = False,
) -> None:
    """Print the text of a stream as it arrives, until its end.

    Named events are left out. The exit code is 1 if the stream was stopped or ended in an error. Ctrl-C prints the
    command that resumes at this position.
    """
    output_format = _output_format(raw, events, sse)
    with open_store(target) as store:
        raise typer.Exit(reading.tail(store, id, after, output_format, target))


@app.command(epilog=examples("replay answer --speed 4", "replay answer --instant --sse"))
@with_target(*STREAM_TABLES, must_choose=False)
def replay(
    target: Target,
    id: Id,
    speed: Annotated[
        float | None,
        typer.Option("--speed", metavar="N", help="Factor of the original pace: 2 is twice as fast. Default: 1."),
    ] = None,
    instant: Annotated[bool, typer.Option("--instant", help="Print without pauses.")] = False,
    after: After = 0,
    raw: Raw = False,
    events: Events = False,
    sse: Sse = False,
) -> None:
    """Print the stored text of a stream at its original pace.

    Named events are left out. The exit code is 1 if the stream was stopped or ended in an error. Ctrl-C prints the
    command that resumes at this position.
    """
    output_format = _output_format(raw, events, sse)
    if instant and speed is not None:
        raise typer.BadParameter("give --speed or --instant, not both")
    if speed is not None and not speed > 0:
        raise typer.BadParameter(f"--speed must be above zero, not {speed:g}")
    with open_store(target) as store:
        pace = None if instant else speed or 1.0
        raise typer.Exit(reading.replay(store, id, after, output_format, pace, target))


@app.command("list", epilog=examples("list --state active --watch", "list --owner ann --json | jq -r .id"))
@with_target(*STREAM_TABLES)
def list_streams(
    target: Target,
    state: Annotated[State | None, typer.Option("--state", help="Only streams in this state.")] = None,
    session: Annotated[
        str | None, typer.Option("--session", metavar="ID", help="Only streams of this conversation.")
    ] = None,
    owner: Annotated[str | None, typer.Option("--owner", metavar="O", help="Only streams of this owner.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every two seconds, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """List the streams in the order of their ids.

    Prints the state, number of chunks, age, conversation and owner of each stream. With --json, prints one line of JSON
    for each stream.
    """
    with open_store(target) as store:

        def read() -> Iterator[StreamInfo]:
            return store.list(state=state.value if state else None, session_id=session, owner=owner)

        console = output_console(soft_wrap=False)
        if watch and console.is_terminal and not as_json:
            _watch(read, console)
        while True:
            _print_list(read(), console, as_json)
            if not watch:
                return
            time.sleep(WATCH_INTERVAL)


def _watch(read: Callable[[], Iterator[StreamInfo]], console: Console) -> NoReturn:
    """Show as many streams as the terminal has lines, until Ctrl-C."""
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            live.update(_table(islice(read(), console.height)), refresh=True)
            time.sleep(WATCH_INTERVAL)


def _print_list(streams: Iterator[StreamInfo], console: Console, as_json: bool) -> None:
    if as_json:
        for info in streams:
            print(json.dumps(fields(info), ensure_ascii=False))
    elif console.is_terminal:
        for page in pages(streams):
            console.print(_table(page))
    else:
        now = datetime.now(timezone.utc)
        for lines in aligned_pages(COLUMNS, (stream_row(info, now) for info in streams)):
            print(lines, end="")
    sys.stdout.flush()


def _table(streams: Iterable[StreamInfo]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in COLUMNS:
        table.add_column(heading, overflow="fold", no_wrap=heading in ("STATE", "CHUNKS", "AGE"))  # ids stay complete
    now = datetime.now(timezone.utc)
    for info in streams:
        table.add_row(*stream_row(info, now), style=_STYLES.get(info.state))
    return table


_STYLES = {"active": "green", "stopped": "yellow", "error": "red"}


@app.command(epilog=examples("show answer", "show answer --json | jq .error"))
@with_target(*STREAM_TABLES)
def show(target: Target, id: Id, as_json: Json = False) -> None:
    """Show all fields of a stream.

    The exit code is 1 if the stream was stopped or ended in an error.
    """
    with open_store(target) as store:
        info = store.get_info(id)
        if info is None:
            raise StreamNotFoundError(id)
        if as_json:
            print(json.dumps(fields(info), ensure_ascii=False, indent=2))
        else:
            print(describe_stream(info, datetime.now(timezone.utc)), end="")
        raise typer.Exit(DONE if info.state in ("active", "done") else FAILED)


@app.command(epilog=examples("stop answer", "stop answer --json"))
@with_target(*STREAM_TABLES)
def stop(target: Target, id: Id, as_json: Json = False) -> None:
    """End an active stream in state stopped.

    The producer closes its source, and readers receive the end. The exit code is 1 if the stream had already ended.
    """
    with open_store(target) as store:
        _report_end(store, id, store.stop(id), as_json)


@app.command(epilog=examples("fail answer", "fail answer --error 'the model is not available'"))
@with_target(*STREAM_TABLES)
def fail(
    target: Target,
    id: Id,
    error: Annotated[
        str, typer.Option("--error", metavar="TEXT", help="The error text, which readers of the stream receive.")
    ] = "ended by an operator",
    as_json: Json = False,
) -> None:
    """End an active stream in state error.

    The exit code is 1 if the stream had already ended.
    """
    with open_store(target) as store:
        _report_end(store, id, store.fail(id, error), as_json)


def _report_end(store: PostgresStreamStore, id: str, ended: bool, as_json: bool) -> None:
    status = store.get_status(id)
    if status is None:
        raise StreamNotFoundError(id)
    if as_json:
        print(json.dumps({"id": id, **status._asdict()}, ensure_ascii=False))
    if not ended:
        exit_with(FAILED, f"stream {id!r} had already ended: its state is {status.state!r}")
    if not as_json:
        print(f"Stream {id!r} has ended after {status.total_chunks} chunks: its state is {status.state!r}.")


@app.command(epilog=examples("delete answer", "delete --owner ann", "delete --owner ann --yes --json"))
@with_target(*ALL_TABLES)
def delete(
    target: Target,
    id: Annotated[str | None, typer.Argument(metavar="ID", help="The stream's id.", show_default=False)] = None,
    owner: Annotated[
        str | None,
        typer.Option("--owner", metavar="O", help="Delete all conversations and streams of this owner instead."),
    ] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete a stream, or all data of one owner.

    Asks for confirmation on a terminal. Without a terminal, --yes is required. A stream is deleted with its chunks, in
    any state.

    With --owner, deletes the conversations of the owner, the streams of these conversations, and all other streams of
    the owner. Let the application refuse new requests of this owner first.
    """
    if (id is None) == (owner is None):
        raise typer.BadParameter("give either the id of a stream or --owner")
    if not yes:
        require_terminal()
    with open_both_stores(target) as (store, conversations):
        if owner is not None:
            if not yes:
                confirm(f"Delete all conversations and streams of owner {owner!r}?")
            result = conversations.delete_owner(owner, streams=store)
        elif id is not None:
            if not yes:
                info = store.get_info(id)
                if info is None:
                    raise StreamNotFoundError(id)
                confirm(f"Delete stream {id!r} with {info.total_chunks} chunks? Its state is {info.state!r}.")
            if not store.delete(id):
                raise StreamNotFoundError(id)
            result = ErasureResult(conversations=0, streams=1)
        text = f"deleted streams: {result.streams}, conversations: {result.conversations}"
        print(json.dumps(result._asdict()) if as_json else text)


def _output_format(raw: bool, events: bool, sse: bool) -> reading.OutputFormat:
    if raw + events + sse > 1:
        raise typer.BadParameter("give only one of --raw, --events and --sse")
    return "raw" if raw else "events" if events else "sse" if sse else "text"
