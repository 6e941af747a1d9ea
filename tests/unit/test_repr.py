"""The `repr` of public objects: useful, and without secrets."""

from __future__ import annotations

import inspect

import psycopg_pool
import pytest

import aibind_postgres as public
from aibind_postgres.sse import EventParser
from aibind_postgres.wire import find_wire

DSN = "postgresql://user:pass-of-dsn@localhost/db"
REQUEST = public.WebRequest(
    "POST", "/chat", {"token": "secret-query"}, {"cookie": "secret-cookie"}, b'{"prompt": "secret-body"}'
)
MESSAGES = [{"role": "user", "content": "secret-text"}]
SECRETS = ("pass-of-dsn", "secret-query", "secret-cookie", "secret-body", "secret-text")

# Protocols, functions, and plain data with the default repr.
WITHOUT_OWN_REPR = {
    "ArchiveResult",
    "AsyncPostgresClient",
    "CleanupResult",
    "ConversationInfo",
    "ErasureResult",
    "PostgresClient",
    "Resource",
    "StoreCheck",
    "StoredEvent",
    "StreamChunk",
    "StreamEvent",
    "StreamInfo",
    "StreamState",
    "StreamStatus",
    "TimedChunk",
    "TreeNode",
    "TreePath",
    "wrap_asyncpg",
    "wrap_django",
    "wrap_sqlalchemy",
}


def is_error(name: str) -> bool:
    value = getattr(public, name)
    return inspect.isclass(value) and issubclass(value, Exception)


def history() -> public.ChatHistory:
    chat = public.ChatHistory(generate_id=lambda: "leaf")
    chat.append(MESSAGES[0])
    return chat


def handler(plain: str) -> object:
    stores = {"": public.PostgresStreamStore, "Async": public.AsyncPostgresStreamStore}
    prefix = "Async" if plain.startswith("Async") else ""
    return getattr(public, plain)(lambda generation: [], store=stores[prefix](DSN))


EXAMPLES = {
    "AgUiHandler": lambda: handler("AgUiHandler"),
    "AsyncAgUiHandler": lambda: handler("AsyncAgUiHandler"),
    "AsyncDurableStream": lambda: public.AsyncDurableStream(
        public.AsyncPostgresStreamStore(DSN), "stream", find_wire(None)
    ),
    "AsyncHousekeeper": lambda: public.AsyncHousekeeper(public.AsyncPostgresStreamStore(DSN)),
    "AsyncPostgresConversationStore": lambda: public.AsyncPostgresConversationStore(DSN),
    "AsyncPostgresStreamStore": lambda: public.AsyncPostgresStreamStore(DSN),
    "AsyncStreamWriter": lambda: public.AsyncPostgresStreamStore(DSN).writer("stream"),
    "AsyncStreamHandler": lambda: handler("AsyncStreamHandler"),
    "AsyncWebResponse": lambda: public.AsyncWebResponse(200, {"set-cookie": "secret-cookie"}, b"secret-body"),
    "ChatHistory": history,
    "DurableStream": lambda: public.DurableStream(public.PostgresStreamStore(DSN), "stream", find_wire(None)),
    "Housekeeper": lambda: public.Housekeeper(None, public.PostgresConversationStore(DSN)),
    "StreamWriter": lambda: public.PostgresStreamStore(DSN).writer("stream"),
    "Generation": lambda: public.Generation(
        "chat", "secret-text", MESSAGES, "secret-text", "model", "session", None, {"prompt": "secret-body"}, REQUEST
    ),
    "MessageTree": lambda: history().tree,
    "PostgresConversationStore": lambda: public.PostgresConversationStore(DSN),
    "PostgresStreamStore": lambda: public.PostgresStreamStore(DSN),
    "AiSdkHandler": lambda: handler("AiSdkHandler"),
    "AsyncAiSdkHandler": lambda: handler("AsyncAiSdkHandler"),
    "StreamHandler": lambda: handler("StreamHandler"),
    "WebRequest": lambda: REQUEST,
    "WebResponse": lambda: public.WebResponse(200, {"set-cookie": "secret-cookie"}, b"secret-body"),
}


def test_every_public_name_is_covered() -> None:
    names = {name for name in public.__all__ if not is_error(name)}
    assert names == EXAMPLES.keys() | WITHOUT_OWN_REPR


@pytest.mark.parametrize("name", EXAMPLES)
async def test_own_repr_without_secrets(name: str) -> None:
    example = EXAMPLES[name]()
    text = repr(example)
    assert text.startswith(f"<{name} ")
    assert " at 0x" not in text
    assert [secret for secret in SECRETS if secret in text + str(example)] == []


def test_store_with_tables_client_and_state() -> None:
    store = public.PostgresStreamStore(DSN, chunks_table="app.chunks", status_table="app.status")
    pool = "<PoolClient of ConnectionPool 'pool of aibind_postgres'>"
    assert repr(store) == f'<PostgresStreamStore in "app"."status" and "app"."chunks", {pool}, open>'
    store.close()
    assert repr(store).endswith(", closed>")


def test_clients_without_secrets() -> None:
    class Client:
        password = "pass-of-dsn"

        def query(self, sql, params):
            return []

        def __repr__(self):
            return self.password

    assert "<Client of Client>" in repr(public.PostgresStreamStore(Client()))
    pool = psycopg_pool.ConnectionPool(DSN, open=False, name="named")
    assert "<PoolClient of ConnectionPool 'named'>" in repr(public.PostgresStreamStore(pool))


def test_sqlalchemy_engine_without_secrets() -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    engine = sqlalchemy.create_engine("postgresql+psycopg://user:pass-of-dsn@localhost/db?password=pass-of-dsn")
    text = repr(public.PostgresStreamStore(public.wrap_sqlalchemy(engine)))
    assert "<SQLAlchemy client with driver psycopg>" in text
    assert "pass-of-dsn" not in text


def test_request_and_generation() -> None:
    text = "<WebRequest POST /chat, query: [token], headers: [cookie], 25 bytes>"
    assert repr(REQUEST) == text
    assert repr(EXAMPLES["Generation"]()) == (
        f"<Generation chat, 1 messages, model='model', session_id='session', stream_id=None, {text}>"
    )


def test_streamed_response() -> None:
    assert repr(public.WebResponse(200, {}, iter([]))) == "<WebResponse 200, streamed>"
    assert repr(public.WebResponse(404, {}, b"four")) == "<WebResponse 404, 4 bytes>"


def test_history_and_tree() -> None:
    assert repr(history()) == "<ChatHistory of 1 messages, active leaf 'leaf'>"
    assert repr(public.MessageTree()) == "<MessageTree of 0 messages, active leaf None>"


def test_event_parser() -> None:
    parser = EventParser()
    parser.feed(b"id: 7\nretry: 10\ndata: secret-text\n\n")
    assert repr(parser) == "<EventParser with last_event_id='7', retry=10>"


@pytest.mark.parametrize("name", [name for name in public.__all__ if is_error(name)])
def test_error_repr_is_its_text(name: str) -> None:
    assert getattr(public, name).__repr__ is Exception.__repr__
