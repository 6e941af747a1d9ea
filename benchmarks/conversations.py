"""Time to save and load a conversation, by its length, and the cost of detecting and merging other saves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from aibind_postgres import ChatHistory, PostgresConversationStore

from .measure import Figures, Missing, Results, Row, compare

if TYPE_CHECKING:
    import psycopg

    from .bench import Bench

MESSAGE_LENGTH = 200  # in characters
TTL = 1_800_000  # milliseconds; the default of a store

WARM_UP = 10  # runs of each operation, to open connections and prepare statements

# Random words, since the server compresses long texts.
WORDS = """
    about after again answer because before between build change check could customer database every example first from
    have how invoice is it keep letter little make message month never not number of on one order other payment people
    please problem question read same second should since small something still table thank that the their there think
    this time to under until user very wait was week what where which while with would write year you your
"""

Message: TypeAlias = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """One conversation with the operations to measure. Each stores the same text first and returns its times."""

    text: str
    length: int
    key: str
    table: str
    store: PostgresConversationStore
    other_store: PostgresConversationStore
    connection: psycopg.Connection[Any]

    @property
    def operations(self) -> dict[str, Callable[[], Figures]]:
        return {
            "save": self.save,
            "npm save": self.save_as_npm,
            "merging save": self.save_merging,
            "load": self.load,
            "npm load": self.load_as_npm,
        }

    def save(self) -> Figures:
        """Save after an append. The JSON part is repeated on its own to measure its share."""
        chat = self._appended()
        start = time.perf_counter()
        self.store.save(self.key, chat)
        saved = time.perf_counter()
        chat.to_json()
        sha256(self.text.encode()).hexdigest()
        share = (time.perf_counter() - saved) / (saved - start) * 100
        return {"p50": (saved - start) * 1e3, "json": share, "database": 100 - share}

    def save_merging(self) -> Figures:
        """Save after an append, with a conflicting append saved by another store."""
        chat, theirs = self._appended(), self.other_store.load(self.key)
        theirs.append(message(Random()))
        self.other_store.save(self.key, theirs)
        start = time.perf_counter()
        self.store.save(self.key, chat)
        elapsed = time.perf_counter() - start
        if len(chat) != self.length + 2:
            raise RuntimeError(f"{self.length} messages and two appends were merged into {len(chat)}")
        return {"p50": elapsed * 1e3}

    def save_as_npm(self) -> Figures:
        """Save after an append as the npm package does: overwrite the stored text."""
        chat = self._appended()
        start = time.perf_counter()
        self._write(chat.to_json())
        return {"p50": (time.perf_counter() - start) * 1e3}

    def load(self) -> Figures:
        self._write(self.text)
        start = time.perf_counter()
        self.store.load(self.key)
        return {"p50": (time.perf_counter() - start) * 1e3}

    def load_as_npm(self) -> Figures:
        """Load as the npm package does: parse the JSON text without checks."""
        self._write(self.text)
        start = time.perf_counter()
        statement = f"SELECT data FROM {self.table} WHERE session_id = $1 AND expires_at > $2"
        [(text,)] = self.connection.execute(statement, [self.key, milliseconds()], binary=True).fetchall()
        json.loads(text)
        return {"p50": (time.perf_counter() - start) * 1e3}

    def _appended(self) -> ChatHistory[Message]:
        self._write(self.text)
        chat = self.store.load(self.key)
        chat.append(message(Random()))
        return chat

    def _write(self, text: str) -> None:
        """Run the npm package's statement. psycopg may prepare it, as it prepares ours; the npm client does not."""
        statement = f"""
            INSERT INTO {self.table} (session_id, data, expires_at) VALUES ($1, $2, $3)
            ON CONFLICT (session_id) DO UPDATE SET data = EXCLUDED.data, expires_at = EXCLUDED.expires_at"""
        self.connection.execute(statement, [self.key, text, milliseconds() + TTL], binary=True)


def conversations(bench: Bench) -> list[Row]:
    """Save and load conversations of each length in turn."""
    tables = bench.tables("conversations")
    table = f"{tables.schema}.conversations"
    lengths = bench.size.lengths
    seconds = bench.size.seconds / 32  # short runs, so that variants run close together in time
    variants: dict[str, Callable[[], Figures] | Missing] = {}
    with ExitStack() as stack:
        store, other = (stack.enter_context(PostgresConversationStore(tables.dsn, table=table)) for _ in range(2))
        connection = stack.enter_context(tables.connect())
        for length in lengths:
            text = conversation_text(length)
            conversation = Conversation(text, length, str(length), table, store, other, connection)
            for name, operation in conversation.operations.items():
                variants[f"{length:,} messages, {name}"] = partial(repeat, operation, seconds)
                if length == lengths[0]:
                    repeat(operation, 0, least=WARM_UP)
        found = bench.run_interleaved(variants, 2 * bench.size.rounds)
    return [row for length in lengths for row in rows_of(f"{length:,} messages", found)]


def rows_of(messages: str, found: dict[str, Results]) -> list[Row]:
    saved, merged, loaded = (found[f"{messages}, {work}"] for work in ("save", "merging save", "load"))
    npm_saved, npm_loaded = (found[f"{messages}, {work}"] for work in ("npm save", "npm load"))
    work = f"save, {messages}"
    return [
        compare(work, "p50", saved, "to_json, the npm package's statement", npm_saved),
        Row(f"{work}: to_json and digest", "%", saved.figures["json"]),
        Row(f"{work}: database", "%", saved.figures["database"]),
        compare(f"{work}, merging", "p50", merged, "nothing to merge", saved),
        compare(f"load, {messages}", "p50", loaded, "the npm package's statement, json.loads", npm_loaded),
    ]


def repeat(operation: Callable[[], Figures], seconds: float, least: int = 1) -> Figures:
    """Repeat an operation for some seconds. Return the medians of its figures."""
    runs: list[Figures] = []
    end = time.perf_counter() + seconds
    while len(runs) < least or time.perf_counter() < end:
        runs.append(operation())
    return {name: median(figures[name] for figures in runs) for name in runs[0]}


def conversation_text(length: int) -> str:
    """Return the stored text of a conversation with one path."""
    chat: ChatHistory[Message] = ChatHistory()
    random = Random(length)
    for _ in range(length):
        chat.append(message(random))
    return chat.to_json()


def message(random: Random) -> Message:
    words = " ".join(random.choices(WORDS.split(), k=MESSAGE_LENGTH // 2))
    return {"role": random.choice(["user", "assistant"]), "content": words[:MESSAGE_LENGTH]}


def milliseconds() -> int:
    """Return the current time in the unit of `expires_at`."""
    return round(time.time() * 1e3)
