"""The blocks of code of README and of the pages."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
NAMES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"]
PAGES = [*NAMES, *(file.relative_to(ROOT).as_posix() for file in sorted((ROOT / "docs").rglob("*.md")))]


class Block(NamedTuple):
    """One block of code, without its fences and its indentation."""

    page: str
    line: int
    heading: str  # of the second level
    language: str
    code: str

    @property
    def first_line(self) -> str:
        return self.code.partition("\n")[0]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of a page, in order."""
    blocks, heading, language, lines, begin = [], "", None, [], 0
    for number, line in enumerate((ROOT / page).read_text("utf-8").splitlines(), 1):
        fence = line.lstrip()
        if language is not None and fence == "```":
            blocks.append(Block(page, begin, heading, language, textwrap.dedent("\n".join(lines) + "\n")))
            language = None
        elif language is not None:
            lines.append(line)
        elif fence.startswith("```"):
            language, lines, begin = fence[3:], [], number
        elif line.startswith("## "):
            heading = line[3:]
    return blocks


def find_block(page: str, heading: str, language: str, number: int = 0) -> str:
    """Return the code of a block in a section of a page in docs/."""
    found = [block for block in blocks_of(f"docs/{page}") if (block.heading, block.language) == (heading, language)]
    return found[number].code
