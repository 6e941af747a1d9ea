"""Generated ids: UUIDs of version 7 with fresh random bits."""

from __future__ import annotations

import uuid
from itertools import pairwise
from time import time_ns

from aibind_postgres import _message_tree
from aibind_postgres.history import new_id

# The bits of a UUID that hold the time, the version and the variant. All others are random.
FIXED = ((1 << 52) - 1) << 76 | 3 << 62
RANDOM = (1 << 128) - 1 ^ FIXED


def test_id_is_a_uuid_of_version_7():
    id = new_id()
    assert id == str(uuid.UUID(id))
    assert uuid.UUID(id).version == 7
    assert uuid.UUID(id).variant == uuid.RFC_4122


def test_id_begins_with_the_time():
    before = time_ns() // 1_000_000
    ids = [new_id() for _ in range(100)]
    after = time_ns() // 1_000_000
    times = [uuid.UUID(id).int >> 80 for id in ids]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= after


def test_ids_of_one_millisecond_have_74_fresh_random_bits(monkeypatch):
    monkeypatch.setattr(_message_tree, "time_ns", lambda: 1_800_000_000_000 * 1_000_000)
    values = [uuid.UUID(new_id()).int for _ in range(2000)]
    assert len({value & FIXED for value in values}) == 1
    assert RANDOM.bit_count() == 74
    ones = [sum(value >> bit & 1 for value in values) for bit in range(128) if RANDOM >> bit & 1]
    assert len(ones) == 74
    assert all(700 < count < 1300 for count in ones)  # 13 standard deviations
    changes = [(one ^ next).bit_count() for one, next in pairwise(values)]
    assert min(changes) > 5  # a counter would often change one bit or two
