"""The wire format of aibind's browser client: text as unnamed events, and named events. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..models import StreamStatus, chunk_text, event_of
from ..sse import MESSAGE, ServerSentEvent, encode
from . import EVENT_STREAM, FrameEncoder, WireName


class AibindWire:
    """The items are `str` and `StreamEvent`. The id of each event is the sequence number of its chunk."""

    name: WireName = "aibind"
    headers: Mapping[str, str] = EVENT_STREAM

    def chunk_encoder(self, stream_id: str) -> AibindChunkEncoder:
        id_event(stream_id)  # raises if an event cannot contain the id
        return AibindChunkEncoder()

    def frame_encoder(self, stream_id: str, after_seq: int) -> AibindFrameEncoder:
        return AibindFrameEncoder(stream_id, after_seq)

    def text(self, chunks: Iterable[str]) -> str:
        events = map(event_of, chunks)
        return "".join([data for event, data in events if event == MESSAGE])


class AibindChunkEncoder:
    """Encodes each item as one chunk."""

    def encode(self, item: Any) -> Sequence[str]:
        return (chunk_text(item),)

    def finish(self) -> Sequence[str]:
        return ()


class AibindFrameEncoder(FrameEncoder):
    """Encodes each chunk as one event, and the end as `error` or `stopped`, and `done`."""

    def __init__(self, stream_id: str, after_seq: int) -> None:
        self._stream_id = stream_id
        # Each event would turn its part of a CRLF into a line break, so the LF is left out.
        self._after_cr = None if after_seq else False  # whether the text before ends with a CR; None: unknown

    def begin(self) -> bytes:
        return id_event(self._stream_id)

    def frame(self, seq: int, chunk: str) -> bytes | None:
        event, data = event_of(chunk)
        if event == MESSAGE and data:
            if data[0] == "\n":
                if self._after_cr is None:
                    return None
                if self._after_cr:
                    self._after_cr = data[-1] == "\r"
                    return encode(ServerSentEvent(data[1:], event, str(seq)))
            self._after_cr = data[-1] == "\r"
        encoded = encode(ServerSentEvent(data, event, str(seq)))
        # aibind's client ignores the ids of the named events that it handles, so it would receive the event again on
        # resuming. It takes the id of an unknown event. By the standard, a block without data sets the id and
        # dispatches nothing. Without a name, aibind's `Race` would take the block for an empty text, and elect the
        # model.
        return encoded if event == MESSAGE else encoded + b"event: cursor\nid: %d\n\n" % seq

    def look_back(self, chunk: str | None) -> bool:
        if chunk is None:
            self._after_cr = False
            return True
        event, data = event_of(chunk)
        if event == MESSAGE and data:
            self._after_cr = data[-1] == "\r"
        return self._after_cr is not None

    def end(self, status: StreamStatus | None) -> bytes:
        if status is None:  # without `done`, the client resumes, and gets status 404
            return b""
        end = b""
        if status.state == "error":
            end = encode(ServerSentEvent(status.error or "", "error"))
        elif status.state == "stopped":
            end = encode(ServerSentEvent("", "stopped"))
        return end + encode(ServerSentEvent("", "done"))


def id_event(stream_id: str) -> bytes:
    """Return the first event of a new stream. Raise `InvalidDataError` if an event cannot contain the id."""
    # A numeric event id would look like the sequence number of a chunk, and a client would resume after it.
    return encode(ServerSentEvent(stream_id, "stream-id", None if stream_id.isdigit() else stream_id))


WIRE = AibindWire()
