"""Stores of both flavours on the same tables, called alike, and the tables themselves, for tests against a model."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg

FLAVOURS = ("sync", "async")


class Both:
    """Two stores, one of each flavour, with one event loop for the asynchronous one."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stores: dict[str, Any]) -> None:
        self.loop = loop
        self.stores = stores

    def call(self, flavour: str, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method and return what it gives; what it iterates over comes as a list."""
        result = getattr(self.stores[flavour], method)(*arguments, **options)
        if inspect.isawaitable(result):
            return self.loop.run_until_complete(result)
        if hasattr(result, "__aiter__"):
            return self.loop.run_until_complete(_collected(result))
        return list(result) if isinstance(result, Iterator) else result


async def _collected(iterator: Any) -> list[Any]:
    return [item async for item in iterator]


async def _made(kind: Any, dsn: str, options: dict[str, Any]) -> Any:
    return kind(dsn, **options)


@contextmanager
def both(dsn: str, plain_kind: Any, async_kind: Any, **options: Any) -> Iterator[Both]:
    """Open a store of each flavour on the same tables."""
    loop = asyncio.new_event_loop()
    try:
        with plain_kind(dsn, **options) as plain:
            store = loop.run_until_complete(_made(async_kind, dsn, options))
            try:
                yield Both(loop, {"sync": plain, "async": store})
            finally:
                loop.run_until_complete(store.close())
    finally:
        loop.close()


class Tables:
    """Tables as another program sees them; `names` stand in braces in the statements."""

    def __init__(self, connection: psycopg.Connection[Any], **names: psycopg.sql.Identifier) -> None:
        self._connection = connection
        self._names = names

    def run(self, statement: str, *params: Any) -> Sequence[tuple[Any, ...]]:
        """Run SQL and return its rows."""
        text = statement.format(**{name: table.as_string(None) for name, table in self._names.items()})
        cursor = psycopg.RawCursor(self._connection)
        cursor.execute(text, params)
        return cursor.fetchall() if cursor.description else []
