"""Run statements on psycopg connections without a cursor.

`wait` of a connection, of either flavour, drives the generators of this module while the caller holds its lock. They
send statements with `psycopg.pq`, and leave waiting and fetching to psycopg, which also handles interruptions. Without
a cursor, a statement needs less processor time, and does not depend on the adapters, factories and time zone of the
connection.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from time import monotonic
from typing import Any, NamedTuple, TypeAlias

import psycopg
from psycopg.adapt import AdaptersMap, Buffer, Loader, Transformer

# Not documented by psycopg. `tests/unit/test_statement_runner.py` names what is used of them.
from psycopg.errors import error_from_result
from psycopg.generators import execute as flush_and_fetch
from psycopg.pq import ConnStatus, ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult
from psycopg.types.bool import BoolBinaryLoader
from psycopg.types.numeric import Float8BinaryLoader, Int2BinaryLoader, Int4BinaryLoader, Int8BinaryLoader
from psycopg.types.string import TextBinaryLoader

from ._sqlstate import DUPLICATE_PREPARED_STATEMENT, loses_prepared_statement, sqlstate
from .errors import AibindError, InvalidDataError

Row: TypeAlias = tuple[Any, ...]
AnyConnection: TypeAlias = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]

MAX_STATEMENTS = 1000  # remembered for one session; with more, such as of many tables, no more of them are prepared
MAX_LOSSES = 3  # losses of prepared statements after which a session gets no more of them

IDLE = TransactionStatus.IDLE
BINARY = Format.BINARY
INT4 = 23  # the OID of integer
SUCCEEDED = (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK)


class UnansweredError(psycopg.OperationalError):
    """The server did not answer a statement within the timeout. The statement may or may not have taken effect."""


class UtcLoader(Loader):
    """Loads timestamptz in UTC. psycopg's loader uses the time zone of the session."""

    format = Format.BINARY
    EPOCH = datetime(2000, 1, 1, tzinfo=timezone.utc)

    def load(self, data: Buffer) -> datetime:
        return self.EPOCH + timedelta(microseconds=int.from_bytes(data, "big", signed=True))


def _result_types() -> AdaptersMap:
    """Return the loaders of the types of our results. All others, such as domains and varchar, are text."""
    adapters = AdaptersMap()
    loaders: dict[int, type[Any]] = {
        0: TextBinaryLoader,
        16: BoolBinaryLoader,
        20: Int8BinaryLoader,
        21: Int2BinaryLoader,
        INT4: Int4BinaryLoader,
        701: Float8BinaryLoader,
        1184: UtcLoader,
    }
    for oid, loader in loaders.items():
        adapters.register_loader(oid, loader)
    return adapters


RESULT_TYPES = _result_types()


class LoadContext(NamedTuple):
    """The context of a `Transformer`. Without a connection, texts are in UTF-8."""

    adapters: AdaptersMap
    connection: AnyConnection | None


class Statement:
    """A statement in the session of one connection."""

    __slots__ = ("is_prepared", "name", "runs", "sql")

    def __init__(self, sql: bytes, name: bytes) -> None:
        self.sql = sql
        self.name = name
        self.runs = 0
        self.is_prepared = False


class Session:
    """The state of the session of one connection, for one client encoding."""

    __slots__ = ("client_encoding", "encoding", "losses", "prepared", "statements", "transformer")

    def __init__(self, client_encoding: bytes | None, encoding: str) -> None:
        if client_encoding == b"SQL_ASCII":
            raise InvalidDataError("the connection's client_encoding is SQL_ASCII, which has no text: use UTF8")
        self.client_encoding = client_encoding
        self.encoding = encoding  # Python's name of it
        self.statements: dict[str, Statement] = {}
        self.prepared = 0  # of these statements
        self.losses = 0
        # For results in UTF-8. It refers to no connection, since the connection refers to this object.
        self.transformer = Transformer(LoadContext(RESULT_TYPES, None))

    def statement(self, sql: str) -> Statement:
        found = self.statements.get(sql)
        if found is None:
            encoded = sql.encode(self.encoding)
            # Other stores may use the same connection. A name that was lost is not used again.
            name = f"aibind_{self.losses}_{sha256(encoded).hexdigest()[:32]}"
            found = Statement(encoded, name.encode())
            if len(self.statements) < MAX_STATEMENTS:
                self.statements[sql] = found
        return found

    def must_prepare(self, statement: Statement, threshold: int | None, maximum: int | None) -> bool:
        """Count a run of a statement. Return True if it has to be prepared, as psycopg decides it.

        Args:
            statement: The statement.
            threshold: psycopg's `prepare_threshold` of the connection. None disables prepared statements.
            maximum: psycopg's `prepared_max` of the connection. None is no limit.
        """
        statement.runs += 1
        if threshold is None or statement.runs <= threshold or self.losses >= MAX_LOSSES:
            return False
        return (maximum is None or self.prepared < maximum) and len(self.statements) < MAX_STATEMENTS

    def lose_statements(self) -> None:
        """Forget the prepared statements, which the server has discarded or can no longer execute."""
        self.statements.clear()
        self.prepared = 0
        self.losses += 1


def _session_of(connection: AnyConnection) -> Session:
    client_encoding = connection.pgconn.parameter_status(b"client_encoding")
    # An attribute, since a lookup in a weak dictionary costs as much as the rest of this function.
    session: Session | None = connection.__dict__.get("_aibind_session")
    if session is None or session.client_encoding != client_encoding:
        session = connection.__dict__["_aibind_session"] = Session(client_encoding, connection.info.encoding)
    return session


def _encode(params: Sequence[object], encoding: str) -> list[bytes | None]:
    """Return parameters in text format."""
    values: list[bytes | None] = []
    for value in params:
        if value is None:
            values.append(None)
            continue
        text = value if isinstance(value, str) else str(value)
        if "\0" in text:  # libpq would send the text up to it
            raise psycopg.DataError("PostgreSQL text cannot contain NUL (0x00) bytes")
        values.append(text.encode(encoding))
    return values


Steps: TypeAlias = Generator[Any, Any, Any]  # as `wait` of a connection drives them


def run_statement(
    connection: AnyConnection, sql: str, params: Sequence[object], deadline: float = math.inf, *, prepare: bool = False
) -> Steps:
    """Return the steps that run one statement. They return its rows.

    Outside a transaction, a statement that has run as often as the connection's `prepare_threshold` is prepared.

    Args:
        connection: The connection. Its lock must be held until the steps are done.
        sql: The statement, with numbered parameters.
        params: The values of the parameters: texts, numbers, times or None.
        deadline: The value of `monotonic()` at which to stop waiting; no limit by default.
        prepare: Whether the session is not shared with other clients, so that it may keep prepared statements. False
            by default.

    Raises:
        AibindError: The connection is in pipeline mode.
        InvalidDataError: The client encoding of the connection is SQL_ASCII.
        UnansweredError: The deadline has passed. Close the connection, since the answer may still arrive.
        psycopg.Error: The error of the server or of the connection.
    """
    steps = _run(connection, sql, params, prepare)
    return steps if deadline == math.inf else _with_deadline(steps, deadline)


def _run(connection: AnyConnection, sql: str, params: Sequence[object], prepare: bool) -> Steps:
    pgconn = connection.pgconn
    if pgconn.transaction_status != IDLE or not connection.autocommit or pgconn.pipeline_status:
        yield from _join_transaction(connection)
        prepare = False  # the loss of a prepared statement would fail the transaction
    session = _session_of(connection)
    values = _encode(params, session.encoding)
    while True:
        statement = session.statement(sql)
        if prepare and not statement.is_prepared:
            prepare = session.must_prepare(statement, connection.prepare_threshold, connection.prepared_max)
            if prepare:
                yield from _prepare(pgconn, session, statement)
        if prepare:
            pgconn.send_query_prepared(statement.name, values, result_format=BINARY)
        else:
            pgconn.send_query_params(statement.sql, values, result_format=BINARY)
        # The server sends the rows before it commits. An error of the commit, as of a deferred trigger, follows them.
        result = (yield from flush_and_fetch(pgconn))[-1]
        if result.status in SUCCEEDED:
            break
        error = error_from_result(result, session.encoding)
        if not (prepare and loses_prepared_statement(error)):
            raise error
        session.lose_statements()
    return _rows(result, session, connection)


def _rows(result: PGresult, session: Session, connection: AnyConnection) -> list[Row]:
    columns = result.nfields
    if columns == 1 and result.ntuples == 1 and result.ftype(0) == INT4:
        # The result of an append. A `Transformer` would need as much processor time as the sending of the statement.
        value = result.get_value(0, 0)
        return [(None if value is None else int.from_bytes(value, "big", signed=True),)]
    if not columns:
        return []
    if session.encoding == "utf-8":
        transformer = session.transformer
    else:
        transformer = Transformer(LoadContext(RESULT_TYPES, connection))
    transformer.set_pgresult(result)
    rows = transformer.load_rows(0, result.ntuples, tuple)
    transformer.set_pgresult(None)  # it would keep the result in memory
    return rows


def _prepare(pgconn: PGconn, session: Session, statement: Statement) -> Steps:
    pgconn.send_prepare(statement.name, statement.sql)
    [result, *_] = yield from flush_and_fetch(pgconn)
    if result.status not in SUCCEEDED:
        error = error_from_result(result, session.encoding)
        if sqlstate(error) != DUPLICATE_PREPARED_STATEMENT:  # an earlier call was interrupted after it had sent this
            raise error
    statement.is_prepared = True
    session.prepared += 1


def _join_transaction(connection: AnyConnection) -> Steps:
    """Check that a transaction can take a statement. Begin one if the connection is not in autocommit mode."""
    pgconn = connection.pgconn
    if pgconn.status != ConnStatus.OK:
        raise psycopg.OperationalError("the connection is closed")
    if pgconn.pipeline_status:  # the lock excludes the pipeline of another `executemany`
        raise AibindError(
            "the connection is in pipeline mode, in which a statement has no result yet: use the store outside of "
            "the pipeline, or give it a connection of its own"
        )
    if pgconn.transaction_status == TransactionStatus.INERROR:
        raise psycopg.errors.InFailedSqlTransaction(
            "the transaction of this connection has failed: roll it back before the next call"
        )
    if pgconn.transaction_status == IDLE and not connection.autocommit:
        encoding = _session_of(connection).encoding  # raises for SQL_ASCII, before the transaction begins
        pgconn.send_query(_begin_command(connection))
        [result, *_] = yield from flush_and_fetch(pgconn)
        if result.status not in SUCCEEDED:
            raise error_from_result(result, encoding)


def _begin_command(connection: AnyConnection) -> bytes:
    """Return the command with which psycopg begins a transaction, with the options of the connection."""
    words = ["BEGIN"]
    if connection.isolation_level is not None:
        words += ["ISOLATION LEVEL", connection.isolation_level.name.replace("_", " ")]
    if connection.read_only is not None:
        words.append("READ ONLY" if connection.read_only else "READ WRITE")
    if connection.deferrable is not None:
        words.append("DEFERRABLE" if connection.deferrable else "NOT DEFERRABLE")
    return " ".join(words).encode()


def _with_deadline(steps: Steps, deadline: float) -> Steps:
    """Stop waiting at `deadline`: TCP does not detect a peer that accepts data but never replies."""
    if monotonic() >= deadline:
        raise psycopg.OperationalError("the connection was busy for the whole timeout: the statement was not sent")
    try:
        wanted = next(steps)
        while True:
            # psycopg resumes the steps several times a second, even if nothing has arrived.
            if monotonic() >= deadline:
                raise UnansweredError(
                    "the server has not answered within the timeout: the statement may or may not have taken effect"
                )
            ready = yield wanted
            if ready is None:  # after an interruption, psycopg waits again with its own timeout
                deadline = math.inf
            wanted = steps.send(ready)
    except StopIteration as end:
        return end.value
