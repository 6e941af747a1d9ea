"""The statements that list streams, as templates for `_sql`, and the parsing of their rows. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from .models import StreamInfo, from_epoch_ms

# The range of Python's datetime, in any time zone. Other writers may store times outside it, and infinity.
IN_RANGE = "BETWEEN '0001-01-02 00:00Z' AND '9999-12-30 00:00Z'"

INFO = (
    "id, state, error, greatest(total_chunks, 0), expires_at, CASE WHEN t.created_at {in_range} THEN t.created_at END"
)

# The columns of migration 0004. JSON comes as text: drivers differ in what they make of it.
DETAILS = ", session_id, owner, metadata::text, ttl_ms, lease_until, wire"

# Conditions on the session and the owner, with the numbers of their parameters.
OF_SESSION = "AND session_id = ${0}::text AND (${1}::text IS NULL OR owner = ${1}::text)"
OF_OWNER = "AND owner = ${0}::text"

# If created_at of migration 0002 may be missing, it is read through JSON, which then returns NULL. OFFSET 0 prevents
# the planner from computing it twice.
TIMED_STATUS = "{status} AS t"
TIMED_STATUS_WITHOUT_0002 = """{status} AS s,
       LATERAL (SELECT (to_jsonb(s) ->> 'created_at')::timestamptz OFFSET 0) AS t (created_at)"""

LIST = """
SELECT {info}{details}
  FROM {timed_status}
 WHERE ($1::text IS NULL OR state = $1::text) AND state <> 'deleted' AND id > $2::text {scope}
 ORDER BY id
 LIMIT $3::bigint
"""

# The last column is parameter $6 of the next page. The JSON format of a time is exact under all session settings.
LIST_BY_TIME = """
SELECT {info}{details}, to_jsonb(created_at) #>> '{{}}'
  FROM {status} AS t
 WHERE ($1::text IS NULL OR state = $1::text) AND state <> 'deleted'
   AND created_at >= coalesce($4::timestamptz, '-infinity')
   AND ($5::timestamptz IS NULL OR created_at < $5::timestamptz)
   AND (created_at, id) > (coalesce($6::text, '-infinity')::timestamptz, $2::text) {scope}
 ORDER BY created_at, id
 LIMIT $3::bigint
"""

GET_INFO = """
SELECT {info}{details}
  FROM {timed_status}
 WHERE id = $1::text AND state <> 'deleted'
"""

# The streams of an owner whose producers live, as far as is known.
RUNNING = """
SELECT id FROM {status}
 WHERE owner = $1::text AND state = 'active' AND (lease_until IS NULL OR lease_until > {now})
 LIMIT $2::bigint
"""

# The newest active streams of a session: those of owner $4, which may be NULL, or of all owners.
ACTIVE = """
SELECT {info}{details} FROM {status} AS t
 WHERE session_id = $1::text AND state = 'active' AND (NOT $3::boolean OR owner IS NOT DISTINCT FROM $4::text)
 ORDER BY created_at DESC
 LIMIT $2::bigint
"""


def stream_info(row: Sequence[Any]) -> StreamInfo:
    """Return the entry of a row of these statements."""
    stream_id, state, error, total_chunks, expires_at, created_at, *details = row
    info = StreamInfo(stream_id, state, error, total_chunks, from_epoch_ms(expires_at), created_at)
    if len(details) < 6:  # without migration 0004
        return info
    session_id, owner, metadata, ttl, lease_until, wire, *_ = details
    return info._replace(
        session_id=session_id,
        owner=owner,
        metadata=None if metadata is None else json.loads(metadata),
        ttl=None if ttl is None else timedelta(milliseconds=ttl),
        lease_until=None if lease_until is None else from_epoch_ms(lease_until),
        wire=wire,
    )
