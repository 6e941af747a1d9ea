"""The columns of the tables of a store. They show which migrations are applied."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .._concurrency import AsyncLock
from .._distributed import DISTRIBUTED
from .._sql import COLUMNS, json_array, json_text
from .._sqlstate import HOW_TO_MIGRATE
from ..errors import SchemaError

if TYPE_CHECKING:
    from .._statement_runner import Row
    from .._tables import Table
    from .database import AsyncDatabase


class Columns(NamedTuple):
    """The columns of one table, or no columns if the table does not exist.

    Attributes:
        names: The names of the columns.
        is_readable: Whether the role of the connection may read the table.
        found_at: The value of `monotonic()` at the first look-up that found these columns.
    """

    names: frozenset[str]
    is_readable: bool
    found_at: float


class AsyncQuery(Protocol):
    """Runs a statement and returns its rows."""

    async def __call__(self, sql: str, params: Sequence[object], /) -> Sequence[Row]: ...


class AsyncColumnCatalog:
    """Looks up the columns of all tables of a store in the catalog, once for the store.

    Features that need a migration check the columns first: a statement with a missing column would abort a transaction
    of the caller.
    """

    def __init__(self, database: AsyncDatabase, tables: Sequence[Table]) -> None:
        self._database = database
        self._tables = tables
        self._known: dict[Table, Columns] = {}
        self.has_append = False  # whether the tables are distributed, and have the function for appends
        self._look_up_lock = AsyncLock()

    async def of(self, table: Table, query: AsyncQuery | None = None, *, again: bool = False) -> Columns:
        """Return the columns of a table of the store, as of the last look-up.

        Args:
            table: The table.
            query: Runs the statement. Default: the client of the store.
            again: Whether to look them up again.
        """
        if again or table not in self._known:
            self._database.check_owner()
            async with self._look_up_lock:  # the first calls of a store may be many at once
                if again or table not in self._known:
                    await self._look_up(query or self._database.query)
        return self._known[table]

    async def require(self, table: Table, names: Collection[str], feature: str, migration: str) -> Columns:
        """Return the columns of a table. If one is missing, look them up again, since it may have been added.

        Args:
            table: The table.
            names: The names of the columns that it must have.
            feature: The feature that needs them, for the error text.
            migration: The migration that adds them, for the error text.

        Raises:
            SchemaError: A column is missing.
        """
        known = self._known.get(table)
        columns = await self.of(table, again=known is not None and not known.names.issuperset(names))
        if missing := [name for name in names if name not in columns.names]:
            lack = f"has no column {', '.join(missing)}" if columns.names else "does not exist"
            raise SchemaError(
                f"{feature} needs migration {migration}, since the table {table.quoted} {lack}. Apply all migrations "
                f"{HOW_TO_MIGRATE}; or correct the table names given to the store"
            )
        return columns

    async def _look_up(self, query: AsyncQuery) -> None:
        rows = await query(COLUMNS, [json_array(table.quoted for table in self._tables)])
        now = monotonic()
        for table in self._tables:
            own = [(name, is_readable) for quoted, name, is_readable, _ in rows if quoted == table.quoted]
            names = frozenset(name for name, _ in own)
            known = self._known.get(table)
            found_at = known.found_at if known is not None and known.names == names else now
            self._known[table] = Columns(names, any(is_readable for _, is_readable in own), found_at)
        self._database.has_citus = bool(rows) and rows[0][3]
        if self._database.has_citus:
            await self._look_up_distribution(query)

    async def _look_up_distribution(self, query: AsyncQuery) -> None:
        items = [{"name": table.quoted, "append": table.append_function} for table in self._tables]
        rows = await query(DISTRIBUTED, [json_text(items)])
        self._database.is_distributed = bool(rows)
        self.has_append = any(has_append for _, has_append in rows)
