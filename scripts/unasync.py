"""Write the synchronous flavour: convert each `_async` folder into the `_sync` folder beside it.

Run `python scripts/unasync.py` to convert, or with `--check` to learn, by the exit code, whether what is there is
what the sources give. The conversion renames tokens and nothing else, so the sources keep to the dialect that
CONTRIBUTING.md describes.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# This file has the name of the package that it uses, and Python looks into a script's own folder first.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT / "scripts"]

import unasync  # noqa: E402  # after the line above

FOLDERS = [ROOT / "src" / "aibind_postgres", ROOT / "tests", ROOT / "tests" / "faults"]

# Every paired name, since unasync alone would turn AsyncX into SyncX.
RENAMES = {
    "AbstractAsyncContextManager": "AbstractContextManager",
    "AsyncAnnouncer": "Announcer",
    "AsyncAppender": "Appender",
    "AsyncAttempt": "Attempt",
    "AsyncBackground": "Background",
    "AsyncCall": "Call",
    "AsyncChanges": "Changes",
    "AsyncClient": "Client",
    "AsyncClientCursor": "ClientCursor",
    "AsyncClientLike": "ClientLike",
    "AsyncCombiner": "Combiner",
    "AsyncConnection": "Connection",
    "AsyncConnectionClient": "ConnectionClient",
    "AsyncConnectionPool": "ConnectionPool",
    "AsyncDatabase": "Database",
    "AsyncEvent": "Event",
    "AsyncFeed": "Feed",
    "AsyncFetcher": "Fetcher",
    "AsyncDurableStream": "DurableStream",
    "AsyncIterable": "Iterable",
    "AsyncIterator": "Iterator",
    "AsyncLock": "Lock",
    "AsyncNullConnectionPool": "NullConnectionPool",
    "AsyncPlace": "Place",
    "AsyncPoolClient": "PoolClient",
    "AsyncPostgresClient": "PostgresClient",
    "AsyncPostgresConversationStore": "PostgresConversationStore",
    "AsyncPostgresStreamStore": "PostgresStreamStore",
    "AsyncProducer": "Producer",
    "AsyncPsycopgClient": "PsycopgClient",
    "AsyncRawCursor": "RawCursor",
    "AsyncReader": "Reader",
    "AsyncRun": "Run",
    "AsyncSignal": "Signal",
    "AsyncStreamHandler": "StreamHandler",
    "AsyncStreamWriter": "StreamWriter",
    "AsyncTimedCursor": "TimedCursor",
    "AsyncWatch": "Watch",
    "AsyncWebResponse": "WebResponse",
    "AsyncWorker": "Worker",
    "_async": "_sync",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "async_break_off": "break_off",
    "async_settle": "settle",
    "async_at_exit": "at_exit",
    "async_at_end_of_loop": "at_end_of_loop",
    "async_gather": "gather",
    "async_home": "home",
    "async_is_source": "is_source",
    "async_is_flavour": "is_flavour",
    "async_migrate": "migrate",
    "async_sleep": "sleep",
    "async_spawn": "spawn",
    "async_take": "take",
    "async_uninterrupted": "uninterrupted",
    "async_until": "until",
    "async_workers": "workers",
    "asynccontextmanager": "contextmanager",
}


def _names(source: Path) -> set[str]:
    """Return the names that occur in a source file; raise `SystemExit` for one where it would not be converted.

    Inside an f-string a name is a token from Python 3.12 on, and is none before. A text with a name in it is true for
    one flavour only.
    """
    tree = ast.parse(source.read_text("utf-8"))
    inside = {child for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for child in ast.walk(node)}
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                pass
            case ast.ImportFrom(module=str(module)):
                names |= set(module.split("."))
                continue
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case ast.Constant(value=str(text)):
                if words := RENAMES.keys() & set(re.findall(r"\w+", text)):
                    raise SystemExit(f"{source}:{node.lineno}: a text names {', '.join(words)}")
                continue
            case ast.Await() if node in inside:
                raise SystemExit(f"{source}:{node.lineno}: await inside an f-string")
            case _:
                continue
        if node in inside and name in RENAMES:
            raise SystemExit(f"{source}:{node.lineno}: {name} inside an f-string")
        if re.match("Async[A-Z]", name) and name not in RENAMES:
            raise SystemExit(f"{source}:{node.lineno}: {name} has no rename")
        names.add(name)
    return names


def generate(folders: list[Path]) -> dict[Path, str]:
    """Return what `folder/_sync` has to contain, for each folder. Writes nothing.

    Raises `SystemExit` for a source that would not be converted as a whole, and for a rename that matched nothing.
    """
    unused = set(RENAMES)
    generated = {}
    with tempfile.TemporaryDirectory() as scratch:
        for folder in folders:
            sources = folder / "_async"
            rule = unasync.Rule(str(sources), scratch, additional_replacements=RENAMES)
            for source in sorted(sources.rglob("*.py")):
                unused -= _names(source)
                unasync.unasync_files([str(source)], [rule])
                inner = source.relative_to(sources)
                header = f"# Generated from _async/{inner.as_posix()}: edit that file.\n"
                generated[folder / "_sync" / inner] = header + Path(scratch, inner).read_text("utf-8")
    if unused:
        raise SystemExit(f"renames that matched nothing: {', '.join(sorted(unused))}")
    return generated


def convert(folders: list[Path] = FOLDERS) -> None:
    """Write `folder/_sync` anew, for each folder, and leave nothing there that has no source."""
    generated = generate(folders)
    for folder in folders:
        shutil.rmtree(folder / "_sync", ignore_errors=True)
    for target, text in generated.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")


def outdated(folders: list[Path] = FOLDERS) -> list[Path]:
    """Return the generated files that are not what the sources give, missing and surplus ones included."""
    wanted = generate(folders)
    found = {file: file.read_text("utf-8") for folder in folders for file in (folder / "_sync").rglob("*.py")}
    return sorted(file for file in wanted.keys() | found.keys() if wanted.get(file) != found.get(file))


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if stale := outdated():
            raise SystemExit("not what the sources give: " + ", ".join(str(file.relative_to(ROOT)) for file in stale))
    elif sys.argv[1:]:
        raise SystemExit("usage: python scripts/unasync.py [--check]")
    else:
        convert()
