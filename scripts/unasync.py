"""Generate the sync flavour: convert each `_async` folder into the `_sync` folder next to it.

Usage: `python scripts/unasync.py` converts. With `--check` it writes nothing and exits with 1 if a generated file
differs from its source. The conversion only renames tokens; CONTRIBUTING.md describes the dialect.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# This file has the name of the package that it uses, and Python searches a script's own folder first.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT / "scripts"]

import unasync  # noqa: E402  # needs the changed path

FOLDERS = [ROOT / "src" / "aibind_postgres", ROOT / "tests", ROOT / "tests" / "faults"]

# Two rules rename the paired names: AsyncX to X, and async_x to x.
PAIRED = re.compile(r"^(?:Async(?=[A-Z])|async_(?=[a-z]))(\w+)")
EXCEPTIONS = {
    "AbstractAsyncContextManager": "AbstractContextManager",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "_async": "_sync",
    "asynccontextmanager": "contextmanager",
}


def convert_name(name: str) -> str:
    """Return the name that the sync flavour has for `name`."""
    return EXCEPTIONS.get(name) or PAIRED.sub(r"\1", name, count=1)


def _check(source: Path) -> None:
    """Raise `SystemExit` for code that renaming tokens cannot convert.

    Before Python 3.12 names inside an f-string are not tokens. A docstring or other text that contains a paired name
    would be wrong in one flavour.
    """
    tree = ast.parse(source.read_text("utf-8"))
    inside = {child for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for child in ast.walk(node)}
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)):
                if words := sorted({word for word in re.findall(r"\w+", text) if convert_name(word) != word}):
                    raise SystemExit(
                        f"{source}:{node.lineno}: the string contains {', '.join(words)}, "
                        "which the sync flavour renames: rephrase it"
                    )
            case ast.Await() if node in inside:
                raise SystemExit(f"{source}:{node.lineno}: await inside an f-string")
            case ast.Name(id=name) | ast.Attribute(attr=name) if node in inside and convert_name(name) != name:
                raise SystemExit(f"{source}:{node.lineno}: {name} inside an f-string")


def generate(folders: list[Path]) -> dict[Path, str]:
    """Return the text of each file in `folder/_sync`, for each folder, without writing it.

    Raises:
        SystemExit: A source cannot be converted by renaming tokens.
    """
    generated = {}
    with tempfile.TemporaryDirectory() as scratch:
        for folder in folders:
            sources = folder / "_async"
            for source in sorted(sources.rglob("*.py")):
                _check(source)
                text = source.read_text("utf-8")
                renames = {name: convert_name(name) for name in set(re.findall(r"\w+", text))}
                renames = {name: new for name, new in renames.items() if new != name}
                rule = unasync.Rule(str(sources), scratch, additional_replacements=renames)
                unasync.unasync_files([str(source)], [rule])
                inner = source.relative_to(sources)
                header = f"# Generated from _async/{inner.as_posix()}: edit that file.\n"
                generated[folder / "_sync" / inner] = header + Path(scratch, inner).read_text("utf-8")
    return generated


def convert(folders: list[Path] = FOLDERS) -> None:
    """Write `folder/_sync` for each folder, and remove files there that have no source."""
    generated = generate(folders)
    for folder in folders:
        shutil.rmtree(folder / "_sync", ignore_errors=True)
    for target, text in generated.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")


def outdated(folders: list[Path] = FOLDERS) -> list[Path]:
    """Return the generated files that differ from their sources, including missing and surplus files."""
    wanted = generate(folders)
    found = {file: file.read_text("utf-8") for folder in folders for file in (folder / "_sync").rglob("*.py")}
    return sorted(file for file in wanted.keys() | found.keys() if wanted.get(file) != found.get(file))


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if stale := outdated():
            names = ", ".join(str(file.relative_to(ROOT)) for file in stale)
            raise SystemExit(f"generated files differ from their sources: {names}. Run `python scripts/unasync.py`")
    elif sys.argv[1:]:
        raise SystemExit("usage: python scripts/unasync.py [--check]")
    else:
        convert()
