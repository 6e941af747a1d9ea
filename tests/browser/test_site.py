"""The documentation site in Chromium: no errors, no request to another host, search, diagrams, small screens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")

from playwright.sync_api import expect
from support import site
from support.site import SitePage

ROOT = Path(__file__).parents[2]
DIAGRAMS = {
    "index.html": 1,
    "concepts.html": 3,
    "architecture.html": 4,
}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return site.build(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def url(folder):
    with site.served(folder) as url:
        yield url


@pytest.fixture
def open_site(browser, url):
    """Open a tab. Each page must load without an error and without a request to another host."""
    opened = []

    def open_site(path, **options):
        opened.append(SitePage(browser, url, **options))
        opened[-1].open(path)
        return opened[-1]

    yield open_site
    for tab in opened:
        tab.context.close()
    assert [tab.errors for tab in opened] == [[]] * len(opened)
    assert [tab.foreign for tab in opened] == [[]] * len(opened)


def test_every_page_loads(open_site, folder):
    tab = open_site("index.html")
    paths = [file.relative_to(folder).as_posix() for file in folder.rglob("*.html")]
    assert len(paths) > 30
    for path in sorted(paths):
        tab.open(path)
        expect(tab.page.locator("h1").first).to_be_visible()


def test_tables_and_lists_are_those_of_the_pages(open_site):
    """Python-Markdown reads some tables and lists in another way than GitHub does."""
    tab = open_site("index.html")
    for file in sorted((ROOT / "docs").glob("*.md")):
        text = re.sub(r"^ *```.*?^ *```", "", file.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        tab.open(f"{file.stem}.html")
        tables = len(re.findall(r"^\|[-:| ]+\|$", text, re.MULTILINE))
        assert tab.page.locator("article table:not(.highlighttable)").count() == tables, file.name
        items = len(re.findall(r"^ *(?:- |\d+\. )", text, re.MULTILINE))
        assert tab.page.locator("article li").count() == items, file.name


def test_search_finds_resume(open_site):
    page = open_site("index.html").page
    page.locator("input.md-search__input").click()
    page.keyboard.type("resume")
    first = page.locator(".md-search-result__item a").first
    expect(first).to_be_visible(timeout=20_000)
    expect(page.locator(".md-search-result__list")).to_contain_text("Resume an answer")
    first.click()
    expect(page.locator("article")).to_contain_text(re.compile("resume", re.IGNORECASE))


@pytest.mark.parametrize("path", DIAGRAMS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_diagrams_are_drawn(open_site, path, scheme):
    widths = open_site(path, color_scheme=scheme).draw_diagrams()
    assert len(widths) == DIAGRAMS[path]
    assert min(widths) > 200


@pytest.mark.parametrize("path", ["index.html", "quickstart.html", "guarantees.html", "reference/streams.html"])
def test_narrow_screen(open_site, path):
    page = open_site(path, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True).page
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator(".md-header label[for=__drawer]").click()
    expect(page.locator(".md-nav--primary a", has_text="FAQ").first).to_be_visible()


def test_reference_has_both_flavours(open_site):
    page = open_site("reference/streams.html").page
    for flavour in ("PostgresStreamStore", "AsyncPostgresStreamStore"):
        for method in ("append", "read_from", "wait", "cleanup"):
            expect(page.locator(f'[id="aibind_postgres.{flavour}.{method}"]')).to_be_visible()


def test_anchors_are_those_of_github(folder):
    html = (folder / "clients.html").read_text("utf-8")
    assert 'id="neon-supabase-vercel-postgres"' in html
