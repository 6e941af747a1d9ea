"""The check of a store, for readiness probes."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from .._sql import json_array
from .._sqlstate import HOW_TO_MIGRATE, INSUFFICIENT_PRIVILEGE, server_reason, sqlstate
from ..models import StoreCheck

if TYPE_CHECKING:
    from .._tables import Table
    from .database import AsyncDatabase

# Reads catalogs only, and takes no lock on the tables. $1 is a JSON array of the tables' names.
CHECK = """
SELECT current_setting('transaction_read_only') = 'on' AS is_read_only,
       CASE WHEN pg_is_in_recovery() THEN
         extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8
       END AS lag,
       (SELECT string_agg(name, ', ') FROM json_array_elements_text($1::text::json) AS wanted (name)
         WHERE to_regclass(name) IS NULL) AS missing,
       (SELECT string_agg(name, ', ') FROM json_array_elements_text($1::text::json) AS wanted (name)
         WHERE NOT has_table_privilege(to_regclass(name), 'SELECT')) AS unreadable
"""


async def check_readiness(database: AsyncDatabase, tables: Sequence[Table], timeout: float) -> StoreCheck:
    """Return whether the server answers and the tables can be read."""
    started = monotonic()
    try:
        rows = await database.query(CHECK, [json_array(table.quoted for table in tables)], timeout)
    except Exception as error:
        if sqlstate(error) != INSUFFICIENT_PRIVILEGE and not database.client.is_unavailable(error):
            raise
        # The driver's own text may contain a part of the connection string.
        return StoreCheck(False, server_reason(error) or f"no connection: {type(error).__name__}", None, False, None)
    latency = monotonic() - started
    is_read_only, lag, missing, unreadable = rows[0]
    problem = None
    if missing is not None:
        problem = f"missing tables: {missing}. Create them {HOW_TO_MIGRATE}"
    elif unreadable is not None:
        problem = f"the role of the connection may not read the tables {unreadable}: grant it SELECT"
    return StoreCheck(problem is None, problem, latency, is_read_only, lag)
