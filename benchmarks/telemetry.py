"""The cost of the hooks for metrics in a store without metrics: the same code with and without them, in one process."""

from __future__ import annotations

import ast
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aibind_postgres

from .measure import TOKEN, Row, at_most, compare

if TYPE_CHECKING:
    from .bench import Bench

COPY = "aibind_postgres_without_hooks"
MODULES = ("appending", "database", "following", "listening", "notifying", "stream_lifecycle", "stream_store")


class _HookRemover(ast.NodeTransformer):
    """Removes the statements that report to metrics, and their conditions."""

    removed = 0

    def visit_If(self, node: ast.If) -> Any:
        test = ast.unparse(node.test)
        if "metrics" in test or "_sample" in test:
            self.removed += 1
            return node.body if test.endswith("is None") else None  # without metrics, the first one is the code
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "count":
            self.removed += 1
            return None
        return node


@contextmanager
def without_hooks() -> Iterator[type[aibind_postgres.PostgresStreamStore]]:
    """Copy the package without its hooks, and yield the class of its stores."""
    package = Path(aibind_postgres.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        for file in package.rglob("*.py"):
            text = file.read_text("utf-8")
            if file.parent.name == "_sync" and file.stem in MODULES:
                remover = _HookRemover()
                text = ast.unparse(remover.visit(ast.parse(text)))
                assert remover.removed, file.stem
            target = Path(folder) / COPY / file.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, "utf-8")
        sys.path.insert(0, folder)
        try:
            yield importlib.import_module(COPY).PostgresStreamStore
        finally:
            sys.path.remove(folder)


def telemetry(bench: Bench) -> list[Row]:
    """Append, and append to a reader of another store, in turn with and without the hooks."""
    with ExitStack() as stack:
        copy = stack.enter_context(without_hooks())
        classes: dict[str, type[aibind_postgres.PostgresStreamStore]]
        classes = {"hooks": aibind_postgres.PostgresStreamStore, "without": copy}
        appends, tails = {}, {}
        for name, kind in classes.items():
            tables = bench.database(f"telemetry_{name}")  # without the notifications of the other variant
            store, reader = (stack.enter_context(kind(tables.dsn, **tables.names)) for _ in range(2))
            appends[name] = partial(store.append, store.create(), TOKEN)
            tails[name] = _tail(store, reader)
        appended, followed = bench.alternate(appends), bench.alternate(tails)
    peer, target = "the same code without the hooks for metrics", at_most(1.02)
    return [
        compare("append, metrics=None, p50", "p50", appended["hooks"], peer, appended["without"], target),
        compare("append and tail, metrics=None, p50", "p50", followed["hooks"], peer, followed["without"], target),
    ]


def _tail(
    store: aibind_postgres.PostgresStreamStore, reader: aibind_postgres.PostgresStreamStore
) -> Callable[[], object]:
    """Return an operation that appends a chunk and waits until a reader of another store has it."""
    stream = store.create()
    chunks = reader.read_from(stream)

    def append_and_read() -> object:
        store.append(stream, TOKEN)
        return next(chunks)

    return append_and_read
