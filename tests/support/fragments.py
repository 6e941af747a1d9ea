"""Programs around the fragments of Python code in the pages, which are not complete by themselves.

A program is keyed by the page and the first line of the fragment. `BLOCK` stands for the fragment. It fails if the
fragment does not do what the page says.
"""

from __future__ import annotations

STORES = """
import os
from aibind_postgres import *
from aibind_postgres import schema

dsn = client = os.environ["DATABASE_URL"]
"""

WEB = (
    STORES
    + """
from contextlib import asynccontextmanager
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.testclient import TestClient

WORDS = ["You ", "asked."]


async def ask_the_model(messages):
    for word in WORDS:
        yield word


async def generate(generation):
    async for word in ask_the_model(generation.messages):
        yield word


def current_user(request: Request):
    request.state.user = "ann"


def check(app, **body):
    with TestClient(app) as client:
        response = client.post("/__aibind__/stream", json={"prompt": "Hello", **body})
        assert response.status_code == 200, response.text
        assert all(f"data: {word}" in response.text for word in WORDS), response.text
        return client.get("/__aibind__/conversations")
"""
)

FLASK = (
    STORES
    + """
from flask import Flask, session

app = Flask(__name__)
app.secret_key = "-"


def ask_the_model(messages):
    yield "You "
    yield "asked."
"""
)

DJANGO = """
import django.conf

django.conf.settings.configure(
    ROOT_URLCONF=__name__,
    SECRET_KEY="-",
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": "app"}},
    INSTALLED_APPS=[f"django.contrib.{app}" for app in ("contenttypes", "auth", "sessions", "messages", "admin")],
)
django.setup()
"""

RUN = """
run = {"threadId": "t", "runId": "r", "state": {}, "tools": [], "context": [], "forwardedProps": {}}
run["messages"] = [{"id": "1", "role": "user", "content": "Hello"}]
with TestClient(app) as client:
    response = client.post("/agent", json=run)
    assert response.status_code == 200, response.text
    assert "RUN_FINISHED" in response.text and "asked." in response.text, response.text
"""

SERVE = """
served = []


def serve():
    served.append(True)


streams, conversations = PostgresStreamStore(dsn), PostgresConversationStore(dsn)
"""

PROGRAMS = {
    ("ag_ui.md", "from aibind_postgres import AsyncAgUiHandler, AsyncPostgresStreamStore"): WEB
    + """
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel

agent = Agent(TestModel(custom_output_text="You asked."))
app = FastAPI()
current_user = lambda request: "ann"
BLOCK
"""
    + RUN,
    ("archiving.md", "from datetime import timedelta"): STORES
    + SERVE
    + """
BLOCK
assert served
""",
    ("archiving.md", "result = streams.archive(older_than=timedelta(days=1))  # ArchiveResult(streams, chunks)"): STORES
    + SERVE
    + """
from datetime import timedelta

id = streams.create()
streams.append_many(id, ["a", "b"])
streams.complete(id)
BLOCK
assert result == (0, 0), result
assert [chunk.data for chunk in streams.read_from(id)] == ["a", "b"]
streams.close()
""",
    ("clients.md", "from aibind_postgres import PostgresStreamStore, wrap_django"): """
import os
from psycopg.conninfo import conninfo_to_dict
import django.conf

given = conninfo_to_dict(os.environ["DATABASE_URL"])
names = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}
database = {"ENGINE": "django.db.backends.postgresql"} | {names[key]: given[key] for key in names if key in given}
django.conf.settings.configure(DATABASES={"default": database})
django.setup()
BLOCK
from django.db import connection, transaction

try:
    with transaction.atomic():
        store.create("a")
        raise KeyError
except KeyError:
    pass
assert store.get_status("a") is None
store.close()
connection.close()
""",
    ("clients.md", "from psycopg_pool import ConnectionPool"): STORES
    + """
BLOCK
with PostgresStreamStore(pool) as store:
    assert store.get_status(store.create()).state == "active"
pool.close()
""",
    ("clients.md", "from aibind_postgres import embedded, schema"): """
BLOCK
assert "postgresql://" in dsn
""",
    ("deployment.md", "@asynccontextmanager"): WEB
    + """
from aibind_postgres.contrib.fastapi import router

store = AsyncPostgresStreamStore(dsn)
BLOCK
app = FastAPI(lifespan=lifespan)
app.include_router(router(AsyncStreamHandler(generate, store=store)))
check(app)
""",
    ("doctor.md", '@app.get("/ready")'): WEB
    + """
store = AsyncPostgresStreamStore(dsn)


@asynccontextmanager
async def lifespan(app):
    async with store:
        yield


app = FastAPI(lifespan=lifespan)
BLOCK
with TestClient(app) as client:
    response = client.get("/ready")
    assert (response.status_code, response.json()) == (200, {"ready": True, "problem": None})
""",
    ("http.md", "from aibind_postgres import AsyncPostgresStreamStore, AsyncStreamHandler"): WEB
    + """
app = FastAPI()
BLOCK
check(app)
""",
    ("http.md", "from aibind_postgres import PostgresStreamStore, StreamHandler"): FLASK
    + """
BLOCK
response = app.test_client().post("/__aibind__/stream", json={"prompt": "Hello"})
assert response.status_code == 200
assert "data: asked." in response.text
store.close()
""",
    ("http.md", "from aibind_postgres import AsyncStreamHandler"): STORES
    + DJANGO
    + """
from django.contrib import admin
from django.urls import path, resolve


async def generate(generation):
    yield "You asked."


BLOCK
assert resolve("/__aibind__/stream")
assert resolve("/admin/").app_name == "admin"
""",
    ("http.md", 'text = "".join(data for seq, event, data in store.events(stream_id) if event == "message")'): STORES
    + """
with PostgresStreamStore(dsn) as store:
    stream_id = DurableStream.start(store, ["You ", "asked."]).id
    BLOCK
    assert text == "You asked."
""",
    ("http.md", 'store = AsyncPostgresStreamStore(os.environ["DATABASE_URL"])'): WEB
    + """
from aibind_postgres.contrib.fastapi import router

BLOCK
listed = check(app, sessionId="a chat").json()["conversations"]
assert [conversation["id"] for conversation in listed] == ["a chat"]
""",
    ("operations.md", "from aibind_postgres import schema"): STORES
    + DJANGO
    + """
from django.db import migrations

BLOCK
""",
    ("operations.md", 'print(store.get_stats()["readers_open"])'): STORES
    + """
with PostgresStreamStore(dsn) as store:
    BLOCK
""",
    ("operations.md", "with Housekeeper(streams, conversations):  # either may be None"): WEB
    + SERVE
    + """
import asyncio
from collections.abc import AsyncIterator

BLOCK
assert served
streams.close()
conversations.close()
streams, conversations = AsyncPostgresStreamStore(dsn), AsyncPostgresConversationStore(dsn)


async def main():
    async with lifespan(FastAPI()):
        assert await streams.get_status("a") is None


asyncio.run(main())
""",
    (
        "operations.md",
        "with PostgresStreamStore(dsn) as streams, PostgresConversationStore(dsn) as conversations:",
    ): STORES
    + """
BLOCK
""",
    (
        "partitions.md",
        "schema.migrate(client, partitions=16)  # or: await schema.async_migrate(client, partitions=16)",
    ): STORES
    + """
import psycopg


class op:
    @staticmethod
    def execute(statement):
        with psycopg.connect(client, autocommit=True) as connection:
            connection.execute(statement)


op.execute("DROP TABLE aibind_stream_chunks_archive, aibind_stream_chunks, aibind_stream_status")
BLOCK
""",
    ("quickstart.md", "# server.py"): """
import psycopg


def input(text):
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


BLOCK
""",
    ("scale.md", "from psycopg_pool import ConnectionPool"): STORES
    + """
BLOCK
assert streams.get_status("a") is None
assert conversations.get_info("a") is None
streams.close()
conversations.close()
pool.close()
""",
    (
        "security.md",
        "handler = AsyncStreamHandler(generate, store=store, conversations=conversations, owner=current_user)",
    ): WEB
    + """
from aibind_postgres.contrib.fastapi import router

store, conversations = AsyncPostgresStreamStore(dsn), AsyncPostgresConversationStore(dsn)
current_user = lambda request: request.headers.get("x-user")


@asynccontextmanager
async def lifespan(app):
    async with store, conversations:
        yield


BLOCK
app = FastAPI(lifespan=lifespan)
app.include_router(router(handler))
with TestClient(app) as client:
    body = {"prompt": "Hello", "sessionId": "a chat"}
    id = client.post("/__aibind__/stream", json=body, headers={"x-user": "ann"}).headers["x-stream-id"]
    for user, status in (("ann", 200), ("bob", 404)):
        assert client.get("/__aibind__/conversations/a chat", headers={"x-user": user}).status_code == status
        assert client.get(f"/__aibind__/stream/resume?id={id}", headers={"x-user": user}).status_code == status
""",
    ("sources.md", "from openai import AsyncOpenAI"): """
import os

os.environ["OPENAI_API_KEY"] = "-"
BLOCK
import asyncio
from support import model_server
from types import SimpleNamespace

with model_server.running() as provider:
    provider.events = [{"choices": [{"index": 0, "delta": {"content": "You asked."}}]}]
    client = AsyncOpenAI(api_key="-", base_url=provider.url)

    async def main():
        messages = [{"role": "user", "content": "Hello"}]
        return [item async for item in generate(SimpleNamespace(messages=messages))]

    assert asyncio.run(main()) == ["You asked."]
""",
    ("sources.md", "def generate(generation):", 0): """
from types import SimpleNamespace


def source(session_id, messages, message_id):
    return session_id, messages, message_id


BLOCK
generation = SimpleNamespace(session_id="a chat", ui_messages=({"id": "q"},), message_id="a")
assert generate(generation) == ("a chat", [{"id": "q"}], "a")
""",
    ("sources.md", "def generate(generation):", 1): WEB
    + """
from aibind_postgres.contrib.fastapi import router
from aibind_postgres.sources.pydantic_ai import ag_ui
from pydantic_ai import Agent, CancellationToken
from pydantic_ai.models.test import TestModel
from pydantic_ai.ui.ag_ui import AGUIAdapter

agent = Agent(TestModel(custom_output_text="You asked."))
BLOCK
store = AsyncPostgresStreamStore(dsn)
app = FastAPI()
app.include_router(router(AsyncAgUiHandler(generate, store=store)))
"""
    + RUN,
    ("streams.md", "last = 0"): STORES
    + """
sent = []


def send_to_browser(data, event_id):
    sent.append((event_id, data))


with PostgresStreamStore(dsn) as store:
    stream = store.create()
    store.append_many(stream, ["a", "b"])
    store.complete(stream)
    BLOCK
assert sent == [(1, "a"), (2, "b")]
assert status == ("done", None, 2)
""",
    ("streams.md", "from aibind_postgres import DurableStream"): STORES
    + """
saved = []


def ask_the_model(prompt):
    yield "You "
    yield "asked."


def save_answer(text, status):
    saved.append(text)


store = PostgresStreamStore(dsn)
BLOCK
body, headers = answer("Hello")
assert b"asked." in b"".join(body)
[stream] = store.list()
assert b"You " not in b"".join(resume(stream.id, "1")[0])
assert b"You " in b"".join(resume(stream.id, stream.id)[0])
DurableStream.shutdown(store, 10)
assert saved == ["You asked."]
store.close()
""",
    ("streams.md", 'stream = DurableStream.start(store, encoded_by_another_library(prompt), wire="sse")'): STORES
    + """
prompt = "Hello"


def encoded_by_another_library(prompt):
    yield b"data: You\\n\\nda"
    yield b"ta: asked.\\n\\n"


with PostgresStreamStore(dsn) as store:
    BLOCK
    assert b"".join(stream.sse()) == b"data: You\\n\\ndata: asked.\\n\\n"
""",
    ("streams.md", "def save(text, status):"): STORES
    + """
session_id = "a chat"
with PostgresConversationStore(dsn) as conversations:
    BLOCK
    save("You asked.", None)
    assert conversations.get_info(session_id) is None
    with conversations.edit(session_id) as chat:
        chat.append({"role": "user", "content": "Hello"})
    save("You asked.", None)
    assert conversations.load(session_id).messages[-1]["content"] == "You asked."
""",
    ("streams.md", "for seq, token in enumerate(tokens, start=1):"): STORES
    + """
import time

import psycopg

tokens = ["You ", "asked."]
with PostgresStreamStore(dsn) as store:
    stream = store.create()
    for _ in range(2):  # the second time, all appends are repetitions
        BLOCK
    assert [chunk.data for chunk in store.read_from(stream, follow=False)] == tokens
""",
    ("telemetry.md", "from aibind_postgres import AsyncPostgresStreamStore"): """
BLOCK
""",
    ("telemetry.md", "from prometheus_client import start_http_server"): """
import prometheus_client

start = prometheus_client.start_http_server
prometheus_client.start_http_server = lambda port: start(0)  # another process may use the port
BLOCK
assert b"aibind" in prometheus_client.generate_latest()
""",
    ("telemetry.md", "from aibind_postgres import PostgresStreamStore"): STORES
    + """
printed = []
print = lambda *values: printed.append(values)
BLOCK
store = PostgresStreamStore(dsn, metrics=PrintedMetrics())
store.append(store.create(), "Hello")
assert printed
store.close()
""",
    ("time_partitions.md", "from aibind_postgres import Housekeeper, schema"): STORES
    + SERVE
    + """
import psycopg

with psycopg.connect(dsn, autocommit=True) as connection:
    connection.execute("DROP TABLE aibind_stream_chunks_archive, aibind_stream_chunks, aibind_stream_status")
BLOCK
assert served
streams.close()
conversations.close()
""",
    ("usechat.md", "handler = AiSdkHandler("): FLASK
    + """
from aibind_postgres.contrib.flask import blueprint

store, conversations = PostgresStreamStore(dsn), PostgresConversationStore(dsn)


def generate(generation):
    yield "You asked."


BLOCK
app.register_blueprint(blueprint(handler))


@app.get("/login")
def login():
    session["user"] = "ann"
    return ""


ann, bob = app.test_client(), app.test_client()
ann.get("/login")
message = {"id": "q", "role": "user", "parts": [{"type": "text", "text": "Hello"}]}
body = {"id": "chat", "messages": [message], "trigger": "submit-message"}
assert "asked." in ann.post("/api/chat", json=body).text
assert (ann.get("/api/chat/chat").status_code, bob.get("/api/chat/chat").status_code) == (200, 401)
store.close()
conversations.close()
""",
}
