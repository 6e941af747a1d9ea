"""Parsing the rows of a page, and choosing the size of the next one."""

from __future__ import annotations

import pytest

from aibind_postgres import StreamChunk, StreamStatus
from aibind_postgres._pages import LIMIT_DIVISOR, MAX_PAGE_CHUNKS, PAGE_CHARACTERS, Page


def test_no_rows_mean_a_missing_stream():
    assert Page.parse([], 0, 50) is None


def test_status_row_and_chunks():
    page = Page.parse([(-7, "active"), (4, "a"), (5, "b\nc")], 3, 2)
    assert page == Page("active", None, 7, [(4, "a"), (5, "b\nc")], 5, MAX_PAGE_CHUNKS, 5)
    chunks = list(page.chunks)
    assert chunks == [StreamChunk(4, "a"), StreamChunk(5, "b\nc")]
    assert all(type(chunk) is StreamChunk for chunk in chunks)
    assert page.status == StreamStatus("active", None, 7)


@pytest.mark.parametrize(
    ("status", "state", "error"),
    [("done", "done", None), ("error\n", "error", ""), ("error\nfirst\nsecond", "error", "first\nsecond")],
)
def test_error_text(status, state, error):
    page = Page.parse([(0, status)], 0, 50)
    assert (page.state, page.error, page.total, page.rows) == (state, error, 0, [])


@pytest.mark.parametrize(("after", "limit", "is_last"), [(0, 6, False), (0, 7, True), (7, 1, True), (100, 1, True)])
def test_last_page(after, limit, is_last):
    assert Page.parse([(-7, "active")], after, limit).is_last is is_last


@pytest.mark.parametrize(
    ("lengths", "limit"),
    [
        ([], MAX_PAGE_CHUNKS),
        ([0, 0], MAX_PAGE_CHUNKS),
        ([1] * 50, MAX_PAGE_CHUNKS),
        ([1000], PAGE_CHARACTERS // 1000),
        ([999, 1001], PAGE_CHARACTERS // 1000),
        ([PAGE_CHARACTERS], 1),
        ([PAGE_CHARACTERS * 3], 1),
    ],
)
def test_next_limit(lengths, limit):
    rows = [(-100, "active"), *((seq, "x" * length) for seq, length in enumerate(lengths, 1))]
    assert Page.parse(rows, 0, 50).next_limit == limit


@pytest.mark.parametrize(
    ("texts", "end", "next_limit"),
    [(["a", "", None, "c"], 5, 3), (["a", None], 4, 3), ([None, "b"], 3, 3)],
    ids=["third", "last", "first"],
)
def test_page_ends_before_a_chunk_that_is_too_large(texts, end, next_limit):
    page = Page.parse([(-100, "done"), *enumerate(texts, 4)], 3, 3 * LIMIT_DIVISOR)
    assert [seq for seq, _ in page.rows] == list(range(4, end + 1))
    assert (page.end, page.next_limit, page.is_last) == (end, next_limit, False)


def test_limits_after_a_large_chunk_reach_one():
    limit = MAX_PAGE_CHUNKS
    for _ in range(3):
        limit = Page.parse([(-9, "done"), (1, None)], 0, limit).next_limit
    assert limit == 1
