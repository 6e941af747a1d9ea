"""Stores of both flavours on the same tables, with one way to call them, for tests against a model."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg

FLAVOURS = ("sync", "async")


class BothStores:
    """One store of each flavour, and an event loop for the asynchronous one."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stores: dict[str, Any]) -> None:
        self.loop = loop
        self.stores = stores

    def call(self, flavour: str, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method and return its result; the items of an iterator are returned as a list."""
        result = getattr(self.stores[flavour], method)(*arguments, **options)
        if inspect.isawaitable(result):
            return self.loop.run_until_complete(result)
        if hasattr(result, "__aiter__"):
            return self.loop.run_until_complete(_collect(result))
        return list(result) if isinstance(result, Iterator) else result


async def _collect(iterator: Any) -> list[Any]:
    return [item async for item in iterator]


async def _create(store_class: Any, dsn: str, options: dict[str, Any]) -> Any:
    return store_class(dsn, **options)


@contextmanager
def open_both(dsn: str, sync_class: Any, async_class: Any, **options: Any) -> Iterator[BothStores]:
    """Open a store of each flavour on the same tables."""
    loop = asyncio.new_event_loop()
    try:
        with sync_class(dsn, **options) as sync_store:
            async_store = loop.run_until_complete(_create(async_class, dsn, options))
            try:
                yield BothStores(loop, {"sync": sync_store, "async": async_store})
            finally:
                loop.run_until_complete(async_store.close())
    finally:
        loop.close()


class Tables:
    """Direct access to the tables. `names` replace the names in braces in a statement."""

    def __init__(self, connection: psycopg.Connection[Any], **names: psycopg.sql.Identifier) -> None:
        self._connection = connection
        self._names = names

    def run(self, statement: str, *params: Any) -> Sequence[tuple[Any, ...]]:
        """Run SQL and return its rows."""
        text = statement.format(**{name: table.as_string(None) for name, table in self._names.items()})
        cursor = psycopg.RawCursor(self._connection)
        cursor.execute(text, params)
        return cursor.fetchall() if cursor.description else []
