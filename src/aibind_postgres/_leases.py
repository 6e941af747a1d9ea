"""Leases of producers: the statements, as templates for `_sql`, and when a process may end a stream. Pure.

A producer renews the lease of its stream while it lives. When a lease has expired by the server's clock, its producer
is dead, or has lost the server for longer than the lease. Any process may then end the stream.
"""

from __future__ import annotations

import math

RENEWALS = 3  # in the time of a lease

# Seconds for which a renewal waits for its answer, but at most a fifth of the lease. If it fails on a silent
# connection, the next one must arrive before the end of the lease. After an outage, it must arrive within CONTACT.
MAX_ANSWER_TIME = 3.0

# Seconds for which a process must have reached the server without interruption before it ends a stream. After an
# outage, producers need part of this time to reconnect and to renew their leases.
CONTACT = 8.0
# The same if the process has itself found the server unreachable. PgBouncer tries to connect again after 15 s
# (server_login_retry), so producers behind it may reach the server 15 s later.
CONTACT_AFTER_FAILURE = 20.0
MAX_SILENCE = 3.0  # seconds between two successful statements; a longer gap may hide an outage

EXPIRED_TEXT = "abandoned: its producer has died"

# Gives stream $1 a lease, and returns the status of the stream. It does not wait for a locked row: the first renewal
# sets the lease.
TAKE_LEASE = """
WITH taken AS (
    SELECT id FROM {status} WHERE id = $1::text AND state = 'active' FOR UPDATE SKIP LOCKED
), leased AS (
    UPDATE {status} SET lease_until = {now} + {lease}
     WHERE id = $1::text AND state = 'active' AND EXISTS (SELECT FROM taken)
)
SELECT state, error, greatest(total_chunks, 0) FROM {status} WHERE id = $1::text {and_commit_setting}
"""

# Removes the lease of stream $1, for a writer that does not renew it. Returns the status of the stream.
DROP_LEASE = """
WITH dropped AS (
    UPDATE {status} SET lease_until = NULL WHERE id = $1::text AND state = 'active' AND lease_until IS NOT NULL
)
SELECT state, error, greatest(total_chunks, 0) FROM {status} WHERE id = $1::text {and_commit_setting}
"""

# Renews the leases of the streams in the JSON array $1. A row that another transaction has locked is skipped: in most
# cases, that transaction appends to the stream, and thereby renews its lease. The state of locked rows is not checked
# again: the planner might then read the active streams of all partitions.
RENEW_LEASES = """
WITH locked AS MATERIALIZED (
    SELECT s.id
      FROM (SELECT unnest(ARRAY(SELECT json_array_elements_text($1::text::json))) {few}) AS held (id),
           LATERAL (SELECT id FROM {status} WHERE id = held.id AND state = 'active' FOR UPDATE SKIP LOCKED) AS s
)
UPDATE {status} AS s SET lease_until = {now} + {lease}
  FROM (SELECT unnest(ARRAY(SELECT id FROM locked)) {few}) AS held (id)
 WHERE s.id = held.id {and_commit_setting}
"""

# The shortest ttl of an abandoned answer in milliseconds. Within it, a request can save the answer in its conversation.
MIN_ANSWER_TTL = 86_400_000

# Ends those streams in the JSON array $1 that have an expired lease, with error text $2. $3 is the ttl of this store.
# The lease is checked again once the row is locked, since the producer may have renewed it.
END_EXPIRED = """
WITH locked AS MATERIALIZED (
    SELECT s.id
      FROM (SELECT unnest(ARRAY(SELECT json_array_elements_text($1::text::json))) {few}) AS wanted (id),
           LATERAL (
               SELECT id FROM {status} WHERE id = wanted.id AND state = 'active' AND lease_until <= {now}
                  FOR UPDATE SKIP LOCKED
           ) AS s
), ended AS (
    UPDATE {status} AS s
       SET state = 'error', error = $2::text,
           expires_at = greatest(
               {now} + greatest({ttl_of_3}, CASE WHEN s.session_id IS NULL THEN 0 ELSE {kept}::bigint END),
               {earlier_expiry_3}
           )
      FROM (SELECT unnest(ARRAY(SELECT id FROM locked)) {few}) AS expired (id)
     WHERE s.id = expired.id
    RETURNING s.id
)
SELECT id FROM ended {commit_setting}
"""

# The next $2 active streams after id $1 with an expired lease.
EXPIRED = """
SELECT id FROM {status}
 WHERE state = 'active' AND id > $1::text AND lease_until <= {now}
 ORDER BY id
 LIMIT $2::bigint
"""


def renewal_timeout(lease: float) -> float:
    """Return the seconds for which a renewal waits for its answer. `lease` is in seconds."""
    return min(lease / 5, MAX_ANSWER_TIME)


class Contact:
    """Since when this process has reached the server without interruption. Times are values of `monotonic()`."""

    def __init__(self) -> None:
        self._since = math.inf
        self._last = -math.inf
        self._has_failed = False  # whether the server was unreachable, until the contact is steady again

    def succeeded(self, now: float, started: float | None = None) -> None:
        """Record that a statement has succeeded. `started` is the time of its beginning; `now` by default."""
        # A statement that took longer than CONTACT may have been held up by an outage.
        if max(now if started is None else started, now - CONTACT) - self._last > MAX_SILENCE:
            self._since = now
        self._since, self._last = min(self._since, now), now
        self._has_failed = self._has_failed and not self.is_steady(now)

    def failed(self) -> None:
        """Record that the server could not be reached."""
        self._since, self._last, self._has_failed = math.inf, -math.inf, True

    def is_steady(self, now: float) -> bool:
        """Return True if living producers have had enough contact with the server to renew their leases."""
        required = CONTACT_AFTER_FAILURE if self._has_failed else CONTACT
        return now - self._since >= required and now - self._last <= MAX_SILENCE
