"""Stores on the databases of DATABASES. They connect at the first call, in each process and event loop."""

from __future__ import annotations

import asyncio
import atexit
import gc
import os
import threading
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar, cast
from weakref import WeakSet

from django.db.backends.base.base import NO_DB_ALIAS
from django.db.backends.signals import connection_created

from ..._async.conversation_store import AsyncPostgresConversationStore
from ..._async.durable_stream import AsyncDurableStream
from ..._async.stream_store import AsyncPostgresStreamStore
from ..._sync.conversation_store import PostgresConversationStore
from ..._sync.stream_store import PostgresStreamStore
from ._clients import AsyncDjangoPoolClient, DjangoPoolClient
from ._settings import table_names

Store = TypeVar("Store", bound=Any)


def stream_store(using: str = "default", **options: Any) -> PostgresStreamStore:
    """Return a stream store on a database of Django's setting DATABASES, for synchronous code.

    The store can be created when a module is imported. It connects at the first call, separately in each process, and
    is closed when the process exits. It has a pool of its own, so it never takes part in `transaction.atomic()`: use
    `wrap_django` for that.

    In tests, it uses the test database. In the transaction of a `TestCase`, it uses the connection of the test, and
    `DurableStream.start` runs the source before it returns.

    Args:
        using: The name of the database in DATABASES. Default: "default".
        options: The other arguments of `PostgresStreamStore`, such as `ttl`. The names of the tables are those of the
            setting AIBIND_POSTGRES.

    Returns:
        The store.

    Example:
        store = stream_store(ttl=3600)
    """

    def make() -> PostgresStreamStore:
        client, others = _client_and_options(DjangoPoolClient, using, options)
        return PostgresStreamStore(client, **_stream_tables(), **others)

    return cast("PostgresStreamStore", _StoreProxy(PostgresStreamStore, make))


def async_stream_store(using: str = "default", **options: Any) -> AsyncPostgresStreamStore:
    """Return a stream store on a database of Django's setting DATABASES, for asynchronous code.

    Each event loop has a pool of its own, which is closed at the end of the loop.

    Args:
        using: As for `stream_store`.
        options: The other arguments of `AsyncPostgresStreamStore`.

    Returns:
        The store.
    """

    def make() -> AsyncPostgresStreamStore:
        client, others = _client_and_options(AsyncDjangoPoolClient, using, options)
        return AsyncPostgresStreamStore(client, **_stream_tables(), **others)

    return cast("AsyncPostgresStreamStore", _AsyncStoreProxy(AsyncPostgresStreamStore, make))


def conversation_store(using: str = "default", **options: Any) -> PostgresConversationStore:
    """Return a conversation store on a database of Django's setting DATABASES, for synchronous code.

    Args:
        using: As for `stream_store`.
        options: The other arguments of `PostgresConversationStore`, such as `ttl`.

    Returns:
        The store.
    """

    def make() -> PostgresConversationStore:
        client, others = _client_and_options(DjangoPoolClient, using, options)
        return PostgresConversationStore(client, **_conversation_tables(), **others)

    return cast("PostgresConversationStore", _StoreProxy(PostgresConversationStore, make))


def async_conversation_store(using: str = "default", **options: Any) -> AsyncPostgresConversationStore:
    """Return a conversation store on a database of Django's setting DATABASES, for asynchronous code.

    Args:
        using: As for `async_stream_store`.
        options: The other arguments of `AsyncPostgresConversationStore`.

    Returns:
        The store.
    """

    def make() -> AsyncPostgresConversationStore:
        client, others = _client_and_options(AsyncDjangoPoolClient, using, options)
        return AsyncPostgresConversationStore(client, **_conversation_tables(), **others)

    return cast("AsyncPostgresConversationStore", _AsyncStoreProxy(AsyncPostgresConversationStore, make))


def _client_and_options(kind: Callable[..., Any], using: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # A store accepts `timeout` for pools that it makes itself.
    others = dict(options)
    return kind(using, others.pop("timeout", None)), others


def _stream_tables() -> dict[str, Any]:
    names = table_names()
    return {"chunks_table": names.chunks, "status_table": names.status}


def _conversation_tables() -> dict[str, Any]:
    names = table_names()
    return {"table": names.conversations, "status_table": names.status}


class _Proxy(Generic[Store]):
    """Stands for a store, which is made at the first use of an attribute."""

    _all: ClassVar[WeakSet[Any]] = WeakSet()

    def __init__(self, kind: type[Store], make: Callable[[], Store]) -> None:
        self._kind = kind
        self._make = make
        self._lock = threading.RLock()
        self._all.add(self)

    @property  # type: ignore[misc]  # for `isinstance`, with which handlers and housekeepers check their stores
    def __class__(self) -> Any:
        return self._kind

    def _store(self) -> Store:
        raise NotImplementedError

    def _renew(self) -> None:
        """Close the store before Django creates or drops a test database. The next use makes another one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store(), name)

    def __repr__(self) -> str:
        return repr(self._store())


class _StoreProxy(_Proxy[Store]):
    """Stands for one store in each process, and for another one after the database of the tests has changed."""

    def __init__(self, kind: type[Store], make: Callable[[], Store]) -> None:
        super().__init__(kind, make)
        self._current: tuple[int, Store] | None = None

    def _store(self) -> Store:
        current = self._current
        if current is None or current[0] != os.getpid():
            with self._lock:
                current = self._current
                if current is None or current[0] != os.getpid():
                    current = self._current = os.getpid(), self._make()
                    atexit.register(current[1].close)
        return current[1]

    def __enter__(self) -> Store:
        return cast("Store", self._store().__enter__())

    def __exit__(self, *details: Any) -> None:
        self._store().__exit__(*details)

    def _renew(self) -> None:
        with self._lock:
            current = self._current
            if current is not None and current[0] == os.getpid():
                current[1].close()
                atexit.unregister(current[1].close)
            self._current = None


class _AsyncStoreProxy(_Proxy[Store]):
    """Stands for one store in each event loop. The end of a loop closes the pool of its store."""

    def __init__(self, kind: type[Store], make: Callable[[], Store]) -> None:
        super().__init__(kind, make)
        self._stores: dict[tuple[int, asyncio.AbstractEventLoop | None], Store] = {}

    def _store(self) -> Store:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        key = os.getpid(), loop
        with self._lock:
            if key not in self._stores:
                # A store that was used outside a loop, as by the constructor of a housekeeper, is that of the first.
                store = self._stores.pop((os.getpid(), None), None) or self._make()
                self._renew()
                self._stores[key] = store
            return self._stores[key]

    def _renew(self) -> None:
        with self._lock:
            self._stores = {each: kept for each, kept in self._stores.items() if _is_usable(*each)}

    def _used_in(self, loop: asyncio.AbstractEventLoop) -> Store | None:
        return self._stores.get((os.getpid(), loop))

    async def __aenter__(self) -> Store:
        return cast("Store", await self._store().__aenter__())

    async def __aexit__(self, *details: Any) -> None:
        await self._store().__aexit__(*details)


async def close_async_stores(timeout: float) -> None:
    """Wait for the answers that this process writes in the running loop, then close its stores."""
    loop = asyncio.get_running_loop()
    proxies = [proxy for proxy in list(_Proxy._all) if type(proxy) is _AsyncStoreProxy]
    stores = [store for proxy in proxies if (store := proxy._used_in(loop)) is not None]
    streams = [store for store in stores if isinstance(store, AsyncPostgresStreamStore)]
    await asyncio.gather(*(AsyncDurableStream.shutdown(store, timeout) for store in streams))
    for store in stores:
        await store.close()


def _is_usable(process: int, loop: asyncio.AbstractEventLoop | None) -> bool:
    return process == os.getpid() and (loop is None or not loop.is_closed())


def _renew_stores(connection: Any, **_: Any) -> None:
    if connection.alias == NO_DB_ALIAS:  # it creates or drops a test database, which must have no connections
        for proxy in list(_Proxy._all):
            proxy._renew()
        gc.collect()  # closes connections that the end of an event loop has interrupted while they were opened


def _renew_locks() -> None:
    # A thread of the parent process may hold them.
    for proxy in list(_Proxy._all):
        proxy._lock = threading.RLock()


connection_created.connect(_renew_stores, dispatch_uid="aibind_postgres.contrib.django")
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
