"""Splitting SQL into commands."""

from __future__ import annotations

import pytest

from aibind_postgres._sql_commands import split_commands


@pytest.mark.parametrize(
    ("sql", "commands"),
    [
        ("", []),
        (" ;\n; -- nothing", []),
        ("SELECT 1; SELECT 2", ["SELECT 1", "SELECT 2"]),
        ("-- it's; a comment\nSELECT 1;", ["SELECT 1"]),
        ("SELECT 1, -- one; \n 2;", ["SELECT 1, \n 2"]),
        ("SELECT ';', 'it''s; --';SELECT 2", ["SELECT ';', 'it''s; --'", "SELECT 2"]),
        (r"SELECT E'\';', '\';SELECT 2", [r"SELECT E'\';', '\'", "SELECT 2"]),
        ('DROP TABLE "a"";--$$"; SELECT 2', ['DROP TABLE "a"";--$$"', "SELECT 2"]),
        ("DO $$ BEGIN; -- $a$\n END $$; SELECT 2", ["DO $$ BEGIN; -- $a$\n END $$", "SELECT 2"]),
        ("DO $a$ ; $b$ ' $$ ; $a$; SELECT $1", ["DO $a$ ; $b$ ' $$ ; $a$", "SELECT $1"]),
    ],
)
def test_commands(sql: str, commands: list[str]) -> None:
    assert split_commands(sql) == commands
