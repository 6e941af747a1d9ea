"""The payloads of notifications: a JSON object with the ids of the streams that changed, and the sender. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

MAX_PAYLOAD_BYTES = 7_999  # PostgreSQL accepts less than 8,000


def encode_payloads(stream_ids: Iterable[str], sender: str | None) -> Iterator[str]:
    """Pack stream ids into as few payloads as they fit in.

    `sender` marks each payload, so that its sender can ignore it.
    """
    head = "{" if sender is None else f'{{"by":{json.dumps(sender)},'
    packed = ""
    for stream_id in stream_ids:
        item = json.dumps(stream_id)  # ASCII, so that its length in bytes does not depend on the database's encoding
        if packed and len(head) + len(packed) + len(item) + len('"ids":[,]}') > MAX_PAYLOAD_BYTES:
            yield f'{head}"ids":[{packed}]}}'
            packed = ""
        packed += f",{item}" if packed else item
    if packed:
        yield f'{head}"ids":[{packed}]}}'


def decode_payload(payload: str, listener: str) -> list[str] | None:
    """Return the stream ids of a payload: none if `listener` sent it, None if any stream may have changed.

    A payload of another format is a hint that something has changed.
    """
    try:
        content = json.loads(payload)
        if content.get("by") == listener:
            return []
        stream_ids = content["ids"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    is_list = isinstance(stream_ids, list) and all(isinstance(stream_id, str) for stream_id in stream_ids)
    return stream_ids if is_list else None
