"""Hooks of mkdocs: pages of the site that are outside of docs/, and links that leave docs/.

The pages are read on GitHub, too, so their links are relative paths in the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
GITHUB = "https://github.com/aibind/aibind-postgres"

# Files outside of docs/ that are part of the site, and their paths in docs/.
ADDED = {
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results.svg": "results.svg",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": None,  # the home page has the same contents
}
SOURCES = {target: source for source, target in ADDED.items() if target}

_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_CODE_OR_LINK = re.compile(r"`[^`\n]*`|\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are outside of docs/."""
    for target, source in SOURCES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Change the links of a page: from paths in the repository to pages of the site or addresses on GitHub."""
    path = page.file.src_uri
    source = SOURCES.get(path, f"docs/{path}")
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_with_site_links(markdown[end : fence.start()], source, path), fence[0]]
        end = fence.end()
    return "".join([*parts, _with_site_links(markdown[end:], source, path)])


def _with_site_links(text: str, source: str, path: str) -> str:
    return _CODE_OR_LINK.sub(lambda match: f"]({site_link(match[1], source, path)})" if match[1] else match[0], text)


def site_link(link: str, source: str, path: str) -> str:
    """Return a link of the file `source` of the repository, for the page `path` of the site.

    Raises:
        PluginError: The link names a file that does not exist.
    """
    if re.match(r"[a-z]+:|#", link):
        return link
    target, separator, anchor = link.partition("#")
    name = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if ADDED.get(name, name) is None:
        name, separator, anchor = "docs/index.md", "", ""
    if name in ADDED or name.startswith("docs/"):
        page = ADDED.get(name) or name.removeprefix("docs/")
        return posixpath.relpath(page, posixpath.dirname(path) or ".") + separator + anchor
    if not (ROOT / name).exists():
        raise PluginError(f"{source} links to {link}, which does not exist")
    kind = "tree" if (ROOT / name).is_dir() else "blob"
    return f"{GITHUB}/{kind}/main/{name}{separator}{anchor}"
