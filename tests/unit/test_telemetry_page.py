"""The tables of docs/telemetry.md are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from aibind_postgres.metrics import INSTRUMENTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "telemetry.md").read_text("utf-8")
LEVELS = {"debug": "DEBUG", "info": "INFO", "warning": "WARNING", "error": "ERROR", "exception": "ERROR"}


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    return [[cell.strip().strip("`") for cell in line.split(" | ")] for line in lines[1:]]


def calls() -> Iterator[tuple[str, str, str]]:
    """Yield the logger, the level and the template of each message of the package."""
    for file in (ROOT / "src" / "aibind_postgres").rglob("*.py"):
        if "_sync" in file.parts:
            continue
        nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
        found = [node for node in nodes if isinstance(node, ast.Call)]
        [*names] = [ast.literal_eval(call.args[0]) for call in found if ast.unparse(call.func) == "logging.getLogger"]
        for call in found:
            name, _, method = ast.unparse(call.func).partition(".")
            if name != "logger":
                continue
            [logger] = names
            if method == "log":
                assert {"WARNING", "DEBUG"} <= {each.attr for each in nodes if isinstance(each, ast.Attribute)}
                yield logger, "WARNING, DEBUG", ast.literal_eval(call.args[1])
            else:
                yield logger, LEVELS[method], ast.literal_eval(call.args[0])


def test_metrics() -> None:
    expected = [
        [name, each.kind, each.unit.strip("{}"), each.attribute or "", each.description]
        for name, each in INSTRUMENTS.items()
    ]
    assert rows("Metrics") == expected


def test_log_messages() -> None:
    table = {(f"aibind_postgres.{logger}", level, message) for logger, level, message, _ in rows("Log messages")}
    assert len(table) == len(rows("Log messages"))
    described = set()
    for logger, level, template in calls():
        prefixes = [row for row in table if row[:2] == (logger, level) and template.startswith(row[2])]
        assert prefixes, (logger, level, template)
        described.add(max(prefixes, key=lambda row: len(row[2])))
    assert described == table
