"""The chat examples without a browser: the model, the routes with the page's cookie, and `demo --web`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPCookieProcessor, OpenerDirector, Request, build_opener, urlopen

import pytest
from support.browser import Demo

from aibind_postgres import PostgresStreamStore
from aibind_postgres.sse import EventParser

JSON = {"Content-Type": "application/json"}
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

PROGRAM = """
import asyncio, sys
from types import SimpleNamespace
from shared import model

MESSAGES = [{"role": "user", "content": "Why {so}\\n*now*?"}, {"role": "assistant", "content": "Because."}]
kind, regenerate = sys.argv[1], len(sys.argv) > 2
messages = MESSAGES if kind == "title" else MESSAGES[:1]
generation = SimpleNamespace(kind=kind, messages=messages, body={"regenerate": regenerate})

async def collect():
    return [token async for token in model.async_generate(generation)]

tokens = list(model.generate(generation))
assert asyncio.run(collect()) == tokens
sys.stdout.write("|".join(tokens))
"""


def run_model(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Print the tokens of an answer or a title, after a check that both flavours yield the same ones."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *(arguments or ["stream"])],
        cwd=EXAMPLES,
        env={**inherited, "AIBIND_DEMO_DELAY": "0", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


def test_stand_in_yields_its_text() -> None:
    tokens = run_model().stdout.split("|")
    # Markdown shows the question literally.
    assert "".join(tokens).startswith("You wrote: “Why {so} \\*now\\*?”\n\nThis is a fixed text")
    assert "\n```js\n" in "".join(tokens)
    assert len(tokens) > 150
    again = run_model("stream", "regenerate").stdout.replace("|", "")
    assert again.replace("*This is another answer to the same question.*\n\n", "") == "".join(tokens) != again


def test_title_of_the_stand_in_is_the_question() -> None:
    assert run_model("title").stdout == "Why {so} *now*?"


@pytest.mark.parametrize("delay", ["soon", "-1", "nan", "inf"])
def test_invalid_delay_is_reported(delay: str) -> None:
    assert "AIBIND_DEMO_DELAY must be a number of seconds" in run_model(AIBIND_DEMO_DELAY=delay).stderr


@contextmanager
def openai_server(requests: list[Any], disconnected: threading.Event | None = None) -> Iterator[str]:
    """Run a server with OpenAI's API. With `disconnected`, it sends chunks until the client disconnects."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers["Authorization"], body))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for delta in ({"role": "assistant", "content": ""}, {"content": "Be"}, {"content": "cause."}, {}):
                choice = {"index": 0, "delta": delta, "finish_reason": None}
                self.wfile.write(f"data: {json.dumps({'id': 'x', 'choices': [choice]})}\n\n".encode())
            try:
                while disconnected is not None:
                    choice = {"index": 0, "delta": {"content": " more"}, "finish_reason": None}
                    self.wfile.write(f"data: {json.dumps({'id': 'x', 'choices': [choice]})}\n\n".encode())
                    time.sleep(0.01)
            except OSError:
                disconnected.set()
                return
            self.wfile.write(b'data: {"id": "x", "choices": [], "usage": {}}\n\ndata: [DONE]\n\n')

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_requests_to_openai_api() -> None:
    requests: list[Any] = []
    with openai_server(requests) as url:
        done = run_model(OPENAI_BASE_URL=url, OPENAI_API_KEY="key", OPENAI_MODEL="clever")
        assert done.stdout == "Be|cause.", done.stderr
        assert run_model(OPENAI_BASE_URL=url).stdout == "Be|cause."
    path, key, body = requests[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer key", "clever")
    assert body["stream"] is True
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert len(requests) == 4


def test_title_of_openai_api() -> None:
    requests: list[Any] = []
    with openai_server(requests) as url:
        assert run_model("title", OPENAI_BASE_URL=url).stdout == "Be|cause."
    instructions, *messages = requests[0][2]["messages"]
    assert "title" in instructions["content"]
    assert [message["role"] for message in messages] == ["user", "assistant"]


@pytest.mark.parametrize("framework", ["fastapi", "flask"])
def test_stop_closes_connection_to_model(empty_database: str, framework: str) -> None:
    disconnected = threading.Event()
    with openai_server([], disconnected) as url, Demo(framework, empty_database, OPENAI_BASE_URL=url) as demo:
        with ask(demo.url, prompt="hi") as answer:
            parser, events = EventParser(), []
            while len(events) < 5:
                events += parser.feed(answer.read1())
            stop = json.dumps({"id": events[0].data}).encode()
            urlopen(Request(f"{demo.url}__aibind__/stream/stop", stop, JSON), timeout=20).close()
            assert disconnected.wait(20)


def browser() -> OpenerDirector:
    """Return a client that keeps cookies."""
    return build_opener(HTTPCookieProcessor())


def ask(url: str, client: OpenerDirector | None = None, **body: object) -> Any:
    """Send a prompt, and return the response with the events."""
    request = Request(f"{url}__aibind__/stream", json.dumps(body).encode(), JSON)
    return (client or browser()).open(request, timeout=20)


def call(url: str, method: str = "GET", client: OpenerDirector | None = None, **body: object) -> tuple[int, Any]:
    """Return the status and the JSON of a response."""
    request = Request(url, json.dumps(body).encode() if body else None, JSON, method=method)
    try:
        with (client or browser()).open(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        error.close()
        return error.code, None


@pytest.mark.parametrize("framework", ["fastapi", "flask", "django"])
def test_conversations_belong_to_a_browser(empty_database: str, framework: str) -> None:
    with Demo(framework, empty_database, delay=0) as demo:
        routes = f"{demo.url}__aibind__"
        owner, stranger = browser(), browser()
        assert call(f"{routes}/conversations", client=owner) == (401, None)  # it has not loaded the page
        for client in (owner, stranger):
            with client.open(demo.url, timeout=20) as page:
                assert b"<title>A durable chat</title>" in page.read()
                cookie = page.headers["Set-Cookie"].lower()
                assert {"httponly", "samesite=lax", "max-age=2592000"} <= set(cookie.split("; "))
                assert page.headers["Cache-Control"] == "private, no-cache"
        with ask(demo.url, owner, prompt="hi", sessionId="a") as answer:
            events = EventParser().feed(answer.read())
        assert (events[0].event, events[-1].event) == ("stream-id", "done")
        stream = events[0].data
        _, shown = call(f"{routes}/conversations/a", client=owner)
        answer_node = shown["history"]["nodes"][stream]
        assert answer_node["message"]["content"] == "".join(e.data for e in events if e.event == "message")
        with ask(demo.url, owner, regenerate=True, parentId=answer_node["parentId"], sessionId="a") as answer:
            events = EventParser().feed(answer.read())
        assert "another answer" in "".join(event.data for event in events if event.event == "message")
        _, listed = call(f"{routes}/conversations", client=owner)
        assert [each["id"] for each in listed["conversations"]] == ["a"]
        assert call(f"{routes}/conversations/a", "PATCH", owner, title="Greetings")[1]["title"] == "Greetings"
        # Another browser sees nothing, and changes nothing.
        assert call(f"{routes}/conversations", client=stranger) == (200, {"conversations": [], "next": None})
        assert call(f"{routes}/conversations/a", client=stranger) == (404, None)
        assert call(f"{routes}/conversations/a", "PATCH", stranger, title="Mine") == (404, None)
        assert call(f"{routes}/conversations/a", "DELETE", stranger) == (404, None)
        assert call(f"{routes}/stream", "POST", stranger, prompt="hi", sessionId="a") == (404, None)
        assert call(f"{routes}/stream/stop", "POST", stranger, id=stream) == (404, None)
        assert call(f"{routes}/stream/resume?id={stream}", client=stranger) == (404, None)
        # A cookie that the page has not made is none.
        guessed = build_opener()
        guessed.addheaders = [("Cookie", "browser=guessed")]
        assert call(f"{routes}/conversations", client=guessed) == (401, None)
        assert call(f"{routes}/conversations/a", "DELETE", owner) == (200, {"ok": True})
        assert call(f"{routes}/conversations/a", client=owner) == (404, None)


@pytest.mark.parametrize("framework", ["fastapi", "flask", "django"])
def test_files_of_the_page(empty_database: str, framework: str) -> None:
    files = [path for path in (EXAMPLES / "shared" / "page").rglob("*") if path.suffix in (".css", ".js", ".mjs")]
    types = {".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript"}
    assert len(files) > 5
    with Demo(framework, empty_database) as demo:
        for path in files:
            url = f"{demo.url}page/{path.relative_to(EXAMPLES / 'shared' / 'page').as_posix()}"
            with urlopen(url, timeout=20) as answer:
                assert answer.read() == path.read_bytes()
                assert answer.headers["Content-Type"] == f"{types[path.suffix]}; charset=utf-8"
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
        for unknown in ("page/missing.js", "page/../__init__.py", "page/%2e%2e/model.py", "page/vendor/README.md"):
            assert call(f"{demo.url}{unknown}")[0] == 404


def demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "aibind_postgres.cli", "demo", "--web", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def test_demo_errors(empty_database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = demo(f"--port={taken.getsockname()[1]}", f"--dsn={empty_database}")
    assert (done.returncode, "already in use" in done.stderr) == (1, True)
    done = demo("--status-table=x")
    assert (done.returncode, "--web uses the default table names" in done.stderr) == (2, True)
    done = demo("--port=0", f"--dsn={empty_database}", AIBIND_DEMO_DELAY="soon")
    assert (done.returncode, "AIBIND_DEMO_DELAY must be" in done.stderr) == (2, True)
    for wrong in ("--port=70000", "--framework=rails"):
        assert demo(wrong).returncode == 2


@pytest.mark.parametrize("framework", ["fastapi", "flask", "django"])
def test_ctrl_c_ends_demo_and_its_server_but_keeps_the_data(framework: str) -> None:
    command = [sys.executable, "-m", "aibind_postgres.cli", "demo", "--web", "--port=0", f"--framework={framework}"]
    with tempfile.TemporaryDirectory(prefix="aibind-test-") as folder:  # pytest's are closed to the server's user
        temporary, kept = Path(folder, "temporary"), Path(folder, "kept")
        temporary.mkdir()
        # HOME is for macOS.
        environment = {**os.environ, "TMPDIR": str(temporary), "XDG_DATA_HOME": str(kept), "HOME": str(kept)}
        environment["AIBIND_DEMO_DELAY"] = "0.1"

        def start() -> tuple[subprocess.Popen[str], str]:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            return process, process.stdout.readline().split()[4]

        client = browser()
        process, url = start()
        client.open(url, timeout=20).close()
        with ask(url, client, prompt="hi", sessionId="kept") as answer:
            while b"You" not in answer.readline():
                pass
            process.send_signal(signal.SIGINT)
            _, complaint = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in complaint
        assert os.listdir(temporary) == []
        [data] = kept.rglob("demo")
        assert f"no --dsn: using the embedded PostgreSQL in {data}\n" in complaint
        assert not (data / "postmaster.pid").exists()

        process, url = start()
        _, kept_conversation = call(f"{url}__aibind__/conversations/kept", client=client)
        question, reply = kept_conversation["history"]["nodes"].values()
        assert (question["message"]["content"], reply["metadata"]) == ("hi", {"state": "error"})
        assert reply["message"]["content"].startswith("You")
        process.kill()  # PostgreSQL stays, and the next start uses it
        process.communicate()

        process, url = start()
        assert call(f"{url}__aibind__/conversations/kept", client=client) == (200, kept_conversation)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert not (data / "postmaster.pid").exists()


@pytest.mark.parametrize("framework", ["fastapi", "flask"])
def test_demo_ends_before_a_long_answer(empty_database: str, framework: str) -> None:
    with Demo(framework, empty_database, delay=0.1) as demo:
        with ask(demo.url, prompt="hi"):
            demo.terminate()
    with PostgresStreamStore(empty_database) as store:
        [status] = store.list()
        # The model yields ten tokens a second while the server runs.
        assert (status.state, status.total_chunks < 40) == ("error", True)
