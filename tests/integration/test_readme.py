"""README's examples run as they stand, and its table of options is complete."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aibind_postgres import (
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    PostgresConversationStore,
    PostgresStreamStore,
)

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
# What the examples print, in their order.
OUTPUTS = {
    "synchronous": "Hello, world!\n",
    "asynchronous": "Hello, world!\n",
    "writer": "done 50\n",
    "conversation": "['Name a colour.', 'Blue.'] 2\n",
    "asynchronous conversation": "Name a town. 1\nName a colour. 0\n",
    "two tabs": "[{'role': 'user', 'content': 'from the other tab'}] 2\n",
    "housekeeping": "",
}
SCRIPTS = [block for block in BLOCKS if block.startswith("import ")]


def test_the_two_commands_are_there() -> None:
    for command in ("pip install '.[cli,embedded]' && aibind-postgres demo", "pip install '.[dev]' && pytest"):
        assert f"\n{command}\n" in README


def test_both_flavours_have_an_example_of_ten_lines() -> None:
    assert [len([line for line in block.splitlines() if line]) for block in SCRIPTS[:2]] == [10, 10]


@pytest.mark.parametrize(
    ("script", "output"),
    list(zip(SCRIPTS, OUTPUTS.values(), strict=True)),
    ids=OUTPUTS,
)
def test_examples_run_as_they_stand(script: str, output: str, database: str) -> None:
    command = [sys.executable, "-W", "error", "-c", script]
    environment = {**os.environ, "DATABASE_URL": database}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == output


@pytest.mark.parametrize("block", BLOCKS)
def test_all_python_in_it_compiles(block: str) -> None:
    compile(block, "README.md", "exec", dont_inherit=True)


@pytest.mark.parametrize(
    "store",
    [PostgresStreamStore, AsyncPostgresStreamStore, PostgresConversationStore, AsyncPostgresConversationStore],
)
def test_the_table_has_every_option_with_its_default(store: type) -> None:
    for option in list(inspect.signature(store).parameters.values())[1:]:
        default = f"{option.default:g}" if isinstance(option.default, float) else repr(option.default)
        default = default.replace("'", '"')
        assert re.search(rf"^\| `{option.name}` \|.*\| `{re.escape(default)}` \|", README, re.MULTILINE), option
