"""The statements for tables that are distributed over several servers, as templates for `_sql`. Pure.

Citus is such an engine. It runs a statement on one stream as PostgreSQL does. One on several streams runs on several
servers. There it is refused (SQLSTATE 0A000) if it locks rows, or joins streams by LATERAL to a list of ids. Its CTEs
may each have a snapshot of their own.

Statements that delete or end several streams therefore lock nothing before. Each condition for it is repeated in the
statement that changes the row: PostgreSQL checks it again once it has waited for another transaction. Other work on
several streams is done by a statement for each of them.
"""

from __future__ import annotations

# Whether the database has Citus. A subquery runs once for all rows.
HAS_CITUS = "(SELECT to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL)"

# Those of the given tables that Citus distributes by the values of a column, and whether the function for appends
# exists. $1 is a JSON array of objects with the names of a table and of its function.
DISTRIBUTED = """
SELECT wanted.name, to_regproc(wanted.append) IS NOT NULL AS has_append
  FROM json_to_recordset($1::text::json) AS wanted (name text, append text), pg_dist_partition
 WHERE logicalrelid = to_regclass(wanted.name) AND partmethod = 'h'
"""

# An append by the function of `sql/optional/citus.sql`, with the parameters of APPEND_MANY. The result is NULL if the
# stream was skipped. A WHERE clause would prevent Citus from calling the function on the worker of the stream.
APPEND = "SELECT {append_function}($1::text, $2::text::json, $3::bigint, $4::bigint, {lease}::bigint)"

# END_EXPIRED for stream $1.
END_EXPIRED = """
WITH locked AS MATERIALIZED (
    SELECT id FROM {status} WHERE id = $1::text AND state = 'active' AND lease_until <= {now} FOR UPDATE SKIP LOCKED
), ended AS (
    UPDATE {status}
       SET state = 'error', error = $2::text,
           expires_at = greatest(
               {now} + greatest({ttl_of_3}, CASE WHEN session_id IS NULL THEN 0 ELSE {kept}::bigint END),
               {earlier_expiry_3}
           )
     WHERE id = $1::text AND state = 'active' AND lease_until <= {now} AND EXISTS (SELECT FROM locked)
    RETURNING id
)
SELECT id FROM ended {commit_setting}
"""

# For DELETE_LEFTOVERS: the columns of migration 0002 exist. Citus refuses functions that depend on a setting.
IS_LEFT_OVER = "(c.created_at IS NULL OR c.created_at < s.created_at)"

# CLEANUP without a lock. Another process may have deleted a stream meanwhile, and a third one may have created it
# again, so only the chunks of deleted rows are deleted. The addition of 0 excludes the index on expires_at: with old
# statistics, the planner would read all expired rows for each stream.
CLEANUP = """
WITH expired AS MATERIALIZED (
    SELECT s.id, s.expires_at, c.size
      FROM {status} AS s, LATERAL (SELECT coalesce(max(seq), 0) FROM {chunks} WHERE id = s.id) AS c (size)
     WHERE state <> 'active' AND state <> 'deleted' AND expires_at <= {now}
     ORDER BY expires_at
     LIMIT $1::bigint
), summed AS MATERIALIZED (
    SELECT id, size, sum(size) OVER (ORDER BY expires_at, id ROWS UNBOUNDED PRECEDING) AS sum FROM expired
), chosen AS MATERIALIZED (
    SELECT id, size FROM summed WHERE sum <= $2::bigint OR sum = size
), streams AS (
    DELETE FROM {status} AS s
     USING (
               SELECT unnest(ARRAY(SELECT id FROM chosen)) AS id, unnest(ARRAY(SELECT size FROM chosen)) AS size {few}
           ) AS ended
     WHERE s.id = ended.id AND s.state <> 'active' AND s.state <> 'deleted' AND s.expires_at + 0 <= {now}
    RETURNING s.id, ended.size
), chunks AS (
    DELETE FROM {chunks} AS c
     USING (SELECT unnest(ARRAY(SELECT id FROM streams WHERE size <= coalesce($2::bigint, size))) {few}) AS emptied (id)
     WHERE c.id = emptied.id
    RETURNING 1
), buried AS (
    INSERT INTO {status} (id, state, error, total_chunks, expires_at)
    SELECT {tombstone_of_id} FROM streams WHERE size > $2::bigint
)
SELECT (SELECT count(*) FROM expired) AS found, (SELECT count(*) FROM streams) AS streams,
       (SELECT count(*) FROM chunks) AS chunks
{commit_setting}
"""

# FAIL_ABANDONED without a lock. An append that is stored meanwhile has changed total_chunks.
FAIL_ABANDONED = """
WITH page AS MATERIALIZED (
    SELECT s.id, s.total_chunks, s.created_at, last_chunk.seq, last_chunk.created_at AS stored_at
      FROM {status} AS s
      LEFT JOIN LATERAL (
               SELECT seq, created_at FROM {chunks}
                WHERE id = s.id AND seq <= s.total_chunks
                ORDER BY seq DESC
                LIMIT 1
           ) AS last_chunk ON true
     WHERE state = 'active' AND s.id > $4::text {without_lease}
     ORDER BY s.id
     LIMIT $5::bigint
), silent AS MATERIALIZED (
    SELECT id, total_chunks
      FROM (SELECT *, CASE WHEN seq IS NULL THEN created_at ELSE stored_at END AS last_time FROM page) AS activity
     WHERE last_time <= statement_timestamp() - $2::bigint * interval '1 millisecond'
        OR (last_time IS NULL AND $6::boolean)
), ended AS (
    UPDATE {status} AS s
       SET state = 'error', error = $3::text, expires_at = greatest({now} + {ttl_of_1}, {earlier_expiry_1})
      FROM (SELECT id, total_chunks FROM silent {few}) AS abandoned
     WHERE s.id = abandoned.id AND s.state = 'active' AND s.total_chunks = abandoned.total_chunks {without_lease}
    RETURNING s.id
)
SELECT last, ended.id FROM (SELECT max(id) FROM page) AS page (last) LEFT JOIN ended ON true {commit_setting}
"""

# Before a statement that reads conversations and their active streams, which are on other servers. The statement reads
# `page` instead of the conversations, and `streams` instead of the status table. {page} is its WHERE clause, with the
# order and the limit.
PAGE_WITH_STREAMS = """
WITH page AS MATERIALIZED (
    SELECT session_id, expires_at, owner, title, metadata, created_at, updated_at FROM {conversations} {page}
), streams AS MATERIALIZED (
    SELECT id, session_id, owner, state, created_at FROM {status}
     WHERE state = 'active' AND session_id = ANY (ARRAY(SELECT session_id FROM page))
)
"""

# Expired conversations, as DELETE_EXPIRED of `_conversation_sql`. A conversation that is saved meanwhile is kept. 0 is
# added as in CLEANUP.
DELETE_EXPIRED = """
WITH expired AS MATERIALIZED (
    SELECT session_id, expires_at, octet_length(data) AS size FROM {conversations}
     WHERE expires_at <= {now} AND session_id <> '{marker}'
     ORDER BY expires_at
     LIMIT $1::bigint
), summed AS MATERIALIZED (
    SELECT session_id, size, sum(size) OVER (ORDER BY expires_at, session_id ROWS UNBOUNDED PRECEDING) AS sum
      FROM expired
), deleted AS (
    DELETE FROM {conversations} AS c
     USING (SELECT unnest(ARRAY(SELECT session_id FROM summed WHERE sum <= $2::bigint OR sum = size)) {few})
           AS chosen (session_id)
     WHERE c.session_id = chosen.session_id AND c.expires_at + 0 <= {now}
    RETURNING 1
)
SELECT (SELECT count(*) FROM expired) AS found, (SELECT count(*) FROM deleted) AS deleted
"""
