"""The runner of statements, without a server: its pure parts, and undocumented parts of psycopg."""

from __future__ import annotations

import inspect
from datetime import datetime, timezone
from enum import Enum

import psycopg
import pytest
from psycopg import pq
from psycopg.adapt import Transformer

from aibind_postgres import InvalidDataError
from aibind_postgres import _statement_runner as runner


def test_undocumented_parts_of_psycopg() -> None:
    """The runner depends on these names and parameters. A version of psycopg that changes them must fail here."""
    assert list(inspect.signature(psycopg.errors.error_from_result).parameters) == ["result", "encoding"]
    assert callable(psycopg.generators.execute)
    for connection in (psycopg.Connection, psycopg.AsyncConnection):
        assert list(inspect.signature(connection.wait).parameters)[:2] == ["self", "gen"]
    for method in ("send_query", "send_query_params", "send_prepare", "send_query_prepared", "parameter_status"):
        assert callable(getattr(pq.PGconn, method))
    for attribute in ("transaction_status", "pipeline_status", "status"):
        assert hasattr(pq.PGconn, attribute)
    for method in ("set_pgresult", "load_rows"):
        assert callable(getattr(Transformer, method))
    for module, names in (
        (psycopg.types.bool, ["BoolBinaryLoader"]),
        (psycopg.types.numeric, ["Float8BinaryLoader", "Int2BinaryLoader", "Int4BinaryLoader", "Int8BinaryLoader"]),
        (psycopg.types.string, ["TextBinaryLoader"]),
    ):
        assert all(inspect.isclass(getattr(module, name)) for name in names)


class State(str, Enum):
    """A subclass of str: `str()` of it returns another text."""

    DONE = "done"


def test_encoded_parameters() -> None:
    assert runner._encode(["é", None, 5, 1.5], "utf-8") == ["é".encode(), None, b"5", b"1.5"]
    assert runner._encode(["é"], "iso8859-1") == [b"\xe9"]
    assert runner._encode([State.DONE], "utf-8") == [b"done"]
    with pytest.raises(psycopg.DataError, match="NUL"):
        runner._encode(["a\0b"], "utf-8")
    with pytest.raises(UnicodeEncodeError):
        runner._encode(["é"], "ascii")


def test_utc_loader() -> None:
    load = runner.UtcLoader(1184).load
    assert load((0).to_bytes(8, "big")) == datetime(2000, 1, 1, tzinfo=timezone.utc)
    assert load((-1).to_bytes(8, "big", signed=True)) == datetime(1999, 12, 31, 23, 59, 59, 999999, timezone.utc)


def test_statements_of_a_session() -> None:
    session = runner.Session(b"UTF8", "utf-8")
    statement = session.statement("SELECT 1")
    assert session.statement("SELECT 1") is statement
    assert session.statement("SELECT 2").name != statement.name
    assert [session.must_prepare(statement, 2, 100) for _ in range(4)] == [False, False, True, True]
    assert not session.must_prepare(statement, None, None)


def test_lost_statements_get_new_names() -> None:
    session = runner.Session(b"UTF8", "utf-8")
    names = set()
    for _ in range(runner.MAX_LOSSES):
        statement = session.statement("SELECT 1")
        assert session.must_prepare(statement, 0, None)
        names.add(statement.name)
        session.lose_statements()
    assert len(names) == runner.MAX_LOSSES
    assert not session.must_prepare(session.statement("SELECT 1"), 0, None)


def test_maximum_of_prepared_statements() -> None:
    session = runner.Session(b"UTF8", "utf-8")
    session.prepared = 3
    assert session.must_prepare(session.statement("SELECT 1"), 0, 4)
    assert not session.must_prepare(session.statement("SELECT 1"), 0, 3)


def test_number_of_remembered_statements() -> None:
    session = runner.Session(b"UTF8", "utf-8")
    for number in range(2 * runner.MAX_STATEMENTS):
        statement = session.statement(f"SELECT {number}")
    assert len(session.statements) == runner.MAX_STATEMENTS
    assert not session.must_prepare(statement, 0, None)


def test_session_without_an_encoding() -> None:
    with pytest.raises(InvalidDataError, match="UTF8"):
        runner.Session(b"SQL_ASCII", "ascii")
