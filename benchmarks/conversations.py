"""Conversations: what it costs to save one and to load one, by its length, and what of that is the check for others."""

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

LENGTHS = (10, 1_000, 10_000)  # in messages
MESSAGE_LENGTH = 200  # in characters
LIFETIME = 1_800_000  # milliseconds; what a store takes if it is told nothing

WARM_UP = 10  # of each, until connections are open and statements prepared

# A server compresses long texts, so they are of words, in no order.
WORDS = """
    about after again answer because before between build change check could customer database every example first from
    have how invoice is it keep letter little make message month never not number of on one order other payment people
    please problem question read same second should since small something still table thank that the their there think
    this time to under until user very wait was week what where which while with would write year you your
"""

Message: TypeAlias = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """One conversation, and what is done with it. Each method begins with the same text stored, and gives its times."""

    text: str
    length: int
    key: str
    table: str
    store: PostgresConversationStore
    other_store: PostgresConversationStore
    connection: psycopg.Connection[Any]

    @property
    def works(self) -> dict[str, Callable[[], Figures]]:
        return {
            "save": self.save,
            "seed's save": self.save_as_seed,
            "merging save": self.save_merging,
            "load": self.load,
            "seed's load": self.load_as_seed,
        }

    def save(self) -> Figures:
        """Save after an append. The JSON work of it is timed by doing it once more."""
        chat = self._appended()
        begun = time.perf_counter()
        self.store.save(self.key, chat)
        saved = time.perf_counter()
        chat.to_json()
        sha256(self.text.encode()).hexdigest()
        share = (time.perf_counter() - saved) / (saved - begun) * 100
        return {"p50": (saved - begun) * 1e3, "json": share, "database": 100 - share}

    def save_merging(self) -> Figures:
        """Save after an append, when another store has saved an append of its own in between."""
        chat, theirs = self._appended(), self.other_store.load(self.key)
        theirs.append(message(Random()))
        self.other_store.save(self.key, theirs)
        begun = time.perf_counter()
        self.store.save(self.key, chat)
        taken = time.perf_counter() - begun
        if len(chat) != self.length + 2:
            raise RuntimeError(f"{self.length} messages and two appends were merged into {len(chat)}")
        return {"p50": taken * 1e3}

    def save_as_seed(self) -> Figures:
        """Save after an append as the seed does: the same text, and whatever is stored is replaced."""
        chat = self._appended()
        begun = time.perf_counter()
        self._write(chat.to_json())
        return {"p50": (time.perf_counter() - begun) * 1e3}

    def load(self) -> Figures:
        self._write(self.text)
        begun = time.perf_counter()
        self.store.load(self.key)
        return {"p50": (time.perf_counter() - begun) * 1e3}

    def load_as_seed(self) -> Figures:
        """Load as the seed does, which takes the JSON text as it is."""
        self._write(self.text)
        begun = time.perf_counter()
        statement = f"SELECT data FROM {self.table} WHERE session_id = $1 AND expires_at > $2"
        [(text,)] = self.connection.execute(statement, [self.key, milliseconds()], binary=True).fetchall()
        json.loads(text)
        return {"p50": (time.perf_counter() - begun) * 1e3}

    def _appended(self) -> ChatHistory[Message]:
        self._write(self.text)
        chat = self.store.load(self.key)
        chat.append(message(Random()))
        return chat

    def _write(self, text: str) -> None:
        """Run the seed's statement. Unlike the seed's client, psycopg may prepare it, as it does with ours."""
        statement = f"""
            INSERT INTO {self.table} (session_id, data, expires_at) VALUES ($1, $2, $3)
            ON CONFLICT (session_id) DO UPDATE SET data = EXCLUDED.data, expires_at = EXCLUDED.expires_at"""
        self.connection.execute(statement, [self.key, text, milliseconds() + LIFETIME], binary=True)


def conversations(bench: Bench) -> list[Row]:
    """Save and load conversations of each length in turn; in the short form, without the longest."""
    tables = bench.tables("conversations")
    table = f"{tables.schema}.conversations"
    lengths = LENGTHS[:-1] if bench.quick else LENGTHS
    seconds = bench.seconds / 20  # short turns, so that those of contestants are close to each other
    turns: dict[str, Callable[[], Figures] | Missing] = {}
    with ExitStack() as stack:
        store, other = (stack.enter_context(PostgresConversationStore(tables.dsn, table=table)) for _ in range(2))
        connection = stack.enter_context(tables.connect())
        for length in lengths:
            text = conversation_text(length)
            conversation = Conversation(text, length, str(length), table, store, other, connection)
            for name, work in conversation.works.items():
                turns[f"{length:,} messages, {name}"] = partial(repeat, work, seconds)
                if length == lengths[0]:
                    repeat(work, 0, least=WARM_UP)
        found = bench.take_turns(turns, rounds=bench.rounds if bench.quick else 2 * bench.rounds)
    return [row for length in lengths for row in rows_of(f"{length:,} messages", found)]


def rows_of(messages: str, found: dict[str, Results]) -> list[Row]:
    saved, merged, loaded = (found[f"{messages}, {work}"] for work in ("save", "merging save", "load"))
    seed_saved, seed_loaded = (found[f"{messages}, {work}"] for work in ("seed's save", "seed's load"))
    work = f"save, {messages}"
    return [
        compare(work, "p50", saved, "to_json, the seed's statement", seed_saved),
        Row(f"{work}: to_json and digest", "%", saved.figures["json"]),
        Row(f"{work}: database", "%", saved.figures["database"]),
        compare(f"{work}, merging", "p50", merged, "nothing to merge", saved),
        compare(f"load, {messages}", "p50", loaded, "the seed's statement, json.loads", seed_loaded),
    ]


def repeat(work: Callable[[], Figures], seconds: float, least: int = 1) -> Figures:
    """Do something for a while, and return the medians of its figures."""
    taken: list[Figures] = []
    end = time.perf_counter() + seconds
    while len(taken) < least or time.perf_counter() < end:
        taken.append(work())
    return {name: median(figures[name] for figures in taken) for name in taken[0]}


def conversation_text(length: int) -> str:
    """Return a conversation with one path, as it is stored."""
    chat: ChatHistory[Message] = ChatHistory()
    random = Random(length)
    for _ in range(length):
        chat.append(message(random))
    return chat.to_json()


def message(random: Random) -> Message:
    words = " ".join(random.choices(WORDS.split(), k=MESSAGE_LENGTH // 2))
    return {"role": random.choice(["user", "assistant"]), "content": words[:MESSAGE_LENGTH]}


def milliseconds() -> int:
    """Return the time as a row has it."""
    return round(time.time() * 1e3)
