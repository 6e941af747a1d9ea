"""Encode and decode the payloads of notifications: JSON objects with the changed stream ids and the sender. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

MAX_PAYLOAD_BYTES = 7_999  # PostgreSQL accepts less than 8,000


def encode_payloads(stream_ids: Iterable[str], sender: str | None) -> Iterator[str]:
    """Encode stream ids in as few payloads as possible.

    Args:
        stream_ids: The ids of the streams that have changed.
        sender: The id of the store that sends them, so that it can ignore its own notifications. None for no sender.
    """
    head = "{" if sender is None else f'{{"by":{json.dumps(sender)},'
    packed = ""
    for stream_id in stream_ids:
        item = json.dumps(
            stream_id
        )  # in ASCII, so that the length in bytes does not depend on the encoding of the database
        if packed and len(head) + len(packed) + len(item) + len('"ids":[,]}') > MAX_PAYLOAD_BYTES:
            yield f'{head}"ids":[{packed}]}}'
            packed = ""
        packed += f",{item}" if packed else item
    if packed:
        yield f'{head}"ids":[{packed}]}}'


def decode_payload(payload: str, receiver: str) -> list[str] | None:
    """Return the stream ids of a payload.

    The list is empty if `receiver` sent the payload. The result is None if the payload has another format: then any
    stream may have changed.
    """
    try:
        content = json.loads(payload)
        if content.get("by") == receiver:
            return []
        stream_ids = content["ids"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    is_list = isinstance(stream_ids, list) and all(isinstance(stream_id, str) for stream_id in stream_ids)
    return stream_ids if is_list else None
