"""Classify and translate the errors of drivers by their SQLSTATE codes. Pure.

Appendix A of PostgreSQL's manual lists the codes. Their first two characters are the class.
"""

from __future__ import annotations

from .errors import AibindError, InvalidDataError, SchemaError

UNDEFINED_TABLE = "42P01"
UNDEFINED_COLUMN = "42703"
NUMERIC_VALUE_OUT_OF_RANGE = "22003"
UNIQUE_VIOLATION = "23505"
CHARACTER_NOT_IN_REPERTOIRE = "22021"
UNTRANSLATABLE_CHARACTER = "22P05"

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

# Another attempt may succeed.
TEMPORARY = {
    "08": "connection exception",
    "53": "insufficient resources",
    "57P": "operator intervention: the server shuts down or starts",
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


def is_temporary(error: Exception) -> bool:
    """Return True if another attempt may succeed, according to the code."""
    return (sqlstate(error) or "").startswith(tuple(TEMPORARY))


def translate(error: Exception) -> AibindError | None:
    """Return the error of this package for a driver's error, or None if the driver's error should propagate."""
    code = sqlstate(error)
    if code in (UNDEFINED_TABLE, UNDEFINED_COLUMN):
        return SchemaError(
            f"{_first_line(error)}. Create it with `aibind-postgres migrate`, with migrate or async_migrate "
            "of aibind_postgres.schema, or with the SQL that `aibind-postgres schema` prints; "
            "or correct the table names given to the store"
        )
    if code == NUMERIC_VALUE_OUT_OF_RANGE:
        return AibindError(
            "the stream is full: its last chunk has the highest sequence number that the table can store: "
            "create another stream"
        )
    if code == UNIQUE_VIOLATION:
        return AibindError(
            "the next sequence number of the stream is used by a chunk that another program has inserted: "
            "find the program that writes to the chunks table"
        )
    if code in (CHARACTER_NOT_IN_REPERTOIRE, UNTRANSLATABLE_CHARACTER) or isinstance(error, UnicodeEncodeError):
        return InvalidDataError(
            "the database's encoding cannot represent a character of this text: use a database with encoding UTF8"
        )
    return None


def _first_line(error: BaseException) -> str:
    while (inner := getattr(error, "orig", None) or error.__cause__) is not None:
        error = inner
    return str(error).partition("\n")[0]
