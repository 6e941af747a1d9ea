"""The statements with which processes take turns at housekeeping, as templates for the other modules. Pure.

A marker row in the table of the store holds the time of the last turn as its `expires_at`. A lock could not: behind a
transaction pooler, no session lasts for a period. The row has state "deleted", or has expired, so that readers, writers
and listings ignore it, also those of other software. If a clean-up of other software deletes it, a process that starts
before the next turn takes one at once.
"""

from __future__ import annotations

from collections.abc import Mapping

MARKER = "aibind_postgres.housekeeping"  # the id of the marker row

# If another process has just taken a turn in a long transaction, this statement must not wait for its row. The table
# with name $3 identifies the lock, so that stores on other tables do not affect each other.
LOCK = "SELECT pg_try_advisory_xact_lock(hashtext($1::text), to_regclass($3::text)::oid::integer) AS acquired"

# A time after that of this statement is of a statement that overtook it. One far in the future is of a clock that has
# been set back since.
DUE = "marker.expires_at NOT BETWEEN excluded.expires_at - $2::bigint + 1 AND excluded.expires_at + $2::bigint"

# Takes a turn with marker $1, unless one was taken in the last $2 milliseconds. Returns whether it did, and the number
# of milliseconds from now to the turn after the one before this statement.
TAKE_TURN = """
WITH locked AS MATERIALIZED (
    {lock}
), taken AS (
    INSERT INTO {status} AS marker (id, state, error, total_chunks, expires_at)
    SELECT $1::text, 'deleted', NULL, 0, {now} FROM locked WHERE acquired
    ON CONFLICT (id) DO UPDATE SET expires_at = excluded.expires_at WHERE marker.state = 'deleted' AND {due}
    RETURNING 1
)
SELECT EXISTS (SELECT FROM taken) AS taken,
       (SELECT expires_at + $2::bigint - {now} FROM {status} WHERE id = $1::text) AS remaining
{commit_setting}
"""

TAKE_CONVERSATION_TURN = """
WITH locked AS MATERIALIZED (
    {lock}
), taken AS (
    INSERT INTO {conversations} AS marker (session_id, data, expires_at)
    SELECT $1::text, '', {now} FROM locked WHERE acquired
    ON CONFLICT (session_id) DO UPDATE SET expires_at = excluded.expires_at WHERE marker.data = '' AND {due}
    RETURNING 1
)
SELECT EXISTS (SELECT FROM taken) AS taken,
       (SELECT expires_at + $2::bigint - {now} FROM {conversations} WHERE session_id = $1::text) AS remaining
"""


def seconds_until_next_turn(taken: bool, remaining: int | None, every: int) -> float:
    """Return for how many seconds to wait before the next attempt to take a turn.

    Args:
        taken: Whether the last attempt took a turn.
        remaining: Its second result: milliseconds until the turn that was due, or None if there was no marker.
        every: The period in milliseconds.
    """
    # Otherwise another process is taking the turn that is due, so the next one is due in about a period.
    is_later = not taken and remaining is not None and 0 < remaining < every
    return (remaining + 1 if is_later and remaining is not None else every) / 1000


def describe(counts: Mapping[str, int]) -> str:
    """Return the counts of a turn for the log, without zeros. Empty if nothing was done."""
    return ", ".join(f"{name}: {count}" for name, count in counts.items() if count)
