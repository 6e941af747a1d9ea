"""README and the pages in docs: examples run unchanged, tables of options are complete, links resolve."""

from __future__ import annotations

import inspect
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

import aibind_postgres
from aibind_postgres import (
    AibindError,
    AiSdkHandler,
    AsyncAiSdkHandler,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    PostgresConversationStore,
    PostgresStreamStore,
    StreamHandler,
)
from aibind_postgres.sse import EventParser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
DOCS = {file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in sorted((ROOT / "docs").rglob("*.md"))}
PAGES = {"README.md": README, **DOCS}
OTHER_PAGES = ["CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]
LINKING = {**PAGES, **{name: (ROOT / name).read_text("utf-8") for name in OTHER_PAGES}}


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


BLOCKS = [pytest.param(name, block, id=name) for name, text in PAGES.items() for block in python_blocks(text)]

# The output of each script, in the order of the pages and of the scripts in a page.
OUTPUTS = {
    "docs/conversations.md": {
        "conversation": "['Name a colour.', 'Blue.'] 2\n",
        "asynchronous conversation": "Name a town. 1\nName a colour. 0\n",
        "two tabs": "[{'role': 'user', 'content': 'from the other tab'}] 2\n",
        "list of conversations": "chat 2 None None\nchat 1 None None\nchat 0 Colours None\n",
    },
    "docs/howto.md": {
        "resume": "['!']\n",
        "stop": "stopped after token 0 \n",
        "worker": "done\nYou asked: Hello \n",
        "branches": "Blue. 2 of 2\nRed.\n",
    },
    "docs/operations.md": {
        "housekeeping": "",
    },
    "docs/quickstart.md": {
        "asynchronous program": "1 message You \n2 message asked: \n3 message Hello \ndone\n",
        "script": "1 message You \n2 message asked: \n3 message Hello \n",
    },
    "docs/replicas.md": {
        "with a replica": "Hello, world\n",
        "on a standby": "",
    },
    "docs/runbook.md": {
        "ending the streams of a user": "",
    },
    "docs/streams.md": {
        "synchronous": "Hello, world!\n",
        "asynchronous": "Hello, world!\n",
        "text and named events": "Hello, world!\n",
        "writer": "done 50\n",
    },
    "docs/telemetry.md": {
        "views": "(0, 0)\n",
        "levels of loggers": "",
    },
}
QUICK_START = DOCS["docs/quickstart.md"]
APPLICATION_BLOCKS = python_blocks(QUICK_START.partition("\n## Applications\n")[2].partition("\n## ")[0])
SCRIPTS = {
    name: [block for block in python_blocks(text) if block.startswith("import ") and block not in APPLICATION_BLOCKS]
    for name, text in DOCS.items()
}

# The file that each application of the quick start is saved as, and the command that serves it.
APPLICATIONS = {
    "FastAPI": ("main.py", "uvicorn --port={port} main:app"),
    "Starlette": ("main.py", "uvicorn --port={port} main:app"),
    "Flask": ("main.py", "gunicorn --threads=100 --bind=127.0.0.1:{port} main:app"),
    "Django": ("urls.py", "uvicorn --port={port} mysite:application"),
}
DJANGO_PROJECT = """
import os

import django.conf
from django.core.asgi import get_asgi_application
from psycopg.conninfo import conninfo_to_dict

server = conninfo_to_dict(os.environ["DATABASE_URL"])
database = {"ENGINE": "django.db.backends.postgresql", "NAME": server.pop("dbname"), "OPTIONS": server}
django.conf.settings.configure(
    ROOT_URLCONF="urls", ALLOWED_HOSTS=["*"], SECRET_KEY="-", USE_TZ=True, DATABASES={"default": database}
)
application = get_asgi_application()
"""


def test_readme_fits_a_few_screens() -> None:
    lines = README.splitlines()
    assert len(lines) <= 220
    assert [line for line in lines if len(line) > 120] == []


def test_readme_has_the_two_commands() -> None:
    for command in ("pip install '.[cli,embedded]' && aibind-postgres demo", "pip install '.[dev]' && pytest"):
        assert f"\n{command}\n" in README


def test_home_page_links_every_page() -> None:
    assert "](docs/index.md)" in README
    targets = [os.path.relpath(ROOT / name, ROOT / "docs") for name in [*DOCS, *OTHER_PAGES]]
    assert [target for target in targets if f"]({target})" not in DOCS["docs/index.md"]] == ["index.md"]


def test_both_flavours_have_an_example_of_ten_lines() -> None:
    scripts = SCRIPTS["docs/streams.md"][:2]
    assert [len([line for line in block.splitlines() if line]) for block in scripts] == [10, 10]


def test_every_script_has_an_expected_output() -> None:
    expected = {name: len(OUTPUTS.get(name, {})) for name in DOCS}
    assert {name: len(scripts) for name, scripts in SCRIPTS.items()} == expected


@pytest.mark.parametrize(
    ("script", "output"),
    [
        pytest.param(script, output, id=example)
        for name, outputs in OUTPUTS.items()
        for script, (example, output) in zip(SCRIPTS[name], outputs.items(), strict=True)
    ],
)
def test_scripts_run_unchanged(script: str, output: str, database: str) -> None:
    command = [sys.executable, "-W", "error", "-c", script]
    environment = {**os.environ, "DATABASE_URL": database, "REPLICA_URL": database}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == output


@contextmanager
def served(command: str, folder: Path, database: str) -> Iterator[int]:
    """Serve an application from a folder and yield its port."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(folder), *sys.path])
    environment = {**os.environ, "DATABASE_URL": database, "PYTHONPATH": path}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command.format(port=port).split()],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            yield port
        finally:
            process.terminate()
            process.wait(30)


def connection_to(port: int) -> HTTPConnection:
    """Connect to a server as soon as it accepts connections."""
    deadline = time.monotonic() + 60
    while True:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.connect()
        except OSError:
            assert time.monotonic() < deadline, "the server accepts no connection"
            time.sleep(0.05)
        else:
            return connection


def test_readme_has_the_first_application() -> None:
    assert python_blocks(README) == APPLICATION_BLOCKS[:1]
    assert len(APPLICATION_BLOCKS) == len(APPLICATIONS)


@pytest.mark.parametrize("framework", APPLICATIONS)
def test_applications_answer(framework: str, database: str, tmp_path: Path) -> None:
    name, command = APPLICATIONS[framework]
    block = APPLICATION_BLOCKS[list(APPLICATIONS).index(framework)]
    (tmp_path / name).write_text(block, "utf-8")
    (tmp_path / "mysite.py").write_text(DJANGO_PROJECT, "utf-8")
    with served(command, tmp_path, database) as port, closing(connection_to(port)) as connection:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", "/__aibind__/stream", json.dumps({"prompt": "Hello"}), headers)
        response = connection.getresponse()
        assert response.status == 200, (tmp_path / "log").read_text("utf-8")
        events = list(EventParser().feed(response.read()))
    assert [event.data for event in events if event.event == "message"] == ["You ", "asked: ", "Hello "]
    assert events[-1].event == "done"


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_python_blocks_compile(name: str, block: str) -> None:
    compile(block, name, "exec", dont_inherit=True)


@pytest.mark.parametrize(
    "store",
    [PostgresStreamStore, AsyncPostgresStreamStore, PostgresConversationStore, AsyncPostgresConversationStore],
)
def test_store_options_and_defaults_are_documented(store: type) -> None:
    for option in list(inspect.signature(store).parameters.values())[1:]:
        default = f"{option.default:g}" if isinstance(option.default, float) else repr(option.default)
        default = default.replace("'", '"')
        row = rf"^\| `{option.name}` \|.*\| `{re.escape(default)}` \|"
        assert re.search(row, DOCS["docs/operations.md"], re.MULTILINE), option


@pytest.mark.parametrize(
    ("handler", "page"),
    [
        (StreamHandler, "docs/http.md"),
        (AsyncStreamHandler, "docs/http.md"),
        (AiSdkHandler, "docs/usechat.md"),
        (AsyncAiSdkHandler, "docs/usechat.md"),
    ],
)
def test_handler_options_are_documented(handler: type, page: str) -> None:
    for option in list(inspect.signature(handler).parameters)[1:]:
        assert f"\n| `{option}` |" in DOCS[page], option


def test_errors_are_documented() -> None:
    family = [error for error in vars(aibind_postgres).values() if isinstance(error, type)]
    names = {error.__name__ for error in family if issubclass(error, AibindError) and error is not AibindError}
    assert names == set(re.findall(r"^\| `(\w+Error)` \|", DOCS["docs/operations.md"], re.MULTILINE))


def test_modules_are_documented() -> None:
    package = Path(aibind_postgres.__file__).parent
    modules = {file.stem for file in package.rglob("*.py") if not {"_sync", "examples"} & set(file.parts)}
    rows = re.findall(r"^\| (`.*?`) \|", DOCS["docs/architecture.md"], re.MULTILINE)
    described = {name.rpartition(".")[2] for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert modules - {"__main__"} - described == set()


def prose_of(text: str) -> str:
    """Return a page without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", LINKING)
def test_links_resolve(name: str) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(LINKING[name])):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / Path(name).parent / path if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors_of(file.read_text("utf-8"))):
            broken.append(target)
    assert broken == []


def test_named_files_exist() -> None:
    paths = [
        (name, path)
        for name, text in LINKING.items()
        for path in re.findall(r"`((?:tests|scripts|examples|src|sql)/[\w./]+)`", text)
    ]
    generated = re.compile(r"/_sync/")
    assert [(name, path) for name, path in paths if not generated.search(path) and not (ROOT / path).exists()] == []
