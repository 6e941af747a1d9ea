"""Classify and translate the errors of drivers by their SQLSTATE codes. Pure.

Appendix A of PostgreSQL's manual lists the codes. Their first two characters are the class.
"""

from __future__ import annotations

import re

from .errors import AibindError, InvalidDataError, SchemaError

UNDEFINED_TABLE = "42P01"
UNDEFINED_COLUMN = "42703"
NUMERIC_VALUE_OUT_OF_RANGE = "22003"
UNIQUE_VIOLATION = "23505"
CHECK_VIOLATION = "23514"
CHARACTER_NOT_IN_REPERTOIRE = "22021"
UNTRANSLATABLE_CHARACTER = "22P05"
READ_ONLY_TRANSACTION = "25006"
INSUFFICIENT_PRIVILEGE = "42501"
FEATURE_NOT_SUPPORTED = "0A000"
INVALID_SQL_STATEMENT_NAME = "26000"
DUPLICATE_PREPARED_STATEMENT = "42P05"

# The server rejected the statement, or rolled it back before its commit: it changed nothing.
REJECTED = {
    "0A": "feature not supported",
    "21": "cardinality violation",
    "22": "data exception",
    "23": "integrity constraint violation",
    "42": "syntax error or access rule violation: a missing table, a missing privilege",
    "44": "WITH CHECK OPTION violation",
    "54": "program limit exceeded",
    "P0": "PL/pgSQL error: raised by a trigger",
    "25006": "read-only transaction",
    "40001": "serialization failure",
    "40P01": "deadlock detected",
    "55P03": "lock not available",
    "57014": "query canceled: statement_timeout, or a cancel request",
}

# The same statement may succeed later, on another connection.
RECOVERABLE = {
    "08": "connection exception",
    "25006": "read-only transaction: the server is a standby, or is read-only during a failover or an upgrade",
    "25P03": "idle-in-transaction timeout: the server has closed the session",
    "25P04": "transaction timeout: the server has closed the session",
    "40": "transaction rollback: serialization failure, deadlock, conflict with the recovery of a standby",
    "53": "insufficient resources: too many connections, disk full, out of memory",
    "55P03": "lock not available: lock_timeout",
    "57014": "query canceled: statement_timeout, or a cancel request",
    "57P": "operator intervention: the server shuts down, starts or has crashed; idle-session timeout",
    "58": "system error: an I/O error",
}


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE code of a driver's error, also if SQLAlchemy or Django has wrapped it."""
    current: BaseException | None = error
    while current is not None:
        code = getattr(current, "sqlstate", None) or getattr(current, "pgcode", None)
        if isinstance(code, str):
            return code
        current = getattr(current, "orig", None) or current.__cause__
    return None


def wrote_nothing(error: Exception) -> bool:
    """Return True if the failed statement certainly changed nothing."""
    return isinstance(error, InvalidDataError) or (sqlstate(error) or "").startswith(tuple(REJECTED))


def is_recoverable(error: Exception, lost: tuple[type[Exception], ...] = ()) -> bool:
    """Return True if the same statement may succeed later, on another connection.

    Args:
        error: The error of a driver.
        lost: The classes of the driver's errors for lost connections. They decide if the error has no code.
    """
    code = sqlstate(error)
    return isinstance(error, lost) if code is None else code.startswith(tuple(RECOVERABLE))


def is_transient(error: Exception) -> bool:
    """Return True if a reachable server has refused the statement for the moment: a conflict, a lock, a time limit."""
    return (sqlstate(error) or "").startswith(("40", "55P03", "57014"))


def is_read_only(error: BaseException) -> bool:
    """Return True if the session is read-only. It may stay so although the server has become writable."""
    return sqlstate(error) == READ_ONLY_TRANSACTION


def loses_prepared_statement(error: BaseException) -> bool:
    """Return True if a prepared statement no longer exists, or if its result type has changed.

    The causes are DISCARD ALL and DEALLOCATE ALL, as in the reset function of a pool, and ALTER TABLE. Nothing was
    executed.
    """
    if sqlstate(error) == FEATURE_NOT_SUPPORTED:
        # Its text may be translated, unlike the name of the server's function.
        return getattr(getattr(error, "diag", None), "source_function", None) == "RevalidateCachedQuery"
    return sqlstate(error) == INVALID_SQL_STATEMENT_NAME


def refuses_row(error: BaseException) -> bool:
    """Return True if a policy, constraint or trigger refuses a row, or the role has no privilege."""
    return (sqlstate(error) or "").startswith(("23", "42501", "44", "P0"))


def server_reason(error: BaseException) -> str | None:
    """Return the server's or the operating system's reason of an error, or None if there is none.

    Unlike the driver's text, it contains no part of the connection string, and thereby no password.
    """
    cause = innermost(error)
    if primary := getattr(getattr(cause, "diag", None), "message_primary", None):
        return str(primary)
    failures = re.findall(r"connection to server [^\n]* failed: ([^\n]+)", str(cause))
    return failures[-1] if failures else None


HOW_TO_MIGRATE = (
    "with `aibind-postgres migrate`, with migrate or async_migrate of aibind_postgres.schema, or with the SQL that "
    "`aibind-postgres schema` prints"
)


def translate(error: Exception) -> AibindError | None:
    """Return the error of this package for a driver's error, or None if the driver's error should propagate."""
    code = sqlstate(error)
    if code in (UNDEFINED_TABLE, UNDEFINED_COLUMN):
        text = _first_line(error)
        migration = " (migration 0002)" if code == UNDEFINED_COLUMN and "created_at" in text else ""
        return SchemaError(
            f"{text}{migration}. Create it {HOW_TO_MIGRATE}; or correct the table names given to the store"
        )
    if code == NUMERIC_VALUE_OUT_OF_RANGE:
        return AibindError(
            "the stream is full: its last chunk has the highest sequence number that the table can store: "
            "create another stream"
        )
    if code == UNIQUE_VIOLATION:
        return AibindError(
            "the next sequence number of the stream is used by a chunk that another program has inserted, or has left "
            "over from a deleted stream: find the program that writes to the chunks table; an append outside a "
            "transaction removes what is left over"
        )
    if code in (CHARACTER_NOT_IN_REPERTOIRE, UNTRANSLATABLE_CHARACTER) or isinstance(error, UnicodeEncodeError):
        return InvalidDataError(
            "the database's encoding cannot represent a character of this text: use a database with encoding UTF8"
        )
    return None


def _first_line(error: BaseException) -> str:
    return str(innermost(error)).partition("\n")[0]


def innermost(error: BaseException) -> BaseException:
    """Return the driver's own error, also if SQLAlchemy or Django has wrapped it."""
    while (inner := getattr(error, "orig", None) or error.__cause__) is not None:
        error = inner
    return error
