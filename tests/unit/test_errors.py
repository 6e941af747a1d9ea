"""The errors: one hierarchy, texts, pickling, and SQLSTATE codes."""

from __future__ import annotations

import copy
import pickle

import psycopg
import pytest

import aibind_postgres
from aibind_postgres import ChatHistory, _sqlstate, errors

EXAMPLES = [
    errors.StreamNotFoundError("s"),
    errors.StreamExistsError("s"),
    errors.StreamNotActiveError("s", "done"),
    errors.SequenceConflictError("s", 3, 5),
    errors.StreamWriteError("s", 7, 2),
    errors.MessageNotFoundError("n"),
    errors.InvalidHistoryError("why"),
    errors.InvalidHistoryError("why", "n"),
    errors.InvalidDataError("why"),
    errors.ConversationConflictError("s", None, None),
    errors.WebError(402, "payment required"),
    errors.SchemaError("why"),
    errors.ForkedError("this store belongs to another process"),
    errors.StoreClosedError("this store is closed"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_pickle_and_copy(error):
    for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(copied) is type(error)
        assert str(copied) == str(error)
        assert vars(copied) == vars(error)


def test_hierarchy_and_public_names():
    hierarchy = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {type(error) for error in EXAMPLES} | {errors.AibindError} == hierarchy
    for kind in hierarchy:
        assert issubclass(kind, errors.AibindError)
        assert kind.__name__ in aibind_postgres.__all__
        assert getattr(aibind_postgres, kind.__name__) is kind


def test_pickled_conflict_keeps_both_histories():
    ours, theirs = ChatHistory(), ChatHistory()
    ours.append("ours")
    conflict = aibind_postgres.ConversationConflictError("s", ours, theirs)
    assert isinstance(conflict, errors.AibindError)
    copied = pickle.loads(pickle.dumps(conflict))
    assert (str(copied), copied.session_id, copied.ours.messages, copied.theirs.messages) == (
        str(conflict),
        "s",
        ["ours"],
        [],
    )


def test_invalid_data_is_a_value_error():
    assert issubclass(errors.InvalidDataError, ValueError)


def test_attributes():
    assert errors.StreamNotActiveError("s", "done").state == "done"
    conflict = errors.SequenceConflictError("s", 3, 5)
    assert (conflict.expected, conflict.actual) == (3, 5)


def test_translation_of_wrapped_driver_errors():
    class WrappedError(Exception):
        def __init__(self, orig):
            self.orig = orig

    missing = psycopg.errors.UndefinedTable('relation "x" does not exist\nLINE 1: …')
    wrapper = RuntimeError("with [SQL: … parameters: secret]")
    wrapper.__cause__ = missing
    for error in (missing, WrappedError(missing), wrapper, WrappedError(WrappedError(missing))):
        known = _sqlstate.translate(error)
        assert isinstance(known, errors.SchemaError)
        assert 'relation "x" does not exist. Create it with `aibind-postgres migrate`' in str(known)
        assert "secret" not in str(known)
    assert _sqlstate.translate(psycopg.errors.DivisionByZero()) is None
    assert _sqlstate.translate(RuntimeError()) is None


@pytest.mark.parametrize(
    ("code", "certain"),
    [
        *[(code, True) for code in ("21000", "22P02", "23505", "42501", "44000", "P0001", "40001", "40P01", "57014")],
        # Statement completion unknown, connection failure, disk full, admin shutdown, I/O error, internal error.
        *[(code, False) for code in ("40003", "08006", "53100", "57P01", "58030", "XX000", None)],
    ],
)
def test_rejected_statement_wrote_nothing(code, certain):
    error = RuntimeError("from a driver")
    error.sqlstate = code
    assert _sqlstate.wrote_nothing(error) is certain


@pytest.mark.parametrize(
    ("code", "transient"),
    [
        *[(code, True) for code in ("40001", "40P01", "55P03", "57014")],
        *[(code, False) for code in ("08006", "25006", "42501", "53300", "57P01", "58030", None)],
    ],
)
def test_transient_refusal_is_of_a_reachable_server(code, transient):
    error = RuntimeError("from a driver")
    error.sqlstate = code
    assert _sqlstate.is_transient(error) is transient


def test_unsent_text_was_not_written():
    assert _sqlstate.wrote_nothing(errors.InvalidDataError("lone surrogate"))


@pytest.mark.parametrize(
    ("recoverable", "codes"),
    [
        (True, "08006 25006 25P03 25P04 40001 40P01 53100 53300 55P03 57014 57P01 57P03 57P05 58030"),
        # Read-only is not the same as a failed transaction, and another attempt cannot make a statement smaller.
        (False, "22P02 23505 25P02 28P01 3D000 42501 42P01 54000 55000 XX000"),
    ],
)
def test_recoverable_errors(recoverable, codes):
    for code in codes.split():
        error = psycopg.errors.lookup(code)()
        assert _sqlstate.is_recoverable(error, (psycopg.OperationalError,)) is recoverable, code


def test_class_of_an_error_without_code_decides():
    assert _sqlstate.is_recoverable(psycopg.OperationalError("refused"), (psycopg.OperationalError,))
    assert not _sqlstate.is_recoverable(psycopg.OperationalError("refused"))


def test_texts_name_object_value_and_next_step():
    assert str(errors.StreamNotFoundError("a")) == (
        "stream 'a' not found: it was never created, was deleted, or has expired"
    )
    assert "stream 'a': expected number 3, but the next number is 5" in str(errors.SequenceConflictError("a", 3, 5))
    assert "or a failover has lost acknowledged chunks" in str(errors.SequenceConflictError("a", 3, 5))
    assert "load it again" in str(errors.ConversationConflictError("s", None, None))
