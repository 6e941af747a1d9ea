"""Who imports whom: downwards only, and the two flavours never each other."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import aibind_postgres

PACKAGE = Path(aibind_postgres.__file__).parent

# From the bottom up. A module may import those of lower layers and those beside it.
LAYERS = [
    {"errors", "_concurrency"},
    {"models", "_document", "_merging", "history", "sse", "web"},
    {"_tables", "_arguments", "_sql", "_conversation_sql"},
    {"_async", "_sync"},
    {"schema", "adapters", "embedded"},
    {"__init__"},
    {"contrib", "cli"},
]

# Beside each other, but never together.
APART = [("_async", "_sync"), ("contrib", "cli"), ("_concurrency", "errors")]


def place(module: str) -> str:
    """Return what stands for a module in the layers: the first part of its name inside the package."""
    return module.partition(".")[0]


def modules() -> dict[str, Path]:
    """Return the modules of the package by their names inside it; a package goes by its own name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "examples":  # travels with an installed package, and is none of its modules
            continue
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = file
    return found


def imports(module: str, file: Path) -> set[str]:
    """Return what a module imports: `.name` for what is in the package, other names as they are."""
    package = ["aibind_postgres", *module.split(".")]
    if file.name != "__init__.py" or module == "__init__":
        package.pop()
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])])
            if not node.level:
                base = node.module or ""
            # `from . import errors` imports a module, `from .errors import X` a name in one.
            whole = base == "aibind_postgres"
            found |= {f"{base}.{alias.name}" if whole else base for alias in node.names}
    inside = {name for name in found if name.split(".")[0] == "aibind_postgres"}
    own = {name.partition(".")[2] for name in inside}
    return (found - inside) | {f".{place(name)}" if place(name) in PLACES else ".__init__" for name in own}


MODULES = modules()
PLACES = {place(module) for module in MODULES}
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
IMPORTS = [(module, imported) for module, file in MODULES.items() for imported in imports(module, file)]


def test_every_module_has_its_place() -> None:
    assert PLACES - RANKS.keys() == set()


def test_imports_go_downwards() -> None:
    upwards = [(module, name) for module, name in IMPORTS if name[0] == "." and RANKS[name[1:]] > RANKS[place(module)]]
    assert upwards == []


def test_what_stands_apart_does_not_meet() -> None:
    pairs = {frozenset(pair) for pair in APART}
    assert [(module, name) for module, name in IMPORTS if frozenset((place(module), name[1:])) in pairs] == []


def test_the_core_does_not_import_what_is_built_on_it() -> None:
    above = [(module, name) for module, name in IMPORTS if name in (".contrib", ".cli")]
    assert [(module, name) for module, name in above if place(module) != name[1:]] == []


def test_the_paired_primitives_need_the_standard_library_only() -> None:
    names = {name.partition(".")[0] for module, name in IMPORTS if module == "_concurrency"}
    assert names <= sys.stdlib_module_names


def test_asyncio_stays_out_of_what_is_converted() -> None:
    assert [module for module, name in IMPORTS if name.startswith("asyncio") and place(module) == "_async"] == []
