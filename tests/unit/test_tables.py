"""Table names: parsing, checks, quoting and derived names."""

from __future__ import annotations

import pytest
from psycopg.sql import Identifier

from aibind_postgres._sql import StreamStatements
from aibind_postgres._tables import Table


@pytest.mark.parametrize(
    ("name", "table", "quoted"),
    [
        ("plain", (None, "plain"), '"plain"'),
        ("Schema.Table", ("Schema", "Table"), '"Schema"."Table"'),
        ('we"ird', (None, 'we"ird'), '"we""ird"'),
        ('"', (None, '"'), '""""'),
        (Identifier("a.b"), (None, "a.b"), '"a.b"'),
        (Identifier('s"', "t.."), ('s"', "t.."), '"s"""."t.."'),
    ],
)
def test_name_is_taken_literally(name, table, quoted):
    parsed = Table.parse(name)
    assert parsed == table
    assert parsed.quoted == quoted


@pytest.mark.parametrize("name", ["", ".", "a.", ".a", "a.b.c", "a\0", "\udc80", "x" * 64, "ü" * 32, "s." + "x" * 64])
def test_invalid_name_is_rejected(name):
    with pytest.raises(ValueError, match="name"):
        Table.parse(name)


def test_identifier_with_three_parts_is_rejected():
    with pytest.raises(ValueError, match="more parts"):
        Table.parse(Identifier("a", "b", "c"))


def test_derived_names_fit_and_differ():
    assert Table(None, "status").derive("_idx") == "status_idx"
    long_names = ["x" * 63, "x" * 62 + "y", "ü" * 31, "ü" * 30 + "ab", "😀" * 15 + "abc"]
    derived = [Table(None, name).derive(suffix) for name in long_names for suffix in ("_expires_at_idx", "_notify")]
    assert all(len(name.encode()) <= 63 for name in derived)
    assert len(set(derived)) == len(derived)


def test_name_cannot_become_a_placeholder():
    statements = StreamStatements(Table(None, "{status}"), Table(None, "{now}{chunks}"))
    assert '"{status}"' in statements.append
    assert '"{now}{chunks}"' in statements.append
