"""The statements on streams, for given table names. Pure.

Conventions:

- Parameters are numbered (`$1`), so that psycopg's raw cursors and asyncpg accept the same text.
- Times are milliseconds since the epoch, by the server's clock.
- A statement on one stream has the condition `id = $1` for each table.
- A statement on several streams reaches each of them by a join on `id`, with an index and in one partition.
- CASE, COALESCE, RETURNING and ON CONFLICT … WHERE contain IMMUTABLE functions only: Citus refuses the others there.
- The status table is locked before the chunks table, as in the migrations.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, get_args

from . import _distributed
from ._archive import ARCHIVE, NO_TIMES, READ_ARCHIVED, TIMES, UNARCHIVE, archive_values
from ._deletion import (
    CLEANUP,
    DELETE,
    DELETE_LEFTOVERS,
    DUE_IN_PARTITIONS,
    IS_LEFT_OVER,
    OUTSIDE_PARTITIONS,
    SWEEP,
    TOMBSTONE,
    TOMBSTONES,
)
from ._housekeeping import DUE, LOCK, TAKE_TURN
from ._leases import DROP_LEASE, END_EXPIRED, EXPIRED, MIN_ANSWER_TTL, RENEW_LEASES, TAKE_LEASE
from ._pages import BATCH_BYTES, FITS, NEXT, READ, READ_BATCH, READ_TIMED, RUNNING_SIZE, STANDBY_STATUS, STATUS_ROW
from ._replica import IDENTIFIED_STATUS_ROW, ORIGIN
from ._stream_list import (
    ACTIVE,
    DETAILS,
    GET_INFO,
    IN_RANGE,
    INFO,
    LIST,
    LIST_BY_TIME,
    OF_OWNER,
    OF_SESSION,
    RUNNING,
    TIMED_STATUS,
    TIMED_STATUS_WITHOUT_0002,
)
from .models import SynchronousCommit

if TYPE_CHECKING:
    from ._tables import Table

# Unlike now(), statement_timestamp() advances inside a transaction; unlike clock_timestamp(), it can use an index.
NOW = "(extract(epoch FROM statement_timestamp()) * 1000)::bigint"

# Limits nothing, but the planner does not know that and expects a tenth of the rows: 1 instead of 10 from an array. It
# then reaches each stream by an index. For more rows, it might prefer a scan of the whole table.
FEW = "LIMIT (SELECT NULL::bigint)"

# Extends a lease that is shorter than a new one.
RENEWAL = f"greatest({NOW} + {{lease}} - lease_until, 0)"

# The columns of migration 0004 in CREATE. $6 is the ttl of this stream, or NULL for the ttl of each store.
DETAIL_COLUMNS = ", session_id, owner, metadata, ttl_ms, lease_until, wire"
DETAIL_VALUES = f", $3::text, $4::text, $5::text::jsonb, $6::bigint, {NOW} + $7::bigint, $8::text"

# Chunks left over from an earlier stream with this id would occupy sequence numbers of the new one. They are deleted up
# to number $3, or all of them if it is NULL. If more remain, a tombstone makes `cleanup` delete them, or an append that
# meets them does.
CREATE = """
WITH created AS (
    INSERT INTO {status} (id, state, error, total_chunks, expires_at{detail_columns})
    VALUES ($1::text, 'active', NULL, 0, {expiry}{detail_values})
    ON CONFLICT (id) DO NOTHING
    RETURNING id
), leftovers AS (
    DELETE FROM {chunks}
     WHERE id = $1::text AND seq <= coalesce({limit}::bigint, 9223372036854775807) AND EXISTS (SELECT FROM created)
), buried AS (
    INSERT INTO {status} (id, state, error, total_chunks, expires_at)
    SELECT {tombstone_of_1} FROM created
     WHERE EXISTS (SELECT FROM {chunks} WHERE id = $1::text AND seq > {limit}::bigint)
)
SELECT EXISTS (SELECT FROM created) {commit_setting}
"""

APPEND = """
WITH advanced AS (
    UPDATE {status}
       SET total_chunks = total_chunks + 1,
           expires_at = {renewed_expiry}{renewed_lease}
     WHERE id = $1::text AND state = 'active' AND total_chunks >= 0
       AND ($3::bigint IS NULL OR total_chunks = $3::bigint - 1)
    RETURNING total_chunks
), stored AS (
    INSERT INTO {chunks} (id, seq, data)
    SELECT $1::text, total_chunks, $2::text FROM advanced
)
SELECT total_chunks FROM advanced {commit_setting}
"""

# Computes the length of the array in RETURNING: in the SELECT it would be computed again for each chunk.
APPEND_MANY = """
WITH advanced AS (
    UPDATE {status}
       SET total_chunks = total_chunks + json_array_length($2::text::json),
           expires_at = {renewed_expiry}{renewed_lease}
     WHERE id = $1::text AND state = 'active' AND total_chunks >= 0
       AND ($3::bigint IS NULL OR total_chunks = $3::bigint - 1)
    RETURNING total_chunks, total_chunks - json_array_length($2::text::json) AS last_before
), stored AS (
    INSERT INTO {chunks} (id, seq, data)
    SELECT $1::text, last_before + new.ordinal, new.data
      FROM advanced, json_array_elements_text($2::text::json) WITH ORDINALITY AS new (data, ordinal)
)
SELECT total_chunks FROM advanced {commit_setting}
"""

# Appends to several streams. $1 is a JSON array of objects with id, texts and expected; each id occurs once. The rows
# are locked first, so that `expected` is compared with the row version that is updated. Rows that other transactions
# have locked are skipped, so that one stream cannot delay the others of the batch, and two batches cannot deadlock.
APPEND_BATCH = """
WITH wanted AS MATERIALIZED (
    SELECT id, expected, texts, json_array_length(texts) AS added
      FROM json_to_recordset($1::text::json) AS item (id text, expected bigint, texts json)
    {few}
), locked AS MATERIALIZED (
    SELECT wanted.*, total_chunks
      FROM wanted, LATERAL (
               SELECT total_chunks FROM {status}
                WHERE id = wanted.id AND state = 'active' AND total_chunks >= 0
                  FOR UPDATE SKIP LOCKED
           ) AS found
    {few}
), advanced AS (
    UPDATE {status} AS s
       SET total_chunks = s.total_chunks + locked.added,
           expires_at = {renewed_expiry}{renewed_lease}
      FROM (SELECT * FROM locked WHERE expected IS NULL OR total_chunks = expected - 1 {few}) AS locked
     WHERE s.id = locked.id
    RETURNING locked.id, s.total_chunks - locked.added AS last_before, locked.texts
), stored AS (
    INSERT INTO {chunks} (id, seq, data)
    SELECT advanced.id, last_before + new.ordinal, new.data
      FROM advanced, json_array_elements_text(texts) WITH ORDINALITY AS new (data, ordinal)
)
SELECT id, last_before FROM advanced {commit_setting}
"""

# Why an append was skipped: the status, and how many of the texts in the JSON array $3 are stored, from number $2 on. A
# collation may treat different texts as equal. One snapshot: a repeated append could be stored between two statements.
SKIPPED = """
SELECT state, greatest(total_chunks, 0),
       (SELECT count(*)
          FROM json_array_elements_text($3::text::json) WITH ORDINALITY AS sent (data, ordinal), {chunks} AS stored
         WHERE id = $1::text AND seq >= $2::bigint
           AND seq < least($2::bigint, 1::bigint << 62) + json_array_length($3::text::json) AND seq <= total_chunks
           AND seq - $2::bigint = sent.ordinal - 1 AND stored.data COLLATE "C" = sent.data){plus_archived_texts}
  FROM {status} WHERE id = $1::text
"""

STATUS = "SELECT state, error, greatest(total_chunks, 0) FROM {status} WHERE id = $1::text"

# The states of the streams for which readers wait, and whether their leases have expired.
POLL = """
SELECT s.id, s.state, s.total_chunks, s.is_expired
  FROM (SELECT unnest(ARRAY(SELECT json_array_elements_text($1::text::json))) {few}) AS wanted (id),
       LATERAL (SELECT id, state, total_chunks, {lease_expired} AS is_expired FROM {status} WHERE id = wanted.id) AS s
"""

# The seconds from the insertion of a chunk to the arrival of this statement.
AGE = """
SELECT extract(epoch FROM statement_timestamp() - created_at)::double precision FROM {chunks}
 WHERE id = $1::text AND seq = $2::bigint
"""

END = """
WITH ended AS (
    UPDATE {status}
       SET state = $2::text, error = $3::text,
           expires_at = greatest(
               {now} + {ttl_of_4}, CASE WHEN $2::text = 'done' THEN 0 ELSE {earlier_expiry_4} END
           )
     WHERE id = $1::text AND state = 'active'
    RETURNING id
)
SELECT EXISTS (SELECT FROM ended) AS ended, EXISTS (SELECT FROM {status} WHERE id = $1::text) AS found
{commit_setting}
"""

# Checks the next $5 active streams after id $4. The last activity is created_at of the last stored chunk, or of the
# stream if it has no chunks. A writer may count a chunk before it stores it, so the last stored chunk may have a lower
# number. A stream that gets a chunk after the snapshot is kept. Rows from before migration 0002 have no created_at, and
# nothing else shows that their writer lives: the TypeScript package does not renew expires_at. But a chunk of a living
# writer has got a time since the migration. $6 is whether the migration has been present for at least the time of
# silence.
FAIL_ABANDONED = """
WITH page AS MATERIALIZED (
    SELECT id, total_chunks, created_at
      FROM {status}
     WHERE state = 'active' AND id > $4::text {without_lease}
     ORDER BY id
     LIMIT $5::bigint
), silent AS MATERIALIZED (
    SELECT page.id, total_chunks
      FROM page LEFT JOIN LATERAL (
               SELECT seq, created_at FROM {chunks}
                WHERE id = page.id AND seq <= page.total_chunks
                ORDER BY seq DESC
                LIMIT 1
           ) AS last_chunk ON true,
           LATERAL (
               SELECT CASE WHEN seq IS NULL THEN page.created_at ELSE last_chunk.created_at END
           ) AS activity (last_time)
     WHERE last_time <= statement_timestamp() - $2::bigint * interval '1 millisecond'
        OR (last_time IS NULL AND $6::boolean)
), locked AS MATERIALIZED (
    SELECT s.id
      FROM silent, LATERAL (
               SELECT id FROM {status}
                WHERE id = silent.id AND state = 'active' AND total_chunks = silent.total_chunks {without_lease}
                  FOR UPDATE SKIP LOCKED
           ) AS s
), ended AS (
    UPDATE {status} AS s
       SET state = 'error', error = $3::text, expires_at = greatest({now} + {ttl_of_1}, {earlier_expiry_1})
      FROM (SELECT unnest(ARRAY(SELECT id FROM locked)) {few}) AS abandoned (id)
     WHERE s.id = abandoned.id
    RETURNING s.id
)
SELECT last, ended.id FROM (SELECT max(id) FROM page) AS page (last) LEFT JOIN ended ON true {commit_setting}
"""

# The columns of the tables in the JSON array $1, whether each table may be read, and whether the server has Citus.
# created_at counts only with its default, which the migration sets later: without it, no chunk has a time.
COLUMNS = f"""
SELECT wanted.name, attname::text, has_table_privilege(attrelid, 'SELECT') AS is_readable,
       {_distributed.HAS_CITUS} AS has_citus
  FROM json_array_elements_text($1::text::json) AS wanted (name), pg_attribute
 WHERE attrelid = to_regclass(wanted.name) AND attnum > 0 AND NOT attisdropped
   AND (atthasdef OR attname <> 'created_at')
"""

NOTIFY = "SELECT pg_notify($1::text, payload) FROM json_array_elements_text($2::text::json) AS payload"


class StreamStatements:
    """The statements of one stream store, with its table names filled in.

    Args:
        chunks: The chunks table.
        status: The status table.
        synchronous_commit: PostgreSQL's setting of this name for statements that write; the server's by default.
        lease: The lease of a producer in milliseconds, if the status table has the columns of migration 0004. Default:
            None, if it has not.
        archive: Whether the tables have migration 0005; False by default.

    Raises:
        ValueError: `synchronous_commit` is not a value of PostgreSQL's setting.
    """

    def __init__(
        self,
        chunks: Table,
        status: Table,
        synchronous_commit: SynchronousCommit | None = None,
        *,
        lease: int | None = None,
        archive: bool = False,
    ) -> None:
        if synchronous_commit not in (None, *get_args(SynchronousCommit)):
            accepted = ", ".join(get_args(SynchronousCommit))
            raise ValueError(f"synchronous_commit must be one of {accepted}, not {synchronous_commit!r}")
        # Applies to the transaction of the statement only: transaction poolers do not keep session settings.
        setting = f"set_config('synchronous_commit', '{synchronous_commit}', true) IS NOT NULL"
        values = {
            "chunks": chunks.quoted,
            "status": status.quoted,
            "now": NOW,
            "in_range": IN_RANGE,
            "few": FEW,
            "info": INFO.format(in_range=IN_RANGE),
            "timed_status": (TIMED_STATUS_WITHOUT_0002 if lease is None else TIMED_STATUS).format(status=status.quoted),
            "is_left_over": IS_LEFT_OVER,
            "append_function": status.append_function,
            "details": "" if lease is None else DETAILS,
            "scope": "",
            "detail_columns": "",
            "detail_values": "",
            "lease": str(lease),
            "kept": str(MIN_ANSWER_TTL),
            "without_lease": "" if lease is None else "AND lease_until IS NULL",
            # Without a lease, the sum is NULL.
            "renewed_lease": "" if lease is None else f", lease_until = lease_until + {RENEWAL.format(lease=lease)}",
            "lease_expired": "NULL::boolean" if lease is None else f"lease_until <= {NOW}",
            "status_row": STATUS_ROW,
            "fits_in_page": FITS.format(limit="$3::bigint"),
            "fits_in_batch": FITS.format(limit='wanted."limit"'),
            "running_size": RUNNING_SIZE,
            "batch_bytes": BATCH_BYTES,
            "lock": LOCK,
            "due": DUE,
            "tombstone_of_1": TOMBSTONE.format(id="$1::text"),
            "tombstone_of_id": TOMBSTONE.format(id="id"),
            "commit_setting": "" if synchronous_commit is None else f"WHERE {setting}",
            "and_commit_setting": "" if synchronous_commit is None else f"AND {setting}",
            **archive_values(chunks.archive.quoted if archive else None, FEW),
        }

        def ttl_of_stream(ttl: str) -> str:
            return f"{ttl}::bigint" if lease is None else f"coalesce(ttl_ms, {ttl}::bigint)"

        def fill(statement: str, ttl: str = "$4", **others: str) -> str:
            renewed = f"greatest(expires_at, {rounded_expiry(ttl_of_stream(ttl))})"
            expiry = rounded_expiry(f"{ttl}::bigint")
            own = {number: ttl_of_stream(f"${number}") for number in (1, 3, 4)}
            ttls = {f"ttl_of_{number}": own[number] for number in own}
            ttls |= {f"earlier_expiry_{number}": earlier_expiry(own[number]) for number in own}
            return statement.format_map({**values, **ttls, "expiry": expiry, "renewed_expiry": renewed, **others})

        identified = {"status_row": IDENTIFIED_STATUS_ROW.format(chunks=chunks.quoted)}
        self.create = fill(CREATE, ttl="$2", limit="$3")
        if lease is not None:
            details = {"detail_columns": DETAIL_COLUMNS, "detail_values": DETAIL_VALUES}
            self.create_with_details = fill(CREATE, ttl="$2", limit="$9", **details)
            self.active = fill(ACTIVE)
            self.running = fill(RUNNING)
            self.list_of_session = fill(LIST, scope=OF_SESSION.format(4, 5))
            self.list_of_session_by_time = fill(LIST_BY_TIME, scope=OF_SESSION.format(7, 8))
            self.list_of_owner = fill(LIST, scope=OF_OWNER.format(4))
            self.list_of_owner_by_time = fill(LIST_BY_TIME, scope=OF_OWNER.format(7))
            self.take_lease = fill(TAKE_LEASE)
            self.drop_lease = fill(DROP_LEASE)
            self.renew_leases = fill(RENEW_LEASES)
            self.end_expired = fill(END_EXPIRED)
            self.expired = fill(EXPIRED)
            self.append_distributed = fill(_distributed.APPEND)
            self.delete_leftovers_distributed = fill(DELETE_LEFTOVERS, is_left_over=_distributed.IS_LEFT_OVER)
            self.end_expired_distributed = fill(_distributed.END_EXPIRED)
        if archive:
            self.archive = fill(ARCHIVE)
            self.unarchive = fill(UNARCHIVE)
            self.read_archived = fill(READ_ARCHIVED, **NO_TIMES)
            self.read_archived_timed = fill(READ_ARCHIVED, **TIMES)
            self.read_replica_archived = fill(READ_ARCHIVED, **NO_TIMES, **identified)
            self.read_replica_archived_timed = fill(READ_ARCHIVED, **TIMES, **identified)
        self.append = fill(APPEND)
        self.append_many = fill(APPEND_MANY)
        self.append_batch = fill(APPEND_BATCH, ttl="$2")
        self.skipped = fill(SKIPPED)
        self.read = fill(READ)
        self.read_batch = fill(READ_BATCH)
        self.read_timed = fill(READ_TIMED)
        self.origin = fill(ORIGIN, **identified)
        self.read_replica = fill(READ, **identified)
        self.read_replica_timed = fill(READ_TIMED, **identified)
        self.next = fill(NEXT)
        self.status = fill(STATUS)
        self.get_info = fill(GET_INFO)
        self.standby_status = fill(STANDBY_STATUS)
        self.age = fill(AGE)
        self.poll = fill(POLL)
        self.end = fill(END)
        self.delete = fill(DELETE)
        self.tombstones = fill(TOMBSTONES)
        self.sweep = fill(SWEEP)
        self.delete_leftovers = fill(DELETE_LEFTOVERS)
        self.list = fill(LIST)
        self.list_by_time = fill(LIST_BY_TIME)
        self.cleanup = fill(CLEANUP, limit="$2", due=NOW, scope="")
        due = DUE_IN_PARTITIONS.format(now=NOW)
        self.cleanup_of_partitions = fill(CLEANUP, limit="$5", due=due, scope=OUTSIDE_PARTITIONS)
        self.cleanup_distributed = fill(_distributed.CLEANUP)
        self.fail_abandoned = fill(FAIL_ABANDONED)
        self.fail_abandoned_distributed = fill(_distributed.FAIL_ABANDONED)
        self.take_turn = fill(TAKE_TURN)

    def of_replica(self, statement: str) -> str | None:
        """Return the form for a replica of a statement that reads pages. None if it is not one of these statements."""
        for name in ("read", "read_timed", "read_archived", "read_archived_timed"):
            if getattr(self, name, None) == statement:
                form: str = getattr(self, name.replace("read", "read_replica"))
                return form
        return None


def rounded_expiry(ttl: str) -> str:
    """Return the SQL expression for expires_at of an active stream: the end of the ttl, rounded up to a quarter of it.

    Appends set this indexed column to the same value for a quarter of the ttl, so that they are heap-only updates.

    Args:
        ttl: The SQL expression for the ttl, a bigint in milliseconds.
    """
    quarter = f"greatest({ttl} / 4, 1)"
    return f"(({NOW} + {ttl} - 1) / {quarter} + 1) * {quarter}"


def earlier_expiry(ttl: str) -> str:
    """Return the SQL expression for the expiry that the writing store gave an active stream, without its rounding.

    Another store that ends the stream, such as an operator's, may have a shorter ttl, and must not shorten that of the
    stream. With equal ttls this is never after the end of the ttl.

    Args:
        ttl: The SQL expression for the ttl of the store that ends the stream.
    """
    return f"expires_at - {ttl} / 4"


def json_text(value: object) -> str:
    """Return a value as JSON text for one parameter."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def json_array(texts: Iterable[str]) -> str:
    """Return texts as one parameter, a JSON array. psycopg needs several times longer to adapt a list."""
    return json_text(list(texts))
