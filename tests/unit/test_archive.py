"""Pages of the archive as chunks."""

from __future__ import annotations

import json

import pytest

from aibind_postgres._archive import parse_archived, seconds_of

DONE = (-10, "done", None)
TIMED_DONE = (-10, "done", None, None, None)


def page_row(first, last, *times):
    return (first, json.dumps([f"t{seq}" for seq in range(first, last + 1)]), last, *times)


def seqs(page):
    return [row[0] for row in page.rows]


def test_missing_stream():
    assert parse_archived([], 0, 10) is None
    assert parse_archived([page_row(1, 3)], 0, 10) is None  # pages without a status


def test_pages_and_chunks_in_order():
    rows = [(7, "t7", None), page_row(4, 6), DONE, page_row(8, 10), page_row(1, 3)]
    page = parse_archived(rows, 0, 10)
    assert list(page.rows) == [(seq, f"t{seq}") for seq in range(1, 11)]
    assert (len(page.rows), page.rows[-1], page.rows[3:5]) == (10, (10, "t10"), [(4, "t4"), (5, "t5")])
    assert (page.end, page.is_last, page.is_archived) == (10, True, True)


@pytest.mark.parametrize(("after", "limit"), [(0, 1), (0, 3), (2, 5), (5, 1), (9, 1), (9, 100)])
def test_part_of_a_page(after, limit):
    page = parse_archived([DONE, page_row(1, 10)], after, limit)
    assert seqs(page) == list(range(after + 1, min(after + limit, 10) + 1))
    assert page.end == after + limit


def test_texts_that_were_not_read_end_the_page():
    page = parse_archived([DONE, page_row(1, 4), (5, None, 8)], 1, 6)
    assert seqs(page) == [2, 3, 4]
    assert (page.end, page.is_last) == (4, False)
    assert page.next_limit > 6


def test_large_chunk_ends_the_page():
    rows = [DONE, page_row(1, 2), (3, None, None), page_row(4, 6)]
    page = parse_archived(rows, 0, 160)
    assert (seqs(page), page.end, page.next_limit) == ([1, 2], 2, 10)
    page = parse_archived([DONE, *rows[2:]], 2, 160)
    assert (seqs(page), page.end, page.next_limit) == ([], 2, 10)
    assert not page.rows


def test_chunks_alone_are_not_archived():
    page = parse_archived([(-2, "error\nwhy", None), (1, "a", None), (2, "b", None)], 0, 10)
    assert list(page.rows) == [(1, "a"), (2, "b")]
    assert (page.state, page.error, page.is_archived) == ("error", "why", False)


def test_times():
    rows = [
        TIMED_DONE,
        (5, "t5", None, None, 7.5),
        page_row(1, 4, "[1500000, 250000, null, 3000000]", None),
        page_row(6, 7, None, None),
    ]
    page = parse_archived(rows, 1, 9)
    assert list(page.rows) == [
        (2, "t2", 1.75),
        (3, "t3", None),
        (4, "t4", 3.0),
        (5, "t5", 7.5),
        (6, "t6", None),
        (7, "t7", None),
    ]


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        (None, [None] * 3),
        ("[1790000000123456, 1, -3]", [1790000000.123456, 1790000000.123457, 1790000000.123454]),
        ("[null, 5, 1]", [None, 5e-6, 6e-6]),
        ("[-1, null, 253402214400000000]", [-1e-6, None, 253402214400.0]),
        ("[9007199254740993, 0, 0]", [9007199254.740993] * 3),
    ],
)
def test_seconds(times, seconds):
    assert list(seconds_of(times, 3)) == seconds


@pytest.mark.parametrize("inserted", [1, 2, 4, 5, 9, 10])
def test_chunk_inside_a_page(inserted):
    rows = [(inserted, f"t{inserted}", None), DONE, page_row(1, 4), page_row(5, 10)]
    for after in range(10):
        page = parse_archived(rows, after, 10)
        assert list(page.rows) == [(seq, f"t{seq}") for seq in range(after + 1, 11)]


def test_large_chunk_inside_a_page():
    page = parse_archived([DONE, page_row(1, 10), (5, None, None)], 0, 10)
    assert (seqs(page), page.end) == (list(range(1, 11)), 10)


def test_overlapping_pages():
    page = parse_archived([DONE, page_row(1, 6), page_row(4, 10)], 0, 10)
    assert list(page.rows) == [(seq, f"t{seq}") for seq in range(1, 11)]
    page = parse_archived([DONE, page_row(1, 6), (4, None, 10)], 0, 10)
    assert (seqs(page), page.end) == ([1, 2, 3, 4, 5, 6], 6)


def test_page_that_ends_after_the_stream():
    page = parse_archived([(-4, "done", None), page_row(1, 10)], 0, 10)
    assert (seqs(page), page.is_last) == ([1, 2, 3, 4], True)


def test_last_number_needs_no_expansion():
    page = parse_archived([DONE, (1, "not JSON", 10)], 0, 10)
    assert page.last_seq == 10
    assert parse_archived([DONE], 0, 10).last_seq is None
