"""The admin of the app for Django: the text of a stream while it is written, and its stop."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect
from support import django_project, servers
from support.browser import CHROMIUM

from aibind_postgres import PostgresStreamStore, models

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

HOSTILE = "<img src=x onerror=\"document.title='run'\">"


@pytest.fixture(scope="module")
def site(server, tmp_path_factory):
    """The address of the site, and the connection string of its database."""
    with servers.own_database(server, "template0") as dsn:
        project = django_project.write(tmp_path_factory.mktemp("django") / "project")
        django_project.must_manage(project, dsn, "migrate")
        django_project.create_admin(project, dsn)
        with django_project.served(project, dsn) as address:
            yield address, dsn


@pytest.fixture
def page(site, context):
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    django_project.log_in(page, site[0])
    yield page
    assert errors == []


def test_text_grows_and_stop_ends_it(site, page):
    address, dsn = site
    with PostgresStreamStore(dsn) as store:
        store.create("one", session_id="chat")
        store.append("one", "Hello, ")
        page.goto(f"{address}/admin/aibind_postgres/stream/")
        page.get_by_role("link", name="one", exact=True).click()
        text = page.get_by_label("Text of the stream")
        expect(text).to_have_text("Hello, ")
        expect(page.get_by_role("status")).to_have_text("active: chunk 1 of 1")
        store.append("one", models.chunk_text(HOSTILE))
        store.append("one", models.chunk_text(models.StreamEvent("usage", '{"tokens": 7}')))
        expect(text).to_have_text(f'Hello, {HOSTILE}[usage] {{"tokens": 7}}', timeout=20_000)
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_text("Streams stopped: 1.")).to_be_visible()
        expect(page.get_by_role("status")).to_have_text("stopped: chunk 3 of 3")
        expect(page.get_by_role("button", name="Stop")).to_have_count(0)
        assert store.get_status("one").state == "stopped"
    assert page.title() != "run"


def test_long_stream_begins_at_its_last_chunks(site, page):
    address, dsn = site
    with PostgresStreamStore(dsn) as store:
        store.create("long")
        store.append_many("long", [f"{number}\n" for number in range(1, 1201)])
        store.fail("long", "interrupted")
    page.goto(f"{address}/admin/aibind_postgres/stream/long/change/")
    status, text = page.get_by_role("status"), page.get_by_label("Text of the stream")
    expect(status).to_have_text("error: chunk 1200 of 1200: interrupted")
    assert text.text_content().startswith("701\n")
    page.get_by_role("button", name="Show from the beginning").click()
    expect(status).to_have_text("error: chunk 1200 of 1200: interrupted")
    expect(text).to_have_text("".join(f"{number}\n" for number in range(1, 1201)), timeout=20_000)


def test_stream_that_is_deleted(site, page):
    address, dsn = site
    with PostgresStreamStore(dsn) as store:
        store.create("gone")
        page.goto(f"{address}/admin/aibind_postgres/stream/gone/change/")
        expect(page.get_by_role("status")).to_have_text("active: chunk 0 of 0")
        store.delete("gone")
        expect(page.get_by_role("status")).to_have_text("the stream was deleted", timeout=20_000)
