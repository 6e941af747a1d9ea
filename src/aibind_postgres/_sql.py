"""The statements on streams, for given table names. Pure.

Parameters are numbered (`$1`), so that psycopg's raw cursors and asyncpg take the text as it is. Times are milliseconds
since the epoch, by the server's clock. A statement that concerns one stream names it as `id = $1` on each table that it
touches. The status table is touched before the chunks: both are locked in that order, by migrations too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, get_args

from .models import SynchronousCommit

if TYPE_CHECKING:
    from ._tables import Table

# Of all the clocks in PostgreSQL, this one moves on inside a transaction and still lets a comparison use an index.
NOW = "(extract(epoch FROM statement_timestamp()) * 1000)::bigint"

# The times that Python can tell, in any time zone. Others may write earlier and later ones, and infinite ones.
TELLABLE = "BETWEEN '0001-01-02 00:00Z' AND '9999-12-30 00:00Z'"

STATUS_ROW = "-greatest(total_chunks, 0) AS seq, state || coalesce(chr(10) || error, '') AS data"

CREATE = """
WITH created AS (
    INSERT INTO {status} (id, state, error, total_chunks, expires_at)
    VALUES ($1::text, 'active', NULL, 0, {now} + $2::bigint)
    ON CONFLICT (id) DO NOTHING
    RETURNING id
), orphans AS (
    -- Chunks that outlived an earlier stream of this id would hold the numbers of the new one.
    DELETE FROM {chunks} WHERE id = $1::text AND EXISTS (SELECT FROM created)
)
SELECT EXISTS (SELECT FROM created) {committed_so}
"""

APPEND = """
WITH advanced AS (
    UPDATE {status}
       SET total_chunks = total_chunks + 1,
           expires_at = {renewed_expiry}
     WHERE id = $1::text AND state = 'active' AND total_chunks >= 0
       AND ($3::bigint IS NULL OR total_chunks = $3::bigint - 1)
    RETURNING total_chunks
), stored AS (
    INSERT INTO {chunks} (id, seq, data)
    SELECT $1::text, total_chunks, $2::text FROM advanced
)
SELECT total_chunks FROM advanced {committed_so}
"""

# The JSON text is measured once, not once for every chunk in it.
APPEND_MANY = """
WITH advanced AS (
    UPDATE {status}
       SET total_chunks = total_chunks + json_array_length($2::text::json),
           expires_at = {renewed_expiry}
     WHERE id = $1::text AND state = 'active' AND total_chunks >= 0
       AND ($3::bigint IS NULL OR total_chunks = $3::bigint - 1)
    RETURNING total_chunks, total_chunks - json_array_length($2::text::json) AS last_before
), stored AS (
    INSERT INTO {chunks} (id, seq, data)
    SELECT $1::text, last_before + new.place, new.data
      FROM advanced, json_array_elements_text($2::text::json) WITH ORDINALITY AS new (data, place)
)
SELECT total_chunks FROM advanced {committed_so}
"""

# Many appends in one: a JSON array of objects with id, texts and expected, each id once. The rows are locked first, so
# that a number is judged by the row as it will be updated. A row that another transaction holds is left out instead of
# waited for: so one stream does not hold up the others of the batch, and two batches cannot deadlock.
APPEND_BATCH = """
WITH wanted AS MATERIALIZED (
    SELECT id, expected, texts, json_array_length(texts) AS number
      FROM json_to_recordset($1::text::json) AS item (id text, expected bigint, texts json)
), locked AS MATERIALIZED (
    SELECT id, total_chunks
      FROM {status}
     WHERE id = ANY (ARRAY(SELECT id FROM wanted)) AND state = 'active' AND total_chunks >= 0
       FOR UPDATE SKIP LOCKED
), advanced AS (
    UPDATE {status} AS s
       SET total_chunks = s.total_chunks + wanted.number,
           expires_at = {renewed_expiry}
      FROM locked JOIN wanted USING (id)
     WHERE s.id = locked.id
       AND (wanted.expected IS NULL OR locked.total_chunks = wanted.expected - 1)
    RETURNING wanted.id, s.total_chunks - wanted.number AS last_before, wanted.texts
), stored AS (
    INSERT INTO {chunks} (id, seq, data)
    SELECT advanced.id, last_before + new.place, new.data
      FROM advanced, json_array_elements_text(texts) WITH ORDINALITY AS new (data, place)
)
SELECT id, last_before FROM advanced {committed_so}
"""

# One snapshot: the first row is the status, and `_pages.Page` parses it: the number of chunks, negative, and the state
# with the error text in a second line. A page of chunks follows. A chunk above the number of chunks in the status is
# left over from another stream. A page is a range of numbers and not a LIMIT, which may be planned as a sort of all
# that follows. (No chunk has a number from 2^62 on.)
READ = """
SELECT {status_row} FROM {status} WHERE id = $1::text
UNION ALL
SELECT seq, data FROM {chunks}
 WHERE id = $1::text AND seq > $2::bigint
   AND seq <= least(least($2::bigint, 1::bigint << 62) + $3::bigint,
                    (SELECT total_chunks FROM {status} WHERE id = $1::text))
ORDER BY seq
"""

# READ for many streams: a JSON array of objects with place, id and after.
READ_BATCH = """
SELECT wanted.place, found.seq, found.data
  FROM json_to_recordset($1::text::json) AS wanted (place integer, id text, after bigint),
       LATERAL (
           SELECT {status_row} FROM {status} WHERE id = wanted.id
           UNION ALL
           SELECT seq, data FROM {chunks}
            WHERE id = wanted.id AND seq > wanted.after
              AND seq <= least(least(wanted.after, 1::bigint << 62) + $2::bigint,
                               (SELECT total_chunks FROM {status} WHERE id = wanted.id))
       ) AS found
 ORDER BY wanted.place, found.seq
"""

READ_TIMED = """
SELECT {status_row}, NULL::float8 AS written_at FROM {status} WHERE id = $1::text
UNION ALL
SELECT seq, data, CASE WHEN created_at {tellable} THEN extract(epoch FROM created_at)::float8 END FROM {chunks}
 WHERE id = $1::text AND seq > $2::bigint
   AND seq <= least(least($2::bigint, 1::bigint << 62) + $3::bigint,
                    (SELECT total_chunks FROM {status} WHERE id = $1::text))
ORDER BY seq
"""

# Where to read on behind an empty page: a stream may count far more chunks than it has.
NEXT = """
SELECT min(seq) FROM {chunks}
 WHERE id = $1::text AND seq > $2::bigint AND seq <= (SELECT total_chunks FROM {status} WHERE id = $1::text)
"""

STATUS = "SELECT state, error, greatest(total_chunks, 0) FROM {status} WHERE id = $1::text"

# What waiting readers ask, all in one: where do these streams stand?
POLL = """
SELECT id, state, total_chunks FROM {status}
 WHERE id = ANY (ARRAY(SELECT json_array_elements_text($1::text::json)))
"""

END = """
WITH ended AS (
    UPDATE {status}
       SET state = $2::text, error = $3::text, expires_at = {now} + $4::bigint
     WHERE id = $1::text AND state = 'active'
    RETURNING id
)
SELECT EXISTS (SELECT FROM ended) AS ended, EXISTS (SELECT FROM {status} WHERE id = $1::text) AS found
{committed_so}
"""

DELETE = """
WITH deleted AS (
    DELETE FROM {status} WHERE id = $1::text RETURNING total_chunks
), emptied AS (
    DELETE FROM {chunks} WHERE id = $1::text RETURNING seq
)
SELECT (SELECT total_chunks FROM deleted), (SELECT count(*) FROM emptied) {committed_so}
"""

# For the rare chunk that was appended while DELETE ran, after its snapshot; also if there is a new stream by now.
DELETE_ORPHANS = """
WITH now AS (
    SELECT total_chunks FROM {status} WHERE id = $1::text
), orphans AS (
    DELETE FROM {chunks} WHERE id = $1::text AND seq > coalesce((SELECT total_chunks FROM now), 0) RETURNING 1
)
SELECT (SELECT count(*) FROM orphans) {committed_so}
"""

# The optional column of migration 0002 is read through JSON, which gives NULL where it is missing; with OFFSET, once.
LIST = """
SELECT id, state, error, greatest(total_chunks, 0), expires_at,
       CASE WHEN t.created_at {tellable} THEN t.created_at END
  FROM {status} AS s, LATERAL (SELECT (to_jsonb(s) ->> 'created_at')::timestamptz OFFSET 0) AS t (created_at)
 WHERE ($1::text IS NULL OR state = $1::text) AND id > $2::text
 ORDER BY id
 LIMIT $3::bigint
"""

# The last column is what the next page gets as $6. As JSON writes it, a time is exact, whatever the session's settings.
LIST_BY_TIME = """
SELECT id, state, error, greatest(total_chunks, 0), expires_at,
       CASE WHEN created_at {tellable} THEN created_at END, to_jsonb(created_at) #>> '{{}}'
  FROM {status}
 WHERE ($1::text IS NULL OR state = $1::text)
   AND created_at >= coalesce($4::timestamptz, '-infinity')
   AND ($5::timestamptz IS NULL OR created_at < $5::timestamptz)
   AND (created_at, id) > (coalesce($6::text::timestamptz, '-infinity'), $2::text)
 ORDER BY created_at, id
 LIMIT $3::bigint
"""

# SKIP LOCKED: what another process is just cleaning up is left to it. The ids become an array, since a join may be
# planned as a scan of all the chunks that there are.
CLEANUP = """
WITH expired AS MATERIALIZED (
    SELECT id FROM {status}
     WHERE state <> 'active' AND expires_at <= {now}
     ORDER BY expires_at
     LIMIT $1::bigint
       FOR UPDATE SKIP LOCKED
), chunks AS (
    DELETE FROM {chunks} WHERE id = ANY (ARRAY(SELECT id FROM expired)) RETURNING 1
), streams AS (
    DELETE FROM {status} WHERE id = ANY (ARRAY(SELECT id FROM expired)) RETURNING 1
)
SELECT (SELECT count(*) FROM streams) AS streams, (SELECT count(*) FROM chunks) AS chunks {committed_so}
"""

# The last sign of life is the last chunk's created_at, or the stream's own, by migration 0002. Without these it is what
# expires_at tells for this store's ttl, and may be a quarter of the ttl newer: nobody who showed one is ended. An
# expiry too far off to be a time is taken for one that is not: its error would keep all streams from being ended.
FAIL_ABANDONED = """
WITH silent AS MATERIALIZED (
    SELECT id FROM {status} AS s
     WHERE state = 'active'
       AND coalesce(
               CASE WHEN total_chunks <= 0
                    THEN (to_jsonb(s) ->> 'created_at')::timestamptz
                    ELSE (SELECT (to_jsonb(c) ->> 'created_at')::timestamptz
                            FROM {chunks} AS c WHERE c.id = s.id AND c.seq = s.total_chunks)
               END,
               to_timestamp((least(greatest(expires_at, 0), 8000000000000000) - $1::bigint
                             + least(greatest(total_chunks, 0), 1) * ($1::bigint / 4)) / 1000.0))
           <= statement_timestamp() - $2::bigint * interval '1 millisecond'
     ORDER BY id
       FOR UPDATE SKIP LOCKED
), ended AS (
    UPDATE {status}
       SET state = 'error', error = $3::text, expires_at = {now} + $1::bigint
     WHERE id = ANY (ARRAY(SELECT id FROM silent)) AND state = 'active'
    RETURNING id
)
SELECT id FROM ended {committed_so}
"""

NOTIFY = "SELECT pg_notify($1::text, payload) FROM json_array_elements_text($2::text::json) AS payload"


class StreamStatements:
    """The statements of a stream store, for its two tables; with `synchronous_commit`, those that write set it."""

    def __init__(self, chunks: Table, status: Table, synchronous_commit: SynchronousCommit | None = None) -> None:
        if synchronous_commit not in (None, *get_args(SynchronousCommit)):
            accepted = ", ".join(get_args(SynchronousCommit))
            raise ValueError(f"synchronous_commit must be one of {accepted}, not {synchronous_commit!r}")
        # For the transaction of the statement alone, and within it: a pooler takes no setting of a session.
        setting = f"WHERE set_config('synchronous_commit', '{synchronous_commit}', true) IS NOT NULL"
        values = {
            "chunks": chunks.quoted,
            "status": status.quoted,
            "now": NOW,
            "tellable": TELLABLE,
            "status_row": STATUS_ROW,
            "committed_so": "" if synchronous_commit is None else setting,
        }

        def fill(statement: str, ttl: str = "$4") -> str:
            return statement.format_map({**values, "renewed_expiry": renewed_expiry(ttl)})

        self.create = fill(CREATE)
        self.append = fill(APPEND)
        self.append_many = fill(APPEND_MANY)
        self.append_batch = fill(APPEND_BATCH, ttl="$2")
        self.read = fill(READ)
        self.read_batch = fill(READ_BATCH)
        self.read_timed = fill(READ_TIMED)
        self.next = fill(NEXT)
        self.status = fill(STATUS)
        self.poll = fill(POLL)
        self.end = fill(END)
        self.delete = fill(DELETE)
        self.delete_orphans = fill(DELETE_ORPHANS)
        self.list = fill(LIST)
        self.list_by_time = fill(LIST_BY_TIME)
        self.cleanup = fill(CLEANUP)
        self.fail_abandoned = fill(FAIL_ABANDONED)


def renewed_expiry(ttl: str) -> str:
    """Return what expires_at becomes by a sign of life in an active stream, with the ttl in a parameter.

    It is renewed only once a quarter of the ttl has gone by since the last time: most appends leave the column alone,
    and so stay heap-only updates.
    """
    return f"""
           CASE WHEN expires_at < {NOW} + {ttl}::bigint - {ttl}::bigint / 4
                THEN {NOW} + {ttl}::bigint ELSE expires_at END""".strip()


def json_text(value: object) -> str:
    """Return a value as one JSON parameter."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def json_array(texts: Iterable[str]) -> str:
    """Return texts as one JSON parameter: psycopg builds an array of them several times more slowly."""
    return json_text(list(texts))
