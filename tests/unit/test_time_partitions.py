"""Partitions by time: bounds, names, and which days are created and dropped."""

from __future__ import annotations

import json
import uuid
from datetime import date, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aibind_postgres import _message_tree
from aibind_postgres._tables import Table
from aibind_postgres._time_partition_sql import create_partitions, create_statement, drop_statement
from aibind_postgres._time_partitions import (
    AHEAD,
    END_DAY,
    FIRST_DAY,
    Partitions,
    bound,
    bounds,
    days_ahead,
    default_partitions,
    is_quickly_scanned,
    missing_days,
    parse_partitions,
    partition,
    past_days,
    span,
)

STATUS, CHUNKS = Table("s", "status"), Table("s", "chunks")
TODAY = date(2026, 11, 30)
NOON = datetime(2026, 11, 30, 12, tzinfo=timezone.utc)


def day(number):
    """Return a day relative to today."""
    return TODAY + timedelta(days=number)


def partitions(*numbers, now=NOON, size=0):
    return Partitions(round(now.timestamp() * 1000), True, size, frozenset(map(day, numbers)), ("id",), False)


@given(st.integers(0, (END_DAY - FIRST_DAY).total_seconds() * 1000 - 1))
def test_id_is_between_the_bounds_of_its_day(offset):
    time = datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(milliseconds=offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_message_tree, "time_ns", lambda: round(time.timestamp() * 1000) * 1_000_000)
        id = _message_tree.new_id()
    first, end = bounds(time.date())
    assert first <= id < end
    assert not bound(time.date() - timedelta(days=1)) <= id < first


def test_bounds_are_sorted_as_the_days():
    days = [FIRST_DAY + timedelta(days=number) for number in range((END_DAY - FIRST_DAY).days + 1)]
    assert [bound(each) for each in days] == sorted({bound(each) for each in days})
    assert {len(bound(each)) for each in days} == {13}
    assert bound(date(1970, 1, 1)) == "00000000-0000"
    assert bound(date(2026, 11, 30)) == "01a229c0-5400"
    assert bounds(TODAY)[1] == bound(day(1))


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20), st.integers(0, 9))
def test_tombstone_is_in_the_partition_of_its_stream(end, cut):
    for start in (bound(TODAY), bound(TODAY)[:cut], str(uuid.UUID(int=int(bound(TODAY).replace("-", ""), 16) << 80))):
        id = (start + end).encode()
        tombstone = id + b" deleted " + str(uuid.uuid4()).encode()
        first, last = (each.encode() for each in bounds(TODAY))
        assert (first <= id < last) == (first <= tombstone < last)


@pytest.mark.parametrize("name", ["status", "x" * 63, "ü" * 31, 'a"b {status} %s'])
def test_names_of_partitions(name):
    table = Table("s", name)
    names = [each.name for each in (partition(table, TODAY), partition(table, day(1)), *default_partitions(table))]
    assert len(set(names)) == 5
    assert names[0].endswith("_20261130")
    assert all(len(each.encode()) <= 63 for each in names)
    found = parse_partitions(("s", 0, True, 0, json.dumps(names), '["id"]', False), table)
    assert found.days == {TODAY, day(1)}


def test_partitions_with_other_names_are_left_alone():
    names = ["status_20261131", "status_2026113", "other_20261130", "status_x_20261130", "status_default", "20261130"]
    assert parse_partitions(("s", 0, True, 0, json.dumps(names), '["id"]', False), STATUS).days == frozenset()
    assert parse_partitions(("s", 0, True, 0, None, '["id"]', False), STATUS).days == frozenset()


def test_days_ahead():
    assert days_ahead(TODAY) == [day(number) for number in range(AHEAD + 1)]
    assert days_ahead(date(2025, 12, 30)) == [FIRST_DAY + timedelta(days=number) for number in range(6)]
    assert days_ahead(END_DAY - timedelta(days=2)) == [END_DAY - timedelta(days=2), END_DAY - timedelta(days=1)]
    assert days_ahead(END_DAY) == []


def test_missing_days():
    assert missing_days([partitions(), partitions()]) == days_ahead(TODAY)
    present = partitions(*range(AHEAD + 1))
    assert missing_days([present, present]) == []
    assert missing_days([partitions(*range(AHEAD)), partitions(*range(AHEAD))]) == [day(AHEAD)]
    # A partition of one table alone was created by somebody else.
    assert missing_days([partitions(0, 1, 2), partitions(*range(3, AHEAD + 1))]) == []


def test_past_days_are_dropped_after_an_hour():
    both = partitions(-5, -2, -1, 0, 1)
    assert past_days([both, both]) == [day(-5), day(-2), day(-1)]
    assert past_days([both, partitions(-5, -1)]) == [day(-5), day(-1)]
    for minutes, expected in ((0, []), (59, []), (60, [day(-1)])):
        now = datetime(2026, 11, 30, 0, minutes % 60, tzinfo=timezone.utc) + timedelta(hours=minutes // 60)
        tables = [partitions(-1, 0, now=now)] * 2
        assert past_days(tables) == expected


def test_span_of_the_days():
    assert span([partitions(), partitions()]) == ("", "")
    assert span([partitions(-3, 2), partitions(-2, 5)]) == (bound(day(-3)), bound(day(6)))


def test_size_up_to_which_the_default_partition_is_scanned():
    assert is_quickly_scanned([partitions(size=4 << 20), partitions(size=4 << 20)])
    assert not is_quickly_scanned([partitions(size=4 << 20), partitions(size=(4 << 20) + 1)])


def test_table_names_do_not_end_the_quote():
    tables = [Table("$partitions$", "a{b}$partitions$"), Table("$partitions_$", "%s c")]
    for statement in (create_statement(tables, TODAY), drop_statement(tables, TODAY, [["id"], ["id"]])):
        tag = statement.split()[1]
        assert statement.count(tag) == 2
        assert statement.endswith(tag)
    assert '"a{b}$partitions$_20261130"' in create_partitions(tables, TODAY, in_use=False)


def test_only_steps_beside_other_statements_are_bounded():
    in_use, alone = (create_partitions([STATUS, CHUNKS], TODAY, in_use=in_use) for in_use in (True, False))
    assert "lock_timeout" in in_use
    assert "LIMIT" in in_use
    assert "lock_timeout" not in alone
    assert "LIMIT" not in alone
