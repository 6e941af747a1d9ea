"""The size of the statements that delete expired rows. Pure."""

from __future__ import annotations

MAX_ROWS = 1000  # locked by one statement
MAX_CHUNKS = 10_000  # deleted by one statement


def next_limit(limit: int, found: int, deleted: int) -> int:
    """Return how many expired rows the next statement should lock, or 0 if it would find none.

    Args:
        limit: How many rows the last statement could lock.
        found: How many rows it has locked.
        deleted: How many of them it has deleted: the first ones, up to a limit of their total size.
    """
    if deleted == 0 or deleted == found < limit:
        return 0
    return min(MAX_ROWS, 2 * deleted)
