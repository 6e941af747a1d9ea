"""The statements that delete streams, as templates for `_sql`, and their size. Pure."""

from __future__ import annotations

MAX_ROWS = 1000  # locked by one statement
MAX_CHUNKS = 10_000  # deleted by one statement

# Statements that delete chunks are bounded in chunks. If more remain, a tombstone replaces the row of the stream in the
# same statement: every reader and writer, also of other software, finds the stream missing, and the rest is deleted
# later, by any process. A tombstone is a status row with an id of its own. `error` is the id of the stream, and
# total_chunks the number up to which chunks may remain. Others never clean it up, since it does not expire.
TOMBSTONE = "{id} || ' deleted ' || gen_random_uuid(), 'deleted', {id}, 2147483647, 9223372036854775807"

# Sequence numbers up to $2 are at most $2 chunks. A chunk that was appended after the snapshot remains as well. If $2
# is NULL, all chunks of the snapshot are deleted, without a tombstone.
DELETE = """
WITH deleted AS (
    DELETE FROM {status} WHERE id = $1::text RETURNING total_chunks
), emptied AS (
    DELETE FROM {chunks} WHERE id = $1::text AND seq <= coalesce($2::bigint, 9223372036854775807) RETURNING 1
), buried AS (
    INSERT INTO {status} (id, state, error, total_chunks, expires_at)
    SELECT {tombstone_of_1}
     WHERE $2::bigint IS NOT NULL
       AND ((SELECT total_chunks FROM deleted) > (SELECT count(*) FROM emptied){plus_archived}
            OR EXISTS (SELECT FROM {chunks} WHERE id = $1::text AND seq > $2::bigint))
    RETURNING id
)
SELECT EXISTS (SELECT FROM deleted) AS existed, (SELECT id FROM buried) AS tombstone {commit_setting}
"""

TOMBSTONES = "SELECT id, error FROM {status} WHERE state = 'deleted' AND expires_at = 9223372036854775807"

# Deletes the last $3 remaining chunks of stream $1 with tombstone $2, or the tombstone if none remain. Keeps the chunks
# of a new stream with the same id. SKIP LOCKED leaves a tombstone to the process that works on it.
SWEEP = """
WITH tombstone AS MATERIALIZED (
    SELECT total_chunks AS last FROM {status} WHERE id = $2::text AND state = 'deleted' FOR UPDATE SKIP LOCKED
), kept AS MATERIALIZED (
    SELECT coalesce((SELECT total_chunks FROM {status} WHERE id = $1::text), 0) AS last
), remaining AS MATERIALIZED (
    SELECT max(seq) AS last FROM {chunks}
     WHERE id = $1::text AND seq > (SELECT last FROM kept) AND seq <= (SELECT last FROM tombstone)
), swept AS (
    DELETE FROM {chunks}
     WHERE id = $1::text AND seq > (SELECT greatest(remaining.last - $3::bigint, kept.last) FROM remaining, kept)
       AND seq <= (SELECT last FROM remaining)
    RETURNING 1
), advanced AS (
    UPDATE {status} SET total_chunks = (SELECT last - $3::bigint FROM remaining)
     WHERE id = $2::text AND (SELECT last FROM remaining) IS NOT NULL
), finished AS (
    DELETE FROM {status}
     WHERE id = $2::text AND EXISTS (SELECT FROM tombstone) AND (SELECT last FROM remaining) IS NULL
)
SELECT (SELECT count(*) FROM swept) AS deleted, (SELECT last FROM remaining) IS NOT NULL AS more {commit_setting}
"""

# Deletes chunks that a half-finished clean-up has left over from an earlier stream with this id: those that are not
# counted and not known to be younger than the stream, among the next $2 numbers. Writers count a chunk no later than
# they insert it.
DELETE_LEFTOVERS = """
WITH leftovers AS (
    DELETE FROM {chunks} AS c USING {status} AS s
     WHERE c.id = $1::text AND s.id = $1::text AND c.seq > greatest(s.total_chunks, 0)
       AND c.seq <= greatest(s.total_chunks, 0) + $2::bigint
       AND {is_left_over}
    RETURNING 1
)
SELECT (SELECT count(*) FROM leftovers) {commit_setting}
"""

# created_at of migration 0002 is read through JSON, which returns NULL if the column is missing.
IS_LEFT_OVER = """(to_jsonb(c) ->> 'created_at' IS NULL
            OR (to_jsonb(c) ->> 'created_at')::timestamptz < (to_jsonb(s) ->> 'created_at')::timestamptz)"""

# Deletes expired streams with at most {limit} chunks together. Keeps tombstones and the housekeeping marker. The size
# of a stream is its highest sequence number. A larger one is replaced by a tombstone; if {limit} is NULL, one stream of
# any size is deleted without a tombstone. SKIP LOCKED skips rows that another process is cleaning up. The ids are
# passed as arrays, of which the planner expects few rows instead of $1: it might scan all chunks for those.
CLEANUP = """
WITH expired AS MATERIALIZED (
    SELECT id, expires_at FROM {status}
     WHERE state <> 'active' AND state <> 'deleted' AND expires_at <= {due}{scope}
     ORDER BY expires_at
     LIMIT $1::bigint
       FOR UPDATE SKIP LOCKED
), sized AS MATERIALIZED (
    SELECT id, expires_at, size
      FROM expired, LATERAL (
               SELECT coalesce(max(seq), 0){plus_pages} FROM {chunks} WHERE id = expired.id
           ) AS c (size)
), summed AS MATERIALIZED (
    SELECT id, size, sum(size) OVER (ORDER BY expires_at, id ROWS UNBOUNDED PRECEDING) AS sum FROM sized
), chosen AS MATERIALIZED (
    SELECT id, size FROM summed WHERE sum <= {limit}::bigint OR sum = size
), chunks AS (
    DELETE FROM {chunks} AS c
     USING (
               SELECT unnest(ARRAY(SELECT id FROM chosen WHERE size <= coalesce({limit}::bigint, size))) {few}
           ) AS emptied (id)
     WHERE c.id = emptied.id
    RETURNING 1
), streams AS (
    DELETE FROM {status} AS s
     USING (SELECT unnest(ARRAY(SELECT id FROM chosen)) {few}) AS ended (id)
     WHERE s.id = ended.id
    RETURNING 1
), buried AS (
    INSERT INTO {status} (id, state, error, total_chunks, expires_at)
    SELECT {tombstone_of_id} FROM chosen WHERE size > {limit}::bigint
)
SELECT (SELECT count(*) FROM expired) AS found, (SELECT count(*) FROM streams) AS streams,
       (SELECT count(*) FROM chunks){plus_archived_of_chosen} AS chunks
{commit_setting}
"""

# CLEANUP of streams that expired $2 milliseconds ago, except those with ids from $3 to $4.
DUE_IN_PARTITIONS = "{now} - $2::bigint"
OUTSIDE_PARTITIONS = " AND (id < $3::text OR id >= $4::text)"


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
