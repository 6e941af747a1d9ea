"""Encode and decode the payloads of notifications: the sender and the digests of the changed streams. Pure.

Every role that may connect to the database can LISTEN, and a stream id gives access to its stream. Payloads therefore
contain digests, from which an unguessable id cannot be derived. Words are separated by a space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice

DIGESTS = 200  # in one payload at most: PostgreSQL accepts less than 8,000 bytes


def digest_of(stream_id: str) -> str:
    """Return the first 128 bits of the SHA-256 of a stream id. The optional trigger computes the same in SQL."""
    return hashlib.sha256(stream_id.encode()).hexdigest()[:32]


def encode_payloads(stream_ids: Iterable[str], sender: str | None) -> Iterator[str]:
    """Encode stream ids in payloads.

    Args:
        stream_ids: The ids of the streams that have changed.
        sender: The id of the store that sends them, so that it can ignore its own notifications. None for no sender.
    """
    digests = map(digest_of, stream_ids)
    while batch := list(islice(digests, DIGESTS)):
        yield " ".join([sender or "-", *batch])


def decode_payload(payload: str, receiver: str) -> list[str]:
    """Return the digests in a payload; none if `receiver` sent it.

    The words of a payload that this package did not send match no stream.
    """
    sender, *digests = payload.split(" ")
    return [] if sender == receiver else digests


def sender_of(payload: str) -> str:
    """Return the sender in a payload."""
    return payload.partition(" ")[0]
