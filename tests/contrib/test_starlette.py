"""The routes for Starlette and FastAPI."""

from __future__ import annotations

import pytest

from aibind_postgres import PostgresStreamStore, StreamHandler
from aibind_postgres.contrib.starlette import routes


def test_sync_handler_raises():
    with pytest.raises(TypeError, match="take an asynchronous handler, not StreamHandler"):
        routes(StreamHandler(iter, store=PostgresStreamStore("")))
