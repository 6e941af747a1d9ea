"""The errors: one family, each says what it means, and each survives a trip between processes."""

from __future__ import annotations

import copy
import pickle

import psycopg
import pytest

import aibind_postgres
from aibind_postgres import ChatHistory, errors

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
    errors.SchemaError("what"),
    errors.ForkedError("this store belongs to another process"),
    errors.StoreClosedError("this store is closed"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_can_be_pickled_and_copied(error):
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


def test_every_error_is_of_the_family_and_public():
    family = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {type(error) for error in EXAMPLES} | {errors.AibindError} == family
    for kind in family:
        assert issubclass(kind, errors.AibindError)
        assert kind.__name__ in aibind_postgres.__all__
        assert getattr(aibind_postgres, kind.__name__) is kind


def test_a_conflict_holds_both_histories_also_after_a_trip():
    ours, theirs = ChatHistory(), ChatHistory()
    ours.append("ours")
    conflict = aibind_postgres.ConversationConflictError("s", ours, theirs)
    assert isinstance(conflict, errors.AibindError)
    twin = pickle.loads(pickle.dumps(conflict))
    assert (str(twin), twin.session_id, twin.ours.messages, twin.theirs.messages) == (str(conflict), "s", ["ours"], [])


def test_invalid_data_is_a_value_error():
    assert issubclass(errors.InvalidDataError, ValueError)


def test_the_state_and_the_numbers_can_be_read():
    assert errors.StreamNotActiveError("s", "done").state == "done"
    conflict = errors.SequenceConflictError("s", 3, 5)
    assert (conflict.expected, conflict.actual) == (3, 5)


def test_a_drivers_error_is_found_inside_its_wrappers():
    class WrappedError(Exception):
        def __init__(self, orig):
            self.orig = orig

    missing = psycopg.errors.UndefinedTable('relation "x" does not exist\nLINE 1: …')
    wrapper = RuntimeError("with [SQL: … parameters: secret]")
    wrapper.__cause__ = missing
    for error in (missing, WrappedError(missing), wrapper, WrappedError(WrappedError(missing))):
        known = errors.translated(error)
        assert isinstance(known, errors.SchemaError)
        assert 'relation "x" does not exist. Create what is missing with `aibind-postgres migrate`' in str(known)
        assert "secret" not in str(known)
    assert errors.translated(psycopg.errors.DivisionByZero()) is None
    assert errors.translated(RuntimeError()) is None


@pytest.mark.parametrize(
    ("code", "certain"),
    [
        *[(code, True) for code in ("21000", "22P02", "23505", "42501", "44000", "P0001", "40001", "40P01", "57014")],
        # Unknown completion, connection lost, out of resources, shut down, input and output, internal.
        *[(code, False) for code in ("40003", "08006", "53100", "57P01", "58030", "XX000", None)],
    ],
)
def test_what_the_server_has_refused_for_certain(code, certain):
    error = RuntimeError("from a driver")
    error.sqlstate = code
    assert errors.nothing_was_written(error) is certain


def test_a_text_that_was_never_sent_was_not_written():
    assert errors.nothing_was_written(errors.InvalidDataError("no room for a character"))
