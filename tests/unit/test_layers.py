"""Imports point downwards, type-only imports included; there are no cycles, and no flavour imports the other."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import aibind_postgres

PACKAGE = Path(aibind_postgres.__file__).parent

# From the bottom up, by the first part of a module's name. A module may import lower layers and its own.
LAYERS = [
    {"errors", "_concurrency"},
    {"_json"},
    {"_conninfo", "_sqlstate", "_statement_runner", "_workarounds", "models", "history", "sse", "web"}
    | {"_document", "_merging", "_message_tree", "_telemetry", "_turns", "metrics", "wire"}
    | {
        "_encoded_events",
        "_partial_json",
        "_ui_encoder",
        "_ui_message",
        "_ui_turns",
        "_ui_message_chunks",
        "_ui_message_tools",
    },
    {
        "_archive",
        "_arguments",
        "_conversation_sql",
        "_deletion",
        "_distributed",
        "_housekeeping",
        "_leases",
        "_notifications",
        "_notify_pace",
        "_pages",
        "_partitions",
        "_poll_pace",
        "_replica",
        "_sql",
        "_sql_commands",
        "_stream_list",
        "_stream_tail",
        "_time_partition_sql",
        "_time_partitions",
    }
    | {"_followed_stream", "_lifecycle", "_subscriptions", "_tables", "_write_buffer"},
    {"_async", "_sync"},
    {"schema", "adapters", "embedded", "sources"},
    {"__init__"},
    {"cli", "pytest_plugin"},
    {"contrib"},  # runs the commands
]

# The same inside `_async`.
ASYNC_LAYERS = [
    {"connections", "source"},
    {"client"},
    {"psycopg_clients"},
    {"database"},
    {"combining", "columns", "sending"},
    {"notifying", "stream_schema", "conversation_schema"},
    {"archiving", "deleting", "readiness", "replica"},
    {"observed_store"},
    {"reading"},
    {"appending", "leasing", "conversation_histories"},
    {"listening"},
    {"following"},
    {"stream_writer", "stream_reads", "time_partitions"},
    {"stream_lifecycle"},
    {"stream_store", "conversation_store"},
    {"producing", "housekeeping", "event_stream"},
    {"durable_stream", "event_bodies", "plain_text", "responses"},
    {"access", "running_answers"},
    {"turns"},
    {"conversation_routes"},
    {"web_handler"},
    {"handler", "ag_ui_handler", "ai_sdk_handler"},
]

# In the same layer, but never imported by each other.
APART = [("_async", "_sync"), ("cli", "pytest_plugin"), ("contrib", "pytest_plugin"), ("_concurrency", "errors")]


def top(module: str) -> str:
    """Return the first part of a module's name."""
    return module.partition(".")[0]


def find_modules() -> dict[str, Path]:
    """Return the modules of the package by their names inside it; a package goes by its own name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "examples":  # included in an installed package, but not imported
            continue
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = file
    return found


def absolute_imports(module: str, file: Path) -> set[str]:
    """Return the absolute names of all that a module imports, also for types: modules, or names inside them."""
    package = ["aibind_postgres", *module.split(".")]
    if file.name != "__init__.py" or module == "__init__":
        package.pop()
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            found |= {".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names}
    return found


def inside(name: str) -> str | None:
    """Return the module of the package that an absolute name belongs to, or None."""
    first, _, inner = name.partition(".")
    if first != "aibind_postgres":
        return None
    while inner and inner not in MODULES:
        inner = inner.rpartition(".")[0]
    return inner or "__init__"


def reachable(module: str) -> set[str]:
    found: set[str] = set()
    pending = [module]
    while pending:
        new = GRAPH[pending.pop()] - found
        found |= new
        pending += new
    return found


MODULES = find_modules()
ABSOLUTE = {module: absolute_imports(module, file) for module, file in MODULES.items()}
GRAPH = {
    module: {found for name in names if (found := inside(name)) is not None and found != module}
    for module, names in ABSOLUTE.items()
}
IMPORTS = [(module, imported) for module, found in GRAPH.items() for imported in sorted(found)]
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
ASYNC_RANKS = {name: rank for rank, layer in enumerate(ASYNC_LAYERS) for name in layer}


def test_every_module_has_a_layer() -> None:
    assert {top(module) for module in MODULES} == RANKS.keys()
    assert {module.partition(".")[2] for module in MODULES if module.startswith("_async.")} == ASYNC_RANKS.keys()


def test_imports_go_downwards() -> None:
    assert [pair for pair in IMPORTS if RANKS[top(pair[1])] > RANKS[top(pair[0])]] == []


def test_imports_inside_async_go_downwards() -> None:
    upwards = []
    for module, imported in IMPORTS:
        if module.startswith("_async.") and imported.startswith("_async."):
            pair = module.partition(".")[2], imported.partition(".")[2]
            if ASYNC_RANKS[pair[1]] > ASYNC_RANKS[pair[0]]:
                upwards.append(pair)
    assert upwards == []


def test_no_cycle() -> None:
    reached = {module: reachable(module) for module in MODULES}
    cycles = {frozenset(other for other in reached[module] if module in reached[other]) for module in MODULES}
    assert cycles - {frozenset()} == set()


def test_separate_modules_do_not_import_each_other() -> None:
    pairs = {frozenset(pair) for pair in APART}
    assert [pair for pair in IMPORTS if frozenset(map(top, pair)) in pairs] == []


def test_errors_import_nothing_of_the_package() -> None:
    assert GRAPH["errors"] == set()


def test_core_does_not_import_its_extras() -> None:
    extras = ("contrib", "cli", "pytest_plugin")
    assert [(module, name) for module, name in IMPORTS if top(name) in extras and top(module) not in extras] == []


def test_starlette_integration_does_not_need_fastapi() -> None:
    assert "fastapi" not in {top(name) for name in ABSOLUTE["contrib.starlette"]}


def test_concurrency_imports_the_standard_library_only() -> None:
    assert {top(name) for name in ABSOLUTE["_concurrency"]} <= sys.stdlib_module_names


def test_async_modules_do_not_import_asyncio() -> None:
    importers = [module for module, names in ABSOLUTE.items() if "asyncio" in {top(name) for name in names}]
    assert [module for module in importers if top(module) == "_async"] == []


def test_type_only_imports_are_included() -> None:
    assert "_async.client" in GRAPH["_async.notifying"]
