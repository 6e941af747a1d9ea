"""The statements on conversations, for given table names, with the conventions of `_sql`; parsing of rows. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import _distributed
from ._housekeeping import DUE, LOCK, MARKER, TAKE_CONVERSATION_TURN
from ._sql import FEW, NOW
from ._stream_list import IN_RANGE
from .models import NEVER_MS, ConversationInfo, from_epoch_ms

if TYPE_CHECKING:
    from ._tables import Table

# The data are NULL if they have more than $2 bytes, or another owner than $3. PostgreSQL does not read them for
# `octet_length`.
LOAD = """
SELECT CASE WHEN octet_length(data) <= $2::bigint {of_owner} THEN data END{created}{owner} FROM {conversations}
 WHERE session_id = $1::text AND expires_at > {now}
"""

# Saves only if the stored text has the digest $4, or if $4 is NULL and no row is stored. An expired row counts as
# deleted, unless $6 is true. The row is locked first, so that it cannot change after the comparison. Comparing digests
# avoids sending the old text, and does not depend on a collation, which may treat different texts as equal. If nothing
# is saved, the statement returns the stored text, or NULL if it has more than $5 bytes. `excluded.expires_at - $3` is
# the time of the statement: Citus refuses the function for it in this place.
SAVE = """
WITH found AS MATERIALIZED (
    SELECT data FROM {conversations}
     WHERE session_id = $1::text AND (expires_at > {now} OR $6::boolean) {is_same}
       FOR UPDATE
), saved AS (
    INSERT INTO {conversations} AS c (session_id, data, expires_at{columns})
    SELECT $1::text, $2::text, {now} + $3::bigint{values_of_save}
     WHERE $4::text IS NOT DISTINCT FROM (SELECT encode(sha256(convert_to(data, 'UTF8')), 'hex') FROM found)
    ON CONFLICT (session_id) DO UPDATE
       SET data = excluded.data, expires_at = excluded.expires_at{updates_of_save}
     WHERE $4::text IS NOT NULL OR c.expires_at <= excluded.expires_at - $3::bigint
    RETURNING 1{returned}
)
SELECT EXISTS (SELECT FROM saved) AS saved, EXISTS (SELECT FROM found) AS found,
       (SELECT data FROM found WHERE octet_length(data) <= $5::bigint AND NOT EXISTS (SELECT FROM saved)) AS data
       {created_of_saved}
"""

OVERWRITE = """
WITH saved AS (
    INSERT INTO {conversations} AS c (session_id, data, expires_at{columns})
    VALUES ($1::text, $2::text, {now} + $3::bigint{values_of_overwrite})
    ON CONFLICT (session_id) DO UPDATE
       SET data = excluded.data, expires_at = excluded.expires_at{updates_of_overwrite}
    RETURNING 1{returned}
)
SELECT EXISTS (SELECT FROM saved) AS saved {created_of_saved}
"""

# created_at as text identifies a conversation: one that is created again under the same id has another time. The JSON
# format of a time is exact under all session settings.
CREATED = ", to_jsonb(created_at) #>> '{}' AS created"
CREATED_OF_SAVED = f", (SELECT {CREATED[2:]} FROM saved) AS created"

# Of a conversation that was created again, the row is not that of the history to save, which $8 identifies.
IS_SAME = "AND ($8::text IS NULL OR coalesce(created_at, '-infinity') = $8::text::timestamptz)"

COLUMNS = ", owner, created_at, updated_at"
VALUES = ", {owner}::text, statement_timestamp(), statement_timestamp()"

# A conversation keeps its owner unless another one is given. One that replaces an expired row is new.
UPDATES = """,
           owner = CASE WHEN {is_new} THEN excluded.owner ELSE coalesce(excluded.owner, c.owner) END,
           title = CASE WHEN {is_new} THEN NULL ELSE c.title END,
           metadata = CASE WHEN {is_new} THEN NULL ELSE c.metadata END,
           created_at = CASE WHEN {is_new} THEN excluded.created_at ELSE c.created_at END,
           updated_at = {updated_at}"""

# A save that is no new turn keeps the position in lists.
UPDATED_AT_OF_SAVE = "CASE WHEN $9::boolean AND NOT ({is_new}) THEN c.updated_at ELSE excluded.updated_at END"

TOUCH = """
UPDATE {conversations} SET expires_at = {now} + $2::bigint
 WHERE session_id = $1::text AND expires_at > {now}
RETURNING 1
"""

# Changes a column if its flag is true.
DESCRIBE = """
UPDATE {conversations}
   SET title = CASE WHEN $2::boolean THEN $3::text ELSE title END,
       metadata = CASE WHEN $4::boolean THEN $5::text::jsonb ELSE metadata END,
       owner = CASE WHEN $6::boolean THEN $7::text ELSE owner END
 WHERE session_id = $1::text AND expires_at > {now}
RETURNING 1
"""

DELETE = """
WITH deleted AS (
    DELETE FROM {conversations} WHERE session_id = $1::text RETURNING expires_at
)
SELECT expires_at > {now} FROM deleted
"""

# Each column has another name, since the rows of some clients are dicts. The names are not those of columns of the
# table: ORDER BY would mean the result.
INFO = (
    "session_id, expires_at, owner, title, metadata::text, "
    "CASE WHEN created_at {in_range} THEN created_at END AS created, "
    "CASE WHEN updated_at {in_range} THEN updated_at END AS updated, {stream_id} AS stream_id"
)

# The newest active stream of a conversation. One of another owner may have outlived an earlier conversation.
ACTIVE_STREAM = """
  LEFT JOIN LATERAL (
      SELECT id FROM {status} AS s
       WHERE s.session_id = c.session_id AND s.state = 'active'
         AND (s.owner = c.owner OR s.owner IS NULL OR c.owner IS NULL)
       ORDER BY s.created_at DESC
       LIMIT 1
  ) AS active (id) ON true
"""

GET_INFO = "SELECT {info} FROM {conversations} AS c {active_stream} {page}"
PAGE_OF_ONE = "WHERE session_id = $1::text AND expires_at > {now}"

LIST_BY_ID = """
SELECT session_id, expires_at FROM {conversations}
 WHERE session_id > $1::text AND expires_at > {now}
 ORDER BY session_id
 LIMIT $2::bigint
"""

# The last column is parameter $1 of the next page.
LIST_BY_TIME = """
SELECT {info}, to_jsonb(updated_at) #>> '{{}}' AS position FROM {conversations} AS c {active_stream} {page}
"""
PAGE_BY_TIME = """
 WHERE (updated_at, session_id) < ($1::text::timestamptz, $2::text) AND expires_at > {now} {scope}
 ORDER BY updated_at DESC, session_id DESC
 LIMIT $3::bigint
"""
OF_OWNER = "AND owner = $4::text"

# The conversations of an owner for their deletion, so also those that have expired.
IDS_OF_OWNER = """
SELECT session_id FROM {conversations}
 WHERE owner = $1::text AND session_id > $2::text
 ORDER BY session_id
 LIMIT $3::bigint
"""

DELETE_OF_OWNER = """
WITH deleted AS (
    DELETE FROM {conversations} WHERE session_id = $1::text AND owner = $2::text RETURNING 1
)
SELECT EXISTS (SELECT FROM deleted)
"""

# Deletes expired conversations with at most $2 bytes together, or a single larger one. Keeps the housekeeping marker.
DELETE_EXPIRED = """
WITH expired AS MATERIALIZED (
    SELECT session_id, expires_at, octet_length(data) AS size FROM {conversations}
     WHERE expires_at <= {now} AND session_id <> '{marker}'
     ORDER BY expires_at
     LIMIT $1::bigint
       FOR UPDATE SKIP LOCKED
), summed AS MATERIALIZED (
    SELECT session_id, size, sum(size) OVER (ORDER BY expires_at, session_id ROWS UNBOUNDED PRECEDING) AS sum
      FROM expired
), deleted AS (
    DELETE FROM {conversations} AS c
     USING (SELECT unnest(ARRAY(SELECT session_id FROM summed WHERE sum <= $2::bigint OR sum = size)) {few})
           AS chosen (session_id)
     WHERE c.session_id = chosen.session_id
    RETURNING 1
)
SELECT (SELECT count(*) FROM expired) AS found, (SELECT count(*) FROM deleted) AS deleted
"""


class ConversationStatements:
    """The statements of one conversation store, with its table names filled in.

    Args:
        conversations: The table of conversations.
        has_0004: Whether it has the columns of migration 0004.
        status: The status table of streams, if it has these columns as well. Default: None.
    """

    def __init__(self, conversations: Table, has_0004: bool = False, status: Table | None = None) -> None:

        def updates(is_new: str, updated_at: str) -> str:
            if not has_0004:
                return ""
            return UPDATES.format(is_new=is_new, updated_at=updated_at.format(is_new=is_new))

        stream_id = "NULL::text" if status is None else "active.id"
        values = {
            "conversations": conversations.quoted,
            "marker": MARKER,
            "lock": LOCK,
            "due": DUE,
            "few": FEW,
            "now": NOW,
            "info": INFO.format(in_range=IN_RANGE, stream_id=stream_id) if has_0004 else "session_id, expires_at",
            "active_stream": "" if status is None else ACTIVE_STREAM.format(status=status.quoted),
            "scope": "",
            "status": "" if status is None else status.quoted,
            "is_same": IS_SAME if has_0004 else "",
            "columns": COLUMNS if has_0004 else "",
            "values_of_save": VALUES.format(owner="$7") if has_0004 else "",
            "values_of_overwrite": VALUES.format(owner="$4") if has_0004 else "",
            "updates_of_save": updates("$4::text IS NULL", UPDATED_AT_OF_SAVE),
            "updates_of_overwrite": updates("c.expires_at <= excluded.expires_at - $3::bigint", "excluded.updated_at"),
            "created": CREATED if has_0004 else "",
            "owner": ", owner" if has_0004 else "",
            "of_owner": "AND ($3::text IS NULL OR owner = $3::text)" if has_0004 else "",
            "returned": ", created_at" if has_0004 else "",
            "created_of_saved": CREATED_OF_SAVED if has_0004 else "",
        }

        def fill(statement: str, page: str, scope: str = "") -> str:
            values_of_page = {**values, "scope": scope}
            return statement.format_map({**values, "page": page.format_map(values_of_page)})

        def fill_distributed(statement: str, page: str, scope: str = "") -> str:
            if status is None:
                return fill(statement, page, scope)
            streams = ACTIVE_STREAM.format(status="streams")
            local = {
                **values,
                "conversations": "page",
                "active_stream": streams,
                "page": page.format_map({**values, "scope": scope}),
            }
            return fill(_distributed.PAGE_WITH_STREAMS, page, scope) + statement.format_map(local)

        self.load = LOAD.format_map(values)
        self.save = SAVE.format_map(values)
        self.overwrite = OVERWRITE.format_map(values)
        self.touch = TOUCH.format_map(values)
        self.delete = DELETE.format_map(values)
        self.get_info = fill(GET_INFO, PAGE_OF_ONE)
        self.get_info_distributed = fill_distributed(GET_INFO, PAGE_OF_ONE)
        self.cleanup = DELETE_EXPIRED.format_map(values)
        self.cleanup_distributed = _distributed.DELETE_EXPIRED.format_map(values)
        self.take_turn = TAKE_CONVERSATION_TURN.format_map(values)
        if not has_0004:
            self.list_by_id = LIST_BY_ID.format_map(values)
            return
        self.list = fill(LIST_BY_TIME, PAGE_BY_TIME)
        self.list_distributed = fill_distributed(LIST_BY_TIME, PAGE_BY_TIME)
        self.list_of_owner = fill(LIST_BY_TIME, PAGE_BY_TIME, OF_OWNER)
        self.list_of_owner_distributed = fill_distributed(LIST_BY_TIME, PAGE_BY_TIME, OF_OWNER)
        self.describe = DESCRIBE.format_map(values)
        self.ids_of_owner = IDS_OF_OWNER.format_map(values)
        self.delete_of_owner = DELETE_OF_OWNER.format_map(values)

    @property
    def has_0004(self) -> bool:
        """Whether these are the statements for the columns of migration 0004."""
        return "describe" in vars(self)


def conversation_info(row: Sequence[Any]) -> ConversationInfo:
    """Return the entry of a row of these statements, which has two columns without migration 0004."""
    session_id, expires_at, owner, title, metadata, created_at, updated_at, stream_id = (*row, *[None] * 6)[:8]
    return ConversationInfo(
        session_id,
        owner,
        title,
        None if metadata is None else json.loads(metadata),
        created_at,
        updated_at,
        None if expires_at >= NEVER_MS else from_epoch_ms(expires_at),
        stream_id,
    )
