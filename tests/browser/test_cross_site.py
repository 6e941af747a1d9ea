"""Pages of another origin in Chromium: their requests reach no route."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support import servers
from support.browser import CHROMIUM, Demo, chromium

from aibind_postgres import ChatHistory, PostgresConversationStore, PostgresStreamStore

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

# A page may send these requests to any origin, except for the last two: their methods need the server's permission.
SCRIPT = """
async ({url, id}) => {
  const body = JSON.stringify({ prompt: "attack", id });
  for (const type of ["text/plain", "application/x-www-form-urlencoded"]) {
    for (const path of ["/stream", "/stream/stop"]) {
      await fetch(url + path, { method: "POST", mode: "no-cors", credentials: "include",
                                headers: { "Content-Type": type }, body });
    }
  }
  await fetch(url + "/stream", { method: "POST", mode: "no-cors", body: new Blob([body]) });
  await fetch(`${url}/stream/resume?id=${id}`, { mode: "no-cors" });
  await fetch(`${url}/conversations`, { mode: "no-cors", credentials: "include" });
  let sent = 0;
  for (const method of ["PATCH", "DELETE"]) {
    await fetch(`${url}/conversations/kept`, { method, credentials: "include" }).then(() => sent++, () => {});
  }
  return sent;
}
"""


@pytest.fixture
def other_site() -> Iterator[int]:
    """The port of a server with an empty page."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"], ids=["cross-site", "same-site"])
@pytest.mark.parametrize("framework", ["fastapi", "flask", "django"])
def test_page_of_another_origin_is_refused(
    server: str, template: str, other_site: int, framework: str, host: str
) -> None:
    statuses: list[int] = []
    with (
        servers.own_database(server, template) as dsn,
        Demo(framework, dsn) as demo,
        PostgresStreamStore(dsn) as store,
        PostgresConversationStore(dsn) as conversations,
        chromium() as browser,
    ):
        id = store.create()
        page = browser.new_page()
        page.goto(demo.url)
        [cookie] = page.context.cookies()
        conversations.save("kept", ChatHistory(), owner=cookie["value"])
        page.goto(f"http://{host}:{other_site}/")
        page.on("response", lambda response: statuses.append(response.status))
        assert page.evaluate(SCRIPT, {"url": f"{demo.url}__aibind__", "id": id}) == 0
        assert statuses == [403] * 7
        assert conversations.get_info("kept") is not None
        assert [status.id for status in store.list()] == [id]
        assert store.get_status(id).state == "active"
        page.goto(demo.url)
        page.evaluate(
            "id => fetch('/__aibind__/stream/stop', { method: 'POST', body: JSON.stringify({ id }),"
            " headers: { 'Content-Type': 'application/json' } })",
            id,
        )
        assert store.get_status(id).state == "stopped"
