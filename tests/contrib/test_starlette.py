"""Starlette's routes, where they are made."""

from __future__ import annotations

import pytest

from aibind_postgres import PostgresStreamStore, StreamHandler
from aibind_postgres.contrib.starlette import routes


def test_a_synchronous_handler_is_refused():
    with pytest.raises(TypeError, match="take an AsyncStreamHandler, not StreamHandler"):
        routes(StreamHandler(iter, store=PostgresStreamStore("")))
