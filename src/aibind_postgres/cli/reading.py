"""`tail` and `replay`. Standard output gets the exact text of the stream; messages go to standard error."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeAlias

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from .._sync.event_stream import MAX_LOOK_BACK
from .._tables import CHUNKS_TABLE, STATUS_TABLE
from ..errors import StreamNotFoundError
from ..models import StoredEvent, StreamChunk, StreamStatus, event_of
from ..wire import Wire, find_wire
from .signals import DeferredSignals
from .standard_streams import print_message
from .target import DONE, FAILED, INTERRUPTED, Target

if TYPE_CHECKING:
    from .._sync.stream_store import PostgresStreamStore

OutputFormat: TypeAlias = Literal["text", "raw", "events", "sse"]

_SECRETS = ("password", "sslpassword", "oauth_client_secret")


class Output:
    """Writes the chunks of one stream to the standard output, and counts them.

    Args:
        store: The store of the stream.
        stream_id: The id of the stream.
        after: The number of the chunk after which the output begins.
        output_format: The format.
    """

    def __init__(self, store: PostgresStreamStore, stream_id: str, after: int, output_format: OutputFormat) -> None:
        info = store.get_info(stream_id)
        if info is None:
            raise StreamNotFoundError(stream_id)
        self.position = after
        self._format = output_format
        self._wire = find_wire(info.wire)
        self._frames = self._wire.frame_encoder(stream_id, after)
        self._store = store
        self.stream_id = stream_id
        self._signals = DeferredSignals()  # so that the position is exact
        self._last = b""

    def write(self, chunk: StreamChunk, *, flush: bool) -> None:
        """Write a chunk."""
        output = self._frame(chunk) if self._format == "sse" else render(chunk, self._format, self._wire).encode()
        with self._signals:
            sys.stdout.buffer.write(output)
            if flush:
                sys.stdout.buffer.flush()
            self.position, self._last = chunk.seq, output or self._last

    def end(self) -> StreamStatus:
        """Write the end of the stream if it has ended, flush the output, and return the status of the stream."""
        status = self._store.get_status(self.stream_id)
        if status is None:
            raise StreamNotFoundError(self.stream_id)
        if self._format == "sse" and status.state != "active" and self.position >= status.total_chunks:
            sys.stdout.buffer.write(self._frames.end(status))
        self.flush()
        return status

    def flush(self) -> None:
        """Flush the output. On a terminal, the next message then starts on a new line."""
        sys.stdout.buffer.flush()
        if self._last and not self._last.endswith(b"\n") and sys.stdout.isatty() and sys.stderr.isatty():
            print(file=sys.stderr)

    def _frame(self, chunk: StreamChunk) -> bytes:
        """Return the bytes that a browser gets for a chunk."""
        frame = self._frames.frame(*chunk)
        if frame is None:  # it depends on earlier chunks
            begin = max(0, chunk.seq - 1 - MAX_LOOK_BACK)
            earlier = list(islice(self._store.read_from(self.stream_id, begin, follow=False), chunk.seq - 1 - begin))
            if not any(self._frames.look_back(data) for _, data in reversed(earlier)):
                self._frames.look_back(None)
            frame = self._frames.frame(*chunk)
        return frame or b""


def render(chunk: StreamChunk, output_format: OutputFormat, wire: Wire) -> str:
    """Return the output for a chunk. For an event without a text it is empty in the format `text`."""
    if output_format == "raw":
        return chunk.data
    if output_format == "events":
        return json.dumps(StoredEvent(chunk.seq, *event_of(chunk.data))._asdict(), ensure_ascii=False) + "\n"
    return wire.text([chunk.data])


def tail(store: PostgresStreamStore, stream_id: str, after: int, output_format: OutputFormat, target: Target) -> int:
    """Print chunks as they arrive. Return the exit code for the final state of the stream."""
    output = Output(store, stream_id, after, output_format)
    command = ["tail", *_format_options(output_format)]
    return _print(output, store.read_from(stream_id, after), True, command, target)


def replay(
    store: PostgresStreamStore,
    stream_id: str,
    after: int,
    output_format: OutputFormat,
    speed: float | None,
    target: Target,
) -> int:
    """Print the stored chunks, without pauses if `speed` is None. Return the exit code for the state of the stream."""
    output = Output(store, stream_id, after, output_format)
    command = ["replay", *_format_options(output_format)]
    if speed is None:
        return _print(output, store.read_from(stream_id, after, follow=False), False, [*command, "--instant"], target)
    pace = [] if speed == 1 else ["--speed", str(speed)]
    return _print(output, store.replay(stream_id, after, speed=speed), True, [*command, *pace], target)


def _print(output: Output, chunks: Iterable[StreamChunk], flush: bool, command: list[str], target: Target) -> int:
    """Print chunks. Return the exit code for the state of the stream. If interrupted, print the command to resume."""
    try:
        for chunk in chunks:
            output.write(chunk, flush=flush)
        return _report_state(output.end(), output.stream_id)
    except KeyboardInterrupt:
        output.flush()
        print_message(f"interrupted; to resume from here: {resume_command(command, output, target)}")
        return INTERRUPTED


def _report_state(status: StreamStatus, stream_id: str) -> int:
    match status.state:
        case "done":
            return DONE
        case "active":
            print_message(f"stream {stream_id!r} is still being written: this is its text so far")
            return DONE
        case "stopped":
            print_message(f"stream {stream_id!r} was stopped")
        case "error":
            print_message(f"stream {stream_id!r} ended in an error: {status.error}")
    return FAILED


def _format_options(output_format: OutputFormat) -> list[str]:
    return [] if output_format == "text" else [f"--{output_format}"]


def resume_command(command: Sequence[str], output: Output, target: Target) -> str:
    """Return the command that resumes after the last chunk of an output, without secrets."""
    name, *given = command
    options = ["--after", str(output.position), *given]
    if target.chunks_table != CHUNKS_TABLE:
        options += ["--chunks-table", target.chunks_table]
    if target.status_table != STATUS_TABLE:
        options += ["--status-table", target.status_table]
    note = ""
    if target.dsn:
        parameters = conninfo_to_dict(target.dsn)
        if parameters.keys().isdisjoint(_SECRETS):
            options += ["--dsn", target.dsn]
        else:
            public = {name: value for name, value in parameters.items() if name not in _SECRETS}
            options += ["--dsn", make_conninfo("", **public)]
            note = " (without the password: set the variable PGPASSWORD)"
    stream_id = output.stream_id
    words = [*options, "--", stream_id] if stream_id.startswith("-") else [stream_id, *options]
    return shlex.join(["aibind-postgres", name, *words]) + note
