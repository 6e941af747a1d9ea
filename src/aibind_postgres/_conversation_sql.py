"""The statements of the conversation store, for a given table name, with the conventions of `_sql`. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._housekeeping import DUE, LOCK, MARKER, TAKE_CONVERSATION_TURN
from ._sql import FEW, NOW

if TYPE_CHECKING:
    from ._tables import Table

# The data are NULL if they have more than $2 bytes. PostgreSQL does not read them for `octet_length`.
LOAD = """
SELECT CASE WHEN octet_length(data) <= $2::bigint THEN data END FROM {conversations}
 WHERE session_id = $1::text AND expires_at > {now}
"""

# Saves only if the stored text has the digest $4, or if $4 is NULL and no row is stored. An expired row counts as
# deleted. The row is locked first, so that it cannot change after the comparison. Comparing digests avoids sending the
# old text, and does not depend on a collation, which may treat different texts as equal. If nothing is saved, the
# statement returns the stored text, or NULL if it has more than $5 bytes. `excluded.expires_at - $3` is the time of the
# statement: Citus refuses the function for it in this place.
SAVE = """
WITH found AS MATERIALIZED (
    SELECT data FROM {conversations} WHERE session_id = $1::text AND expires_at > {now} FOR UPDATE
), saved AS (
    INSERT INTO {conversations} AS c (session_id, data, expires_at)
    SELECT $1::text, $2::text, {now} + $3::bigint
     WHERE $4::text IS NOT DISTINCT FROM (SELECT encode(sha256(convert_to(data, 'UTF8')), 'hex') FROM found)
    ON CONFLICT (session_id) DO UPDATE
       SET data = excluded.data, expires_at = excluded.expires_at
     WHERE $4::text IS NOT NULL OR c.expires_at <= excluded.expires_at - $3::bigint
    RETURNING 1
)
SELECT EXISTS (SELECT FROM saved) AS saved, EXISTS (SELECT FROM found) AS found,
       (SELECT data FROM found WHERE octet_length(data) <= $5::bigint AND NOT EXISTS (SELECT FROM saved)) AS data
"""

OVERWRITE = """
INSERT INTO {conversations} (session_id, data, expires_at)
VALUES ($1::text, $2::text, {now} + $3::bigint)
ON CONFLICT (session_id) DO UPDATE SET data = excluded.data, expires_at = excluded.expires_at
"""

TOUCH = """
UPDATE {conversations} SET expires_at = {now} + $2::bigint
 WHERE session_id = $1::text AND expires_at > {now}
RETURNING 1
"""

DELETE = """
WITH deleted AS (
    DELETE FROM {conversations} WHERE session_id = $1::text RETURNING expires_at
)
SELECT expires_at > {now} FROM deleted
"""

LIST_CONVERSATIONS = """
SELECT session_id, expires_at FROM {conversations}
 WHERE session_id > $1::text AND expires_at > {now}
 ORDER BY session_id
 LIMIT $2::bigint
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
    """The statements of one conversation store, with its table name filled in."""

    def __init__(self, conversations: Table) -> None:
        names = {"conversations": conversations.quoted, "marker": MARKER}
        values = {**names, "few": FEW, "now": NOW, "lock": LOCK, "due": DUE}
        self.load = LOAD.format_map(values)
        self.save = SAVE.format_map(values)
        self.overwrite = OVERWRITE.format_map(values)
        self.touch = TOUCH.format_map(values)
        self.delete = DELETE.format_map(values)
        self.list = LIST_CONVERSATIONS.format_map(values)
        self.cleanup = DELETE_EXPIRED.format_map(values)
        self.take_turn = TAKE_CONVERSATION_TURN.format_map(values)
