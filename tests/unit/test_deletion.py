"""Choosing how many expired rows the next statement locks."""

from __future__ import annotations

import pytest

from aibind_postgres._deletion import MAX_ROWS, next_limit


@pytest.mark.parametrize(
    ("limit", "found", "deleted", "expected"),
    [
        (1000, 0, 0, 0),
        (1000, 999, 999, 0),
        (1000, 1000, 1000, MAX_ROWS),
        (1000, 1000, 3, 6),
        (6, 6, 6, 12),
        (6, 4, 2, 4),
        (6, 5, 0, 0),  # a trigger prevents the deletion
    ],
)
def test_next_limit(limit, found, deleted, expected):
    assert next_limit(limit, found, deleted) == expected
