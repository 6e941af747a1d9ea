"""The wire format of an event stream that another library has encoded: its frames are stored and sent unchanged. Pure.

A frame ends with an empty line, by the HTML standard (WHATWG), section 9.2, "Server-sent events".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from .._encoded_events import Utf8Decoder
from ..errors import InvalidDataError
from ..models import StreamStatus
from ..sse import ServerSentEvent, encode
from . import EVENT_STREAM, INTERRUPTED, FrameEncoder, WireName

# The end of a line, and an empty line. A CR at the end of the text may be the first half of a CRLF.
_FRAME_END = re.compile(r"(?:\r\n|\n|\r(?!\n|$))(?:\r\n|\n|\r(?!\n|$))")

MAX_PARTIAL_END = 3  # characters: the end of a frame has at most four


class SseWire:
    """The items are pieces of an event stream, `str` or `bytes`, split anywhere. Each frame becomes one chunk.

    PostgreSQL cannot store U+0000, so frames with it are refused.
    """

    name: WireName = "sse"
    headers: Mapping[str, str] = EVENT_STREAM

    def chunk_encoder(self, stream_id: str) -> SseChunkEncoder:
        return SseChunkEncoder()

    def frame_encoder(self, stream_id: str, after_seq: int) -> SseFrameEncoder:
        return SseFrameEncoder()

    def text(self, chunks: Iterable[str]) -> str:
        return "".join(chunks)


class SseChunkEncoder:
    """Splits an event stream into its frames."""

    def __init__(self) -> None:
        self._decoder = Utf8Decoder()
        self._parts: list[str] = []  # of the incomplete frame
        self._tail = ""  # its last characters, which may be the beginning of its end

    def encode(self, item: Any) -> Sequence[str]:
        if isinstance(item, bytes):
            text = self._decoder.decode(item)
        elif isinstance(item, str):
            text = item
        else:
            raise InvalidDataError(f"an item must be a str or bytes, not {type(item).__name__}")
        self._parts.append(text)
        searched = self._tail + text
        if not _FRAME_END.search(searched):
            self._tail = searched[-MAX_PARTIAL_END:]
            return ()
        text = "".join(self._parts)
        ends = [found.end() for found in _FRAME_END.finditer(text, len(text) - len(searched))]
        self._parts = [text[ends[-1] :]]
        self._tail = self._parts[0][-MAX_PARTIAL_END:]
        return [text[start:end] for start, end in pairwise([0, *ends])]

    def finish(self) -> Sequence[str]:
        rest = "".join([*self._parts, self._decoder.decode(b"", final=True)])
        return (rest,) if rest else ()


class SseFrameEncoder(FrameEncoder):
    """Sends each chunk unchanged. Only an error adds a frame at the end, with the name `error`."""

    def frame(self, seq: int, chunk: str) -> bytes:
        return chunk.encode()

    def end(self, status: StreamStatus | None) -> bytes:
        if status is not None and status.state == "error":
            return encode(ServerSentEvent(status.error or INTERRUPTED, "error"))
        return b""


WIRE = SseWire()
