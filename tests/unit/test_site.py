"""The documentation site: its pages, the API reference, and the copy of mermaid. `nox -s docs` builds it."""

from __future__ import annotations

import hashlib
import itertools
import re
from pathlib import Path

import aibind_postgres

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {file.relative_to(DOCS).as_posix(): file.read_text("utf-8") for file in sorted(DOCS.rglob("*.md"))}
OUTSIDE = {"benchmarks.md", "changelog.md", "contributing.md"}  # scripts/site_hooks.py adds them


def test_every_page_is_in_the_navigation_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    assert sorted(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == sorted({*PAGES, *OUTSIDE})


def test_every_public_name_is_in_the_reference_once() -> None:
    names = [
        name
        for page, text in PAGES.items()
        if page.startswith("reference/")
        for name in re.findall(r"^::: aibind_postgres\.([A-Z]\w+|wrap_\w+)$", text, re.MULTILINE)
    ]
    assert sorted(names) == sorted(aibind_postgres.__all__)


def test_nested_blocks_are_indented_by_four_spaces() -> None:
    """GitHub also accepts two or three, but the site shows such a block outside of its list."""
    wrong = []
    for page, text in PAGES.items():
        is_code, before = False, ""
        for number, line in enumerate(text.splitlines(), 1):
            if re.match(r" {1,3}(```|- |\d+\. )", line) or (re.match(r" {1,3}\S", line) and not before and not is_code):
                wrong += [(page, number)] * (not is_code)
            is_code ^= line.lstrip().startswith("```")
            before = line
    assert wrong == []


def test_lists_begin_after_an_empty_line() -> None:
    """On GitHub a list may follow a paragraph directly, but not on the site."""
    item = re.compile(r"(- |\d+\. )")
    wrong = []
    for page, text in PAGES.items():
        lines = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
        for before, line in itertools.pairwise(lines):
            if item.match(line) and before and not item.match(before) and not before.startswith(" "):
                wrong.append((page, line))
    assert wrong == []


def test_mermaid_is_an_unchanged_copy() -> None:
    [digest] = re.findall(r"[0-9a-f]{64}", (DOCS / "assets" / "versions.txt").read_text("utf-8"))
    assert hashlib.sha256((DOCS / "assets" / "mermaid.tiny.js").read_bytes()).hexdigest() == digest
