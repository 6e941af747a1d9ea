"""Every block of code in README and in the pages is run by a test, or has a reason why not.

This module runs the fragments of Python, the statements, and the settings that no other test runs. Commands are parsed
by bash, and by the command line of the library.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from configparser import ConfigParser
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psycopg
import pytest
from support.applications import serving
from support.fragments import PROGRAMS
from support.pages import PAGES, Block, blocks_of, find_block

ROOT = Path(__file__).parents[2]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = ("sh", "")  # blocks without a language are commands, too

# The tests that run all other blocks of a page in a language, or those under a heading.
TESTED_ELSEWHERE = {
    ("docs/ag_ui.md", "ts"): "tests/processes/test_ag_ui_client.py",  # as the class of tests/npm/ag_ui_client.mjs
    ("docs/alembic.md", "python"): "tests/processes/test_alembic.py",
    ("docs/command_line.md", "text"): "tests/processes/test_cli_conversations.py",  # compares its form
    ("docs/django.md", "python"): "tests/processes/test_django_page.py",
    ("docs/doctor.md", "sql", "Minimal grants"): "tests/_async/test_grants.py",
    ("docs/export.md", "json"): "tests/processes/test_cli_import.py",
    ("docs/migration.md", "python"): "tests/processes/test_guides.py",
    ("docs/partitions.md", "sh"): "tests/faults/test_moving_to_partitions.py",
    ("docs/partitions.md", "sql"): "tests/faults/test_moving_to_partitions.py",
    ("docs/quickstart.md", "python", "Applications"): "tests/integration/test_readme.py",
    ("README.md", "python"): "tests/integration/test_readme.py",
    ("docs/replicas.md", "sql"): "tests/faults/test_replica_guide.py",
    ("docs/replicas.md", ""): "tests/faults/test_replica_guide.py",
    ("docs/scale.md", "sql"): "tests/integration/test_scale_queries.py",
    ("docs/security.md", "sql"): "tests/processes/test_security_page.py",
    ("docs/security.md", "ini"): "tests/processes/test_security_page.py",
    ("docs/security.md", ""): "tests/processes/test_security_page.py",
    ("docs/security.md", "python", "Row-level security"): "tests/processes/test_security_page.py",
    ("docs/sources.md", "python", "scripts"): "tests/processes/test_sources.py",
    ("docs/testing.md", "python"): "tests/processes/test_pytest_plugin.py",
    ("docs/usechat.md", "python"): "tests/processes/test_guides.py",
    ("docs/usechat.md", "js"): "tests/processes/test_guides.py",
    ("docs/usechat.md", "jsx"): "tests/processes/test_guides.py",
}

# The blocks that no test runs.
REASONS = {
    ("docs/citus.md", "CREATE EXTENSION citus;  -- on each node, in a database of the same name"): "needs a cluster",
    (
        "docs/command_line.md",
        "aibind-postgres: cannot connect to PostgreSQL: Connection refused (host db.internal, port 5432, database app)",
    ): "an error text",
    ("docs/migration.md", "// app/api/chat/route.ts"): "the application before the change, shortened",
    (
        "docs/operations.md",
        'housekeeping of "aibind_stream_status": abandoned streams ended: 2, streams deleted: 31, chunks deleted: 8120',
    ): "a line of a log; tests/_async/test_housekeeping.py compares its form",
}


def keys_of(block: Block) -> list[tuple[str, ...]]:
    return [(block.page, block.language), (block.page, block.language, block.heading)]


def program_of(block: Block) -> str | None:
    """Return the program around a fragment, if it has one."""
    page = block.page.removeprefix("docs/")
    same = [each for each in BLOCKS if (each.page, each.first_line) == (block.page, block.first_line)]
    return PROGRAMS.get((page, block.first_line)) or PROGRAMS.get((page, block.first_line, same.index(block)))


def how_tested(block: Block) -> str | None:
    """Return the way in which a block is tested, or None."""
    if (block.page, block.first_line) in REASONS:
        return "a reason"
    if block.language == "mermaid":
        return "tests/browser/test_site.py"
    if block.language == "python" and program_of(block) is not None:
        return "a program"
    if block.language == "python" and block.page == "docs/sources.md" and "environ" in block.code:
        return TESTED_ELSEWHERE["docs/sources.md", "python", "scripts"]
    if block.language == "python" and block.page != "docs/sources.md" and block.code.startswith("import "):
        return "tests/integration/test_readme.py"
    for key in keys_of(block):
        if key in TESTED_ELSEWHERE:
            return TESTED_ELSEWHERE[key]
    if block.language in SHELL:
        return "commands"
    if (block.page, block.first_line) in OWN_TESTS:
        return "a test of this module"
    return None


OWN_TESTS = {
    ("docs/command_line.md", "[Unit]"),
    ("docs/deployment.md", "# gunicorn.conf.py"),
    ("docs/deployment.md", "upstream application {"),
    ("docs/doctor.md", "REVOKE ALL ON aibind_stream_chunks FROM anon, authenticated;"),
    ("docs/export.md", "UPDATE aibind_stream_status"),
    ("docs/http.md", "async function ask(prompt) {"),
    (
        "docs/migration.md",
        'const response = await fetch("/ask", { method: "POST", headers, body: JSON.stringify({ prompt }) });',
    ),
    (
        "docs/operations.md",
        "GRANT SELECT ON aibind_stream_chunks_archive TO app;           -- to read, append to and delete streams",
    ),
    ("docs/runbook.md", "SELECT pid, usename, now() - xact_start AS age, state, left(query, 60) AS query"),
}


def test_every_block_is_tested() -> None:
    assert [str(block) for block in BLOCKS if how_tested(block) is None] == []


def test_no_entry_is_left_over() -> None:
    places = {(block.page, block.first_line) for block in BLOCKS}
    assert {*REASONS, *OWN_TESTS} - places == set()
    assert [key for key in PROGRAMS if (f"docs/{key[0]}", key[1]) not in places] == []
    known = {key for block in BLOCKS for key in keys_of(block)} | {("docs/sources.md", "python", "scripts")}
    assert TESTED_ELSEWHERE.keys() - known == set()
    assert [file for file in TESTED_ELSEWHERE.values() if not (ROOT / file).exists()] == []


# Python

FRAGMENTS = [block for block in BLOCKS if block.language == "python" and how_tested(block) == "a program"]


def fill(program: str, fragment: str) -> str:
    """Put a fragment in the place of `BLOCK`, with its indentation."""
    [indentation] = re.findall(r"^( *)BLOCK$", program, re.MULTILINE)
    return program.replace(f"{indentation}BLOCK\n", textwrap.indent(fragment, indentation))


@pytest.mark.parametrize("block", FRAGMENTS, ids=str)
def test_fragments_run(block: Block, database: str, tmp_path: Path) -> None:
    program = program_of(block)
    assert program is not None
    if "pydantic_ai" in program + block.code:
        pytest.importorskip("pydantic_ai")
    file = tmp_path / "program.py"
    file.write_text(fill(program, block.code), "utf-8")
    environment = {**os.environ, "DATABASE_URL": database, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    # Warnings of other packages, such as of TestClient, are not those of the fragment.
    command = [sys.executable, "-W", "error:::__main__", str(file)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Commands

COMMANDS = [block for block in BLOCKS if how_tested(block) == "commands"]


def parse(words: list[str]) -> None:
    """Parse a command of the library, and raise if it or an option is unknown."""
    from typer.main import get_command

    from aibind_postgres.cli.app import app

    command: Any = get_command(app)
    if words[0].startswith("-"):
        assert words[0] in {option for parameter in command.params for option in parameter.opts}
        return
    context = command.make_context("aibind-postgres", [], resilient_parsing=True)
    while hasattr(command, "get_command"):
        name, *words = words
        command = command.get_command(context, name)
        assert command is not None, name
    command.make_context(name, words)


def simple_commands(code: str) -> list[list[str]]:
    """Return the words of each simple command, without redirections, assignments and the times of cron."""
    code = re.sub(r" [<>] \S+|^\w+=.*$|^\*\S* [*\d]+ [*\d]+ [*\d]+ [*\d]+ ", "", code, flags=re.MULTILINE)
    lexer = shlex.shlex(code.replace("\\\n", " "), posix=True, punctuation_chars="|&\n")
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&\n"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [words for words in commands if words]


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_commands_are_known(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.code, check=True, text=True)
    for program, *words in simple_commands(block.code):
        if Path(program).name == "aibind-postgres":
            parse(words)
        elif program in ("uvicorn", "gunicorn"):
            done = subprocess.run([sys.executable, "-m", program, "--help"], capture_output=True, text=True, check=True)
            assert [word for word in words if word.startswith("--") and word not in done.stdout] == []
        else:
            known = ("pip", "python", "python3", ".", "docker", "export", "curl", "psql", "openssl", "printf", "chmod")
            assert program in (*known, "nox", "pytest", "cmp", "jq", "django-admin"), program


def test_an_unknown_option_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["migrate", "--partition-count", "16"])


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_requests_of_curl(page: str, database: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    (tmp_path / "main.py").write_text(find_block("quickstart.md", "Applications", "python"), "utf-8")
    [block] = [block for block in blocks_of(page) if block.first_line.startswith("curl ")]
    with serving(f"uvicorn --app-dir={tmp_path} --port={{port}} main:app", database) as url:
        stream_id, outputs = "", []
        for line in block.code.replace("http://127.0.0.1:8000", url).splitlines():
            command = line.replace("=ID&", f"={stream_id}&").replace('"ID"', f'"{stream_id}"')
            # Older versions of curl do not have --json.
            command = command.replace("--json", "-H 'Content-Type: application/json' -d")
            outputs.append(subprocess.run(["bash", "-c", f"{command} -sS"], capture_output=True, text=True, check=True))
            stream_id = stream_id or outputs[0].stdout.partition("data: ")[2].partition("\n")[0]
        started, resumed, stopped = (output.stdout for output in outputs)
    assert "data: You " in started
    assert "data: You " not in resumed
    assert "data: Hello " in resumed
    assert stopped.strip().replace(" ", "") == '{"ok":true}'


# SQL


STATEMENTS = [block for block in BLOCKS if how_tested(block) == "a test of this module" and block.language == "sql"]


@pytest.mark.parametrize("block", STATEMENTS, ids=str)
def test_statements(block: Block, database: str) -> None:
    names = [name for name in ("app", "anon", "authenticated") if re.search(rf"\b{name}\b", block.code)]
    with psycopg.connect(database, autocommit=False) as admin:  # rolled back, since roles belong to the whole server
        for name in names:
            admin.execute(f"CREATE ROLE {name}")
        for statement in filter(str.strip, block.code.split(";")):
            admin.execute(statement)
        admin.rollback()


# Settings


def test_settings_of_gunicorn(database: str, tmp_path: Path) -> None:
    settings = find_block("deployment.md", "Servers", "python")
    (tmp_path / "gunicorn.conf.py").write_text(settings.replace('bind = "0.0.0.0:8000"\n', ""), "utf-8")
    flask = find_block("quickstart.md", "Applications", "python", 2)
    (tmp_path / "main.py").write_text(flask, "utf-8")
    command = f"gunicorn --config={tmp_path}/gunicorn.conf.py --chdir={tmp_path} --bind=127.0.0.1:{{port}} main:app"
    with serving(command, database) as url:
        body = b'{"prompt": "Hello"}'
        request = Request(f"{url}/__aibind__/stream", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=30) as response:
            assert b"data: Hello " in response.read()


def test_options_of_uvicorn(database: str, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(find_block("quickstart.md", "Applications", "python"), "utf-8")
    command = find_block("deployment.md", "Servers", "sh").strip()
    command = command.replace("--host 0.0.0.0 --port 8000", f"--app-dir {tmp_path} --port {{port}}")
    assert "{port}" in command
    with serving(command, database) as url:
        body = b'{"prompt": "Hello"}'
        request = Request(f"{url}/__aibind__/stream", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=30) as response:
            assert b"data: Hello " in response.read()


def nginx_statements(text: str) -> list[str]:
    """Return the names of all directives, and check the braces and the semicolons."""
    depth, names = 0, []
    for line in filter(None, map(str.strip, text.splitlines())):
        assert line[-1] in "{};", line
        depth += line.count("{") - line.count("}")
        assert depth >= 0
        if line != "}":
            names.append(line.split()[0])
    assert depth == 0
    return names


def test_settings_of_nginx(tmp_path: Path) -> None:
    settings = find_block("deployment.md", "Proxies", "nginx")
    assert Counter(nginx_statements(settings))["proxy_set_header"] == 3
    if (nginx := shutil.which("nginx")) is None:
        pytest.skip("nginx is not installed: the settings were only parsed")
    file = tmp_path / "nginx.conf"
    file.write_text(f"events {{}}\nhttp {{\n{settings}}}\n", "utf-8")
    subprocess.run([nginx, "-t", "-q", "-c", str(file), "-g", f"pid {tmp_path}/pid; error_log stderr;"], check=True)


def test_unit_of_systemd() -> None:
    [block] = [block for block in blocks_of("docs/command_line.md") if block.language == "ini"]
    unit = ConfigParser(interpolation=None)
    unit.read_string(block.code)
    assert unit.sections() == ["Unit", "Service", "Install"]
    [(program, *words)] = simple_commands(unit["Service"]["ExecStart"])
    assert program.endswith("/bin/aibind-postgres")
    parse(words)


# JavaScript


@pytest.mark.parametrize("page", ["http.md", "migration.md"])
def test_scripts_for_browsers_are_valid(page: str, tmp_path: Path) -> None:
    if (node := shutil.which("node")) is None:
        pytest.skip("needs Node.js")
    for number, block in enumerate(blocks_of(f"docs/{page}")):
        if block.language == "js":
            file = tmp_path / f"{number}.mjs"
            file.write_text(block.code, "utf-8")
            subprocess.run([node, "--check", str(file)], check=True)
