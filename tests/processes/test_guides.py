"""The applications in docs/usechat.md and docs/migration.md work over HTTP, each on two servers with one database.

The code for pages in docs/usechat.md runs in Node, with the published clients.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import npm
from support.applications import Browser, serving

from aibind_postgres import PostgresConversationStore, PostgresStreamStore, StreamStatus
from aibind_postgres.sse import EventParser

DOCS = Path(__file__).parents[2] / "docs"
UVICORN = "uvicorn --app-dir={folder} --port={{port}} main:app"
GUNICORN = "gunicorn --chdir={folder} --threads=20 --bind=127.0.0.1:{{port}} main:app"
DJANGO = "uvicorn --app-dir={folder} --port={{port}} mysite:application"
DJANGO_PROJECT = """
import django.conf
from django.core.asgi import get_asgi_application

django.conf.settings.configure(ROOT_URLCONF="urls", ALLOWED_HOSTS=["*"], SECRET_KEY="-")
application = get_asgi_application()
"""

# The model answers "wait" when the file `proceed` exists.
ASYNC_MODEL = """
import asyncio
from pathlib import Path


async def ask_the_model(question):
    prompt = question if isinstance(question, str) else question[-1]["content"]
    yield "Answer to "
    while prompt == "wait" and not Path(__file__).with_name("proceed").exists():
        await asyncio.sleep(0.02)
    yield prompt
    yield " — ü\\n"
"""
MODEL = ASYNC_MODEL.replace("async def", "def").replace("import asyncio", "import time")
MODEL = MODEL.replace("await asyncio.sleep", "time.sleep")


def blocks(page: str, heading: str, languages: str = "python") -> list[str]:
    """Return the blocks of code in a section of a page."""
    section = (DOCS / page).read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^ *```(?:{languages})\n(.*?)^ *```", section, re.MULTILINE | re.DOTALL)


def write(folder: Path, *programs: str, model: str = "") -> None:
    """Save programs under the names in their first lines, for Django without the folder of the project."""
    for program in programs:
        name = program.splitlines()[0].removeprefix("# ").rpartition("/")[2]
        (folder / name).write_text(program, "utf-8")
    (folder / "my_model.py").write_text(model, "utf-8")
    (folder / "mysite.py").write_text(DJANGO_PROJECT, "utf-8")


@contextmanager
def two_servers(command: str, folder: Path, database: str) -> Iterator[list[Browser]]:
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(command.format(folder=folder), database)) for _ in range(2)]
        yield [Browser(server) for server in servers]


def received_until(response: HTTPResponse, text: str) -> str:
    """Read a response until it contains a text, and close it."""
    with response:
        received = b""
        while text.encode() not in received:
            part = response.read1(65536)
            assert part, received
            received += part
    return received.decode()


def text_of(response: HTTPResponse) -> str:
    with response:
        return response.read().decode()


def wait_for_end(database: str, stream_id: str) -> StreamStatus:
    with PostgresStreamStore(database) as store:
        return store.wait(stream_id, 30)


# useChat


def user_message(id: str, text: str) -> dict[str, Any]:
    return {"id": id, "role": "user", "parts": [{"type": "text", "text": text}]}


def question(text: str, id: str = "q1") -> dict[str, Any]:
    return {"id": "chat 1", "messages": [user_message(id, text)], "trigger": "submit-message"}


def chunks_of(response: HTTPResponse) -> list[dict[str, Any]]:
    events = [event.data for event in EventParser().feed(text_of(response).encode())]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def delta_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["delta"] for chunk in chunks if chunk["type"] == "text-delta")


def shown(browser: Browser, id: str = "chat%201") -> list[tuple[str, str]]:
    messages = browser.json("GET", f"/api/chat/{id}")["messages"]
    return [(each["role"], "".join(part.get("text", "") for part in each["parts"])) for each in messages]


@pytest.mark.parametrize(("number", "command"), [(0, UVICORN), (1, GUNICORN), (2, DJANGO)])
def test_servers_for_use_chat(number: int, command: str, database: str, tmp_path: Path) -> None:
    write(tmp_path, blocks("usechat.md", "The server")[number])
    with two_servers(command, tmp_path, database) as (here, there):
        assert here.status("GET", "/api/chat/chat%201") == 404
        assert here.status("GET", "/api/chat/chat%201/stream") == 204
        assert delta_of(chunks_of(here.open("POST", "/api/chat", question("Hello")))) == "You asked: Hello "
        assert shown(there) == [("user", "Hello"), ("assistant", "You asked: Hello ")]
        assert there.status("GET", "/api/chat/chat%201/stream") == 204
        assert there.status("POST", "/api/chat/chat%201/stop") == 200
        assert there.json("DELETE", "/api/chat/chat%201") == {"ok": True}
        assert here.status("GET", "/api/chat/chat%201") == 404


def served_with(generate: str, folder: Path) -> None:
    """Save the application for FastAPI with another `generate`."""
    application = blocks("usechat.md", "The server")[0]
    before, _, after = application.partition("async def generate")
    after = after.partition("\n\n\n")[2]
    write(folder, f"{before}{generate}\n\ndef pay(sum):\n    return sum\n\n\n{after}")


def test_items_of_use_chat(database: str, tmp_path: Path) -> None:
    [block] = blocks("usechat.md", "The items of an answer")
    served_with(block, tmp_path)
    with serving(UVICORN.format(folder=tmp_path), database) as url:
        browser = Browser(url)
        chunks = chunks_of(browser.open("POST", "/api/chat", question("Weather?")))
        assert delta_of(chunks) == "It is 21 °C in Rome."
        message = browser.json("GET", "/api/chat/chat%201")["messages"][-1]
        assert message["id"] == chunks[0]["messageId"]


@pytest.mark.parametrize("is_approved", [True, False])
def test_approval_in_use_chat(is_approved: bool, database: str, tmp_path: Path) -> None:
    [block] = blocks("usechat.md", "Tools")
    served_with(f"from aibind_postgres.wire import ai_sdk\n\n\n{block}", tmp_path)
    with serving(UVICORN.format(folder=tmp_path), database) as url:
        browser = Browser(url)
        first = chunks_of(browser.open("POST", "/api/chat", question("Pay!")))
        assert "tool-approval-request" in [chunk["type"] for chunk in first]
        call = {"type": "tool-pay", "toolCallId": "call-1", "state": "approval-responded", "input": {"sum": 5}}
        call["approval"] = {"id": "approval-1", "approved": is_approved}
        message = {"id": first[0]["messageId"], "role": "assistant", "parts": [{"type": "step-start"}, call]}
        body = {**question("Pay!"), "messages": [user_message("q1", "Pay!"), message]}
        second = chunks_of(browser.open("POST", "/api/chat", body))
        assert delta_of(second) == ("Paid." if is_approved else "Not paid.")
        assert second[0]["messageId"] == first[0]["messageId"]
        output = [chunk.get("output") for chunk in second if chunk["type"].startswith("tool-output")]
        assert output == [5 if is_approved else None]


# `useChat` itself needs a browser. Its class `Chat` has its requests and its state.
PAGE = """
import { Chat as ChatState } from "@ai-sdk/react";
import { DefaultChatTransport } from "ai";
import { unlinkSync, writeFileSync } from "node:fs";

const [base, proceed] = process.argv.slice(2);
const fetchUrl = globalThis.fetch;
globalThis.fetch = (url, init) => fetchUrl(new URL(url, base), init);

function useChat({ resume, ...options }) {
  const chat = new ChatState(options);
  chat.setMessages = (change) => (chat.messages = change(chat.messages));
  return chat;
}

const texts = ({ messages }) => messages.map(({ parts }) => parts.map((part) => part.text ?? "").join(""));

async function until(condition) {
  while (!(await condition())) await new Promise((resolve) => setTimeout(resolve, 20));
}

LOAD

function chatWithStop(id) {
  STOP
  return stop;
}

function mount(id, stored) {
  RACE
  return chat;
}

const lastOnly = () =>
  LAST_ONLY

const id = "a chat/1";
const result = {};
const first = useChat({ id, messages: (await load(id)).messages });
const answered = first.sendMessage({ text: "wait" });
await until(() => texts(first)[1]);
const stored = await load(id);

const second = useChat({ id, messages: stored.messages });
await second.sendMessage({ text: "next" });
result.refused = [second.status, second.error.message];
writeFileSync(proceed, "");
await answered;

const late = mount(id, stored);
await late.resumeStream();
await until(() => texts(late)[1]);
result.late = [late.status, texts(late)];

await second.sendMessage();
result.again = [second.status, texts(await load(id))];

unlinkSync(proceed);
const third = useChat({ id: "another", transport: lastOnly() });
const stopped = third.sendMessage({ text: "wait" });
await until(() => texts(third)[1]);
await chatWithStop("another")();
await stopped;
result.stopped = [third.status, texts(await load("another"))];

await third.sendMessage({ text: "edited", messageId: third.messages[0].id });
await third.regenerate();
result.edited = [third.status, texts(third), texts(await load("another"))];

let isCut = true;
const lost = useChat({ id: "lost", transport: new DefaultChatTransport({ fetch: async (...request) => {
  const response = await fetch(...request);
  if (!isCut) return response;
  const cut = new TransformStream({
    transform(part, controller) {
      controller.enqueue(part);
      // after the page has shown the text
      if (new TextDecoder().decode(part).includes("Answer to "))
        return until(() => texts(lost)[1]).then(() => controller.error(new TypeError("network error")));
    },
  });
  return new Response(response.body.pipeThrough(cut), response);
} }) });
await lost.sendMessage({ text: "wait" });
result.lost = [lost.status, texts(lost)];
isCut = false;
const resumed = lost.resumeStream();
await until(() => lost.status === "streaming");
writeFileSync(proceed, "");
await resumed;
result.resumed = [lost.status, texts(lost)];
console.log(JSON.stringify(result));
"""


@pytest.mark.parametrize("version", [5, 6, 7])
def test_code_of_pages(version: int, database: str, tmp_path: Path) -> None:
    load, stop, race = blocks("usechat.md", "The page", "jsx?")
    [last_only] = blocks("usechat.md", "Limits", "jsx?")
    script = tmp_path / "page.mjs"
    parts = {"LAST_ONLY": last_only, "LOAD": load, "STOP": stop, "RACE": race}
    page = PAGE
    for name, part in parts.items():
        page = page.replace(name, part)
    script.write_text(page, "utf-8")
    application, _ = blocks("migration.md", "From resumable-stream and Redis")
    application = application.replace("public=True", f"public=True, sdk_version={version}")
    write(tmp_path, application, model=ASYNC_MODEL)
    with serving(UVICORN.format(folder=tmp_path), database) as url:
        result = json.loads(npm.run_node(f"ai{version}", script, "", url, str(tmp_path / "proceed")))
    answers = ["wait", "Answer to wait — ü\n", "next", "Answer to next — ü\n"]
    if version == 5:  # it appends the replay
        assert "Answer to Answer to wait" in result.pop("resumed")[1][1]
    else:
        assert result.pop("resumed") == ["ready", answers[:2]]
    refusal = "an answer of this conversation is being written: wait for its end, or stop it"
    assert result == {
        "refused": ["error", refusal],
        "late": ["ready", answers[:2]],
        "again": ["ready", answers],
        "stopped": ["ready", ["wait", "Answer to "]],
        "lost": ["error", ["wait", "Answer to "]],
        "edited": ["ready", *[["edited", "Answer to edited — ü\n"]] * 2],
    }


# From resumable-stream


def test_after_resumable_stream(database: str, tmp_path: Path) -> None:
    application, copying = blocks("migration.md", "From resumable-stream and Redis")
    write(tmp_path, application, copying, model=ASYNC_MODEL)
    chats = [("old", "ann", [user_message("q1", "one"), {**user_message("a1", "1"), "role": "assistant"}])]
    (tmp_path / "my_chats.py").write_text(f"def read_chats():\n    return {chats!r}\n", "utf-8")
    environment = {**os.environ, "DATABASE_URL": database, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for _ in range(2):  # again, such as after a failure
        subprocess.run([sys.executable, "import_chats.py"], env=environment, cwd=tmp_path, check=True, timeout=60)
    with PostgresConversationStore(database, ttl=None) as conversations:
        info = conversations.get_info("old")
        assert info is not None
        assert (info.owner, info.expires_at) == ("ann", None)
    with two_servers(UVICORN, tmp_path, database) as (here, there):
        assert here.json("GET", "/api/chat/old")["messages"] == chats[0][2]
        response = here.open("POST", "/api/chat", question("wait"))
        stream_id = response.headers["X-Stream-Id"]
        received_until(response, "Answer to ")  # the page is reloaded
        assert there.json("GET", "/api/chat/chat%201")["activeStreamId"] == stream_id
        assert here.status("POST", "/api/chat", question("two", "q2")) == 409
        resumed = there.open("GET", "/api/chat/chat%201/stream")
        (tmp_path / "proceed").touch()
        assert delta_of(chunks_of(resumed)) == "Answer to wait — ü\n"
        assert shown(here) == [("user", "wait"), ("assistant", "Answer to wait — ü\n")]
        (tmp_path / "proceed").unlink()
        response = here.open("POST", "/api/chat", question("wait", "q2"))
        assert there.json("POST", "/api/chat/chat%201/stop") == {"success": True}
        assert chunks_of(response)[-1]["type"] == "abort"
        assert shown(there)[2:] == [("user", "wait"), ("assistant", "Answer to ")]


# From endpoints of one's own


class Guide(NamedTuple):
    """A guide with the code before and after.

    Attributes:
        heading: The heading of its section.
        command: The server.
        model: The stand-in for the model.
    """

    heading: str
    command: str
    model: str


GUIDES = [
    pytest.param(Guide("From a hand-written SSE endpoint", GUNICORN, MODEL), id="SSE"),
    pytest.param(Guide("From a plain StreamingResponse", UVICORN, ASYNC_MODEL), id="plain text"),
]


@pytest.mark.parametrize("guide", GUIDES)
def test_full_read_gives_the_same_before_and_after(guide: Guide, database: str, tmp_path: Path) -> None:
    bodies, types = [], []
    for block in blocks("migration.md", guide.heading):
        write(tmp_path, block, model=guide.model)
        with serving(guide.command.format(folder=tmp_path), database) as url:
            response = Browser(url).open("POST", "/ask", {"prompt": "Hello"})
            types.append(response.headers["Content-Type"].partition(";")[0])
            bodies.append(text_of(response))
    assert len(bodies) == 2
    assert bodies[0] == bodies[1] != ""
    assert types[0] == types[1]


@pytest.mark.parametrize("guide", GUIDES)
def test_answer_after_the_change(guide: Guide, database: str, tmp_path: Path) -> None:
    write(tmp_path, blocks("migration.md", guide.heading)[1], model=guide.model)
    with two_servers(guide.command, tmp_path, database) as (here, there):
        response = here.open("POST", "/ask", {"prompt": "wait"})
        stream_id = response.headers["X-Stream-Id"]
        begun = received_until(response, "Answer to ")  # then the connection is lost
        resumed = there.open("GET", f"/ask/{stream_id}")
        (tmp_path / "proceed").touch()
        whole = text_of(resumed)
        assert whole.startswith(begun)
        assert len(whole) > len(begun)
        assert wait_for_end(database, stream_id).state == "done"
        assert text_of(here.open("GET", f"/ask/{stream_id}")) == whole
        if guide.model is MODEL:
            assert begun + text_of(here.open("GET", f"/ask/{stream_id}?after=1")) == whole

        (tmp_path / "proceed").unlink()
        response = here.open("POST", "/ask", {"prompt": "wait"})
        stream_id = response.headers["X-Stream-Id"]
        assert there.status("POST", f"/ask/{stream_id}/stop") == 200
        assert begun.startswith(text_of(response))
        assert wait_for_end(database, stream_id).state == "stopped"
        for method, path in [("GET", "/ask/unknown"), ("POST", "/ask/unknown/stop")]:
            assert there.status(method, path) == 404
