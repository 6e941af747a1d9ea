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

FOLDERS = [ROOT / "src" / "aibind_postgres", ROOT / "tests"]

# Every paired name, since unasync alone would turn AsyncX into SyncX.
RENAMES = {
    "AsyncAnnouncer": "Announcer",
    "AsyncChanges": "Changes",
    "AsyncClient": "Client",
    "AsyncClientLike": "ClientLike",
    "AsyncConnection": "Connection",
    "AsyncConnectionClient": "ConnectionClient",
    "AsyncConnectionPool": "ConnectionPool",
    "AsyncEvent": "Event",
    "AsyncIterator": "Iterator",
    "AsyncPlace": "Place",
    "AsyncPoolClient": "PoolClient",
    "AsyncPostgresClient": "PostgresClient",
    "AsyncPostgresStreamStore": "PostgresStreamStore",
    "AsyncRawCursor": "RawCursor",
    "AsyncWatch": "Watch",
    "AsyncWorker": "Worker",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "async_sleep": "sleep",
    "async_spawn": "spawn",
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
        names.add(name)
    return names


def convert(folders: list[Path] = FOLDERS) -> list[Path]:
    """Convert `folder/_async` into `folder/_sync`, for each folder; return the files written.

    A target is wiped first, so that nothing outlives its source. Raises `SystemExit` if a rename matched nothing.
    """
    rule = unasync.Rule("/_async/", "/_sync/", additional_replacements=RENAMES)
    unused = set(RENAMES)
    written = []
    for folder in folders:
        shutil.rmtree(folder / "_sync", ignore_errors=True)
        for source in sorted((folder / "_async").rglob("*.py")):
            unused -= _names(source)
            unasync.unasync_files([str(source)], [rule])
            target = folder / "_sync" / source.relative_to(folder / "_async")
            origin = source.relative_to(folder).as_posix()
            target.write_text(f"# Generated from {origin}: edit that file.\n{target.read_text('utf-8')}", "utf-8")
            written.append(target)
    if unused:
        raise SystemExit(f"renames that matched nothing: {', '.join(sorted(unused))}")
    return written


def outdated(folders: list[Path] = FOLDERS) -> list[Path]:
    """Return the generated files that differ from what the sources give, missing and surplus ones included."""
    stale = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, folder in enumerate(folders):
            shutil.copytree(folder / "_async", Path(scratch, str(number), "_async"))
        fresh = convert([Path(scratch, str(number)) for number in range(len(folders))])
        for number, folder in enumerate(folders):
            base = Path(scratch, str(number))
            wanted = {file.relative_to(base): file.read_bytes() for file in fresh if base in file.parents}
            found = {file.relative_to(folder): file.read_bytes() for file in (folder / "_sync").rglob("*.py")}
            names = wanted.keys() | found.keys()
            stale += [folder / name for name in sorted(names) if wanted.get(name) != found.get(name)]
    return stale


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if stale := outdated():
            raise SystemExit("not what the sources give: " + ", ".join(str(file.relative_to(ROOT)) for file in stale))
    elif sys.argv[1:]:
        raise SystemExit("usage: python scripts/unasync.py [--check]")
    else:
        convert()
