"""`write`: stores standard input as a stream while it arrives."""

from __future__ import annotations

import codecs
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING

import psycopg

from ..errors import AibindError, StreamExistsError
from ..models import chunk_text, event_of
from .signals import DeferredSignals
from .standard_streams import print_message
from .target import DONE, FAILED, INTERRUPTED, USAGE

if TYPE_CHECKING:
    from .._sync.stream_store import PostgresStreamStore

_READ_SIZE = 65536  # bytes; a read returns the available bytes without waiting for more

# Matches one chunk. Applied only to text that ends with a whole chunk, so that no search backtracks to the end.
_CHUNK = {"char": re.compile(".", re.DOTALL), "word": re.compile(r"\S*\s+"), "line": re.compile(r"[^\n]*\n")}


class NotTextError(Exception):
    """The input contains a byte that is not UTF-8, or a NUL, which PostgreSQL cannot store."""


def write(store: PostgresStreamStore, stream_id: str, by: str, delay: float) -> int:
    """Store standard input as a new stream and return the exit code. A stream that was created is always ended."""
    source = sys.stdin.fileno()
    try:
        os.read(source, 0)  # fails if the input is closed
    except OSError as error:
        print_message(f"standard input cannot be read: {error.strerror}")
        return FAILED
    try:
        store.create(stream_id)
    except StreamExistsError as error:
        print_message(f"{error}: choose another id")
        return USAGE
    signals = DeferredSignals()  # no text that was read is lost, or stored twice
    try:
        with signals:
            for chunks in split(decode(source, signals.interruptible), by):
                encoded = list(map(_encode, chunks))
                if delay == 0:
                    store.append_many(stream_id, encoded)
                else:
                    for chunk in encoded:
                        store.append(stream_id, chunk)
                        with signals.interruptible():
                            time.sleep(delay)
    except NotTextError as error:
        store.fail(stream_id, str(error))
        print_message(f"{error}; the text before it is stored, and the stream has ended in an error")
        return FAILED
    except KeyboardInterrupt:
        store.stop(stream_id)
        print_message(f"interrupted; stream {stream_id!r} was stopped")
        return INTERRUPTED
    except BaseException as error:
        reason = _reason(error)
        with suppress(AibindError, psycopg.Error):
            store.fail(stream_id, reason)
        if isinstance(error, SystemExit):  # others are reported by the caller
            print_message(f"{reason}; stream {stream_id!r} has ended in an error")
        raise
    if store.complete(stream_id):
        return DONE
    status = store.get_status(stream_id)
    print_message(
        f"stream {stream_id!r} was ended by another process" + (f": its state is {status.state!r}" if status else "")
    )
    return FAILED


def _reason(error: BaseException) -> str:
    """Return why the writer has ended before its input, for the readers of the stream."""
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return f"the writer was ended by {signal.Signals(error.code - 128).name} before the end of its input"
    if isinstance(error, OSError):
        return f"the input of the writer cannot be read: {error.strerror}"
    return f"the writer ended before its input, with {type(error).__name__}"


def _encode(text: str) -> str:
    """Return the chunk for a text: unchanged, unless that would be read as a named event or as another text."""
    return text if event_of(text) == ("message", text) else chunk_text(text)


def decode(source: int, waiting: Callable[[], AbstractContextManager[object]] = nullcontext) -> Iterator[str]:
    """Yield the text from a file descriptor as it arrives.

    Args:
        source: The file descriptor.
        waiting: A context manager around each wait for input, which may raise. Default: none.

    Raises:
        NotTextError: At the first byte that is NUL or not UTF-8, after all text before it was yielded.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    bytes_read = 0
    while True:
        with waiting():
            select.select([source], [], [])
        data = os.read(source, _READ_SIZE)
        good, nul, _ = data.partition(b"\0")
        try:
            text = decoder.decode(good, final=bool(nul) or not data)
        except UnicodeDecodeError as error:
            # error.object begins with the bytes of an incomplete character that the decoder kept from earlier reads.
            yield error.object[: error.start].decode()
            position = bytes_read + len(good) - len(error.object) + error.start
            raise NotTextError(f"the input is not UTF-8: byte {position} is {error.object[error.start]:#04x}") from None
        if text:
            yield text
        if nul:
            raise NotTextError(f"the input has a NUL at byte {bytes_read + len(good)}, which PostgreSQL cannot store")
        if not data:
            return
        bytes_read += len(data)


def split(texts: Iterator[str], by: str) -> Iterator[list[str]]:
    """Split texts into chunks and yield those that are complete after each text, and the rest at the end.

    The end may be invalid input or a signal, which is raised after the rest. The chunks joined are the texts joined. A
    word includes the white space after it. A line ends with a line feed.
    """
    rest = ""
    try:
        for text in texts:
            rest += text
            complete = _complete_length(rest, by)
            chunks, rest = _CHUNK[by].findall(rest[:complete]), rest[complete:]
            if chunks:
                yield chunks
    except (NotTextError, KeyboardInterrupt, SystemExit):
        if rest:
            yield [rest]
        raise
    if rest:
        yield [rest]


def _complete_length(text: str, by: str) -> int:
    """Return the length of the beginning of `text` that consists of complete chunks."""
    if by == "line":
        return text.rfind("\n") + 1
    if by == "word" and text and not text[-1].isspace():
        return len(text) - len(text.rsplit(maxsplit=1)[-1])
    return len(text)
