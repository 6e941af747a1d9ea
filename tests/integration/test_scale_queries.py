"""The queries of docs/scale.md run on every version of PostgreSQL, and find the tables of the library."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from aibind_postgres import PostgresStreamStore

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text("utf-8")
QUERIES = [
    query.strip()
    for block in re.findall(r"^```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for query in block.split(";")
    if query.strip()
]


@pytest.fixture
def filled(database):
    """The connection to a database with a stream, whose statistics are published."""
    with PostgresStreamStore(database) as store:
        store.append_many(store.create(), ["text"] * 10)
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


def test_queries(filled):
    assert len(QUERIES) == 10
    for query in QUERIES:
        filled.execute(query)


def test_queries_find_the_tables(filled):
    [sizes] = [query for query in QUERIES if "pg_indexes_size" in query]
    assert None not in filled.execute(sizes).fetchone()
    [states] = [query for query in QUERIES if "GROUP BY state" in query]
    assert filled.execute(states).fetchall() == [("active", 1, 10, 0)]
