"""Kills of web processes and of a worker process during many chats lose and duplicate no acknowledged data."""

from __future__ import annotations

import json
import math
import statistics
import threading
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import psycopg
import pytest
from support.chat_processes import SERVERS, Killer, Processes
from support.chat_users import Browser, Reading, SecondTab, User, producer_of

from aibind_postgres import _leases

CHATS = 20
TABS = 5  # second tabs
SEED = 11

PROMISED = 2.0  # seconds after the lease, or after the time of contact, until a reader receives the end
TOLERATED = 30.0  # the same on an overloaded machine


class Stream(NamedTuple):
    """A stored stream."""

    session_id: str
    state: str
    error: str | None
    lease_until: float | None
    texts: list[str]

    @property
    def text(self) -> str:
        return "".join(self.texts)


def objects_without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    assert len(dict(pairs)) == len(pairs), f"a key occurs twice in {[key for key, _ in pairs]}"
    return dict(pairs)


def stored_streams(dsn: str) -> dict[str, Stream]:
    """Return the streams by id. Check that their chunks are complete, and the tokens of one producer in order."""
    with psycopg.connect(dsn) as connection:
        statement = "SELECT id, session_id, state, error, lease_until, total_chunks FROM aibind_stream_status"
        rows = connection.execute(statement).fetchall()
        chunks = connection.execute("SELECT id, seq, data FROM aibind_stream_chunks ORDER BY id, seq").fetchall()
    texts: dict[str, list[str]] = {id: [] for id, *_ in rows}
    pids: dict[str, set[int | None]] = {id: set() for id in texts}
    for id, seq, data in chunks:
        texts[id].append(data.removeprefix("\x01"))
        assert seq == len(texts[id]), f"chunk {seq} of {id} is chunk {len(texts[id])}"
        pids[id].add(producer_of(id, seq, texts[id][-1]))
    for id, _, _, _, _, total in rows:
        assert total == len(texts[id])
        assert len(pids[id]) <= 1, f"{id} was produced by {pids[id]}"
        assert None not in pids[id], f"{id} has the wrong tokens: {texts[id]}"
    return {
        id: Stream(session_id, state, error, lease_until and lease_until / 1000, texts[id])
        for id, session_id, state, error, lease_until, _ in rows
    }


def stored_conversations(dsn: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the owners and documents by session id."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("SELECT session_id, owner, data FROM aibind_conversations").fetchall()
    return {id: (owner, json.loads(data, object_pairs_hook=objects_without_duplicates)) for id, owner, data in rows}


def check_readings(readings: list[Reading], streams: dict[str, Stream]) -> None:
    for reading in readings:
        stream = streams[reading.stream_id]
        received = len(reading.texts)
        assert reading.texts == stream.texts[:received]
        if reading.ended_at is not None:
            assert received == len(stream.texts)
            assert stream.state == ("done" if reading.error is None else "error")
            assert stream.error == reading.error


def delays_of_ends(readings: list[Reading], streams: dict[str, Stream], contact: float) -> list[float]:
    """Return the seconds from the expiry of a lease until each reader received the end of the stream, sorted.

    They count from `contact` seconds after the reader has connected if that is later.
    """
    return sorted(
        reading.ended_at - max(stream.lease_until, reading.connected_at + contact)
        for reading in readings
        if (stream := streams[reading.stream_id]).error == _leases.EXPIRED_TEXT
        and stream.lease_until is not None
        and reading.ended_at is not None
    )


def print_figures(users: list[User], readings: list[Reading], streams: dict[str, Stream], late: list[float]) -> None:
    asked = [asked for user in users for asked in user.asked]
    unanswered = sum(len(user.unanswered_requests) for user in users)
    print(f"questions: {len(asked)}, {sum(each.left for each in asked)} of them left; {unanswered} without a response")
    print(f"streams: {dict(Counter(stream.state for stream in streams.values()))}")
    stored = sum(len(stream.texts) for stream in streams.values())
    print(f"tokens: {stored} stored, {sum(len(reading.texts) for reading in readings)} received")
    after_lease = delays_of_ends(readings, streams, -math.inf)
    print(f"readers that received the end after an expired lease: {len(late)}")
    print(f"seconds after the lease: {distribution(after_lease)}")
    print(f"seconds after the lease and the time of contact: {distribution(late)}")
    print(f"after more than {PROMISED:g} seconds: {sum(seconds > PROMISED for seconds in late)}")


def distribution(seconds: list[float]) -> str:
    """Return the median and the last values of a sorted list, as text."""
    return f"median {statistics.median(seconds or [0]):.2f}, last {[round(each, 2) for each in seconds[-5:]]}"


def check_conversation(document: dict[str, Any], user: User, streams: dict[str, Stream]) -> None:
    """Check the questions, the answers, and their order."""
    nodes = document["nodes"]
    role = {id: node["message"]["role"] for id, node in nodes.items()}
    assert all(node["message"]["content"].strip() for node in nodes.values())
    for id, node in nodes.items():  # on every path, also those of alternatives
        is_after_question = node["parentId"] is not None and role[node["parentId"]] == "user"
        assert role[id] == ("assistant" if is_after_question else "user"), f"{id} has the role {role[id]}"

    by_prompt = {node["message"]["content"]: node for node in nodes.values() if node["message"]["role"] == "user"}
    prompts = Counter(node["message"]["content"] for id, node in nodes.items() if role[id] == "user")
    acknowledged = [asked.prompt for asked in user.asked]
    assert set(prompts.values()) == {1}, "a question is stored twice"
    assert set(acknowledged) <= prompts.keys() <= set(acknowledged) | user.unanswered_requests
    for asked in user.asked:
        question, stream = by_prompt[asked.prompt], streams[asked.stream_id]
        assert question["metadata"] == {"streamId": asked.stream_id}
        assert stream.state != "active"
        answers = [asked.stream_id] if stream.text else []
        assert question["children"] == answers or (asked.left and not question["children"]), f"{asked} has no answer"

    for id in (id for id in nodes if role[id] == "assistant"):
        answer, stream = nodes[id], streams[id]
        assert nodes[answer["parentId"]]["metadata"]["streamId"] == id
        if answer["metadata"]:
            assert answer["metadata"] == {"state": stream.state}
            # A living producer that has lost its lease saves the tokens that it could not store, too.
            assert answer["message"]["content"].startswith(stream.text)
        else:  # complete, although a process that is killed before it ends the stream leaves state error
            assert answer["message"]["content"] == stream.text

    waited = [asked for asked in user.asked if not asked.left]
    prompts_on_path = path_to(nodes, document["activeLeafId"])
    on_path = [asked for asked in waited if asked.prompt in prompts_on_path]
    assert on_path == sorted(on_path, key=lambda asked: prompts_on_path.index(asked.prompt))
    with_text = [asked for asked in waited if streams[asked.stream_id].text]
    assert on_path in (with_text, [*with_text, waited[-1]]), "an answered question is not on the current path"


def show_left_questions(document: dict[str, Any], user: User, streams: dict[str, Stream]) -> None:
    """Open each question that the user left before its answer was stored. Check that it has an answer then."""
    ids = {node["metadata"].get("streamId"): id for id, node in document["nodes"].items()}
    for asked in user.asked:
        stream = streams[asked.stream_id]
        if stream.text and asked.stream_id not in document["nodes"]:
            nodes = user.show(ids[asked.stream_id])["history"]["nodes"]
            assert nodes[asked.stream_id]["message"] == {"role": "assistant", "content": stream.text}


def path_to(nodes: dict[str, Any], id: str | None) -> list[str]:
    path: list[str] = []
    while id is not None:
        path.insert(0, nodes[id]["message"]["content"])
        id = nodes[id]["parentId"]
    return path


def check_acknowledged(lines: list[str], streams: dict[str, Stream]) -> None:
    """Check the numbers of stored tokens that the producers have read."""
    latest: dict[str, int] = {}
    for line in lines:
        id, count = line.split()
        assert int(count) >= latest.get(id, 0), f"{id} had {latest[id]} tokens, and {count} later"
        latest[id] = int(count)
    for id, count in latest.items():
        assert count <= len(streams[id].texts), f"{id} has {len(streams[id].texts)} of {count} acknowledged tokens"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("server", SERVERS)
def test_killed_processes_lose_no_question_and_no_token(disposable_server, tmp_path, long, server):
    print(f"the seed is {SEED}")
    dsn = disposable_server.dsn
    finished = threading.Event()
    with Processes(server, dsn, tmp_path) as processes:
        users = [User(processes.port, f"user {number}", SEED + number, finished) for number in range(CHATS)]
        tabs = [SecondTab(processes.port, f"user {number}", -number, finished) for number in range(TABS)]
        browsers: list[Browser] = [*users, *tabs]
        killer = Killer(processes, browsers, SEED)
        for browser in browsers:
            browser.start()
        try:
            killer.run(30 if long else 2)
        finally:
            finished.set()
        killer.wait_for_ends()
        opened = {user.session_id: user.open_conversation()["history"] for user in users}
        streams, conversations = stored_streams(dsn), stored_conversations(dsn)
        readings = [reading for browser in browsers for reading in browser.readings]
        late = delays_of_ends(readings, streams, _leases.CONTACT)
        print(f"kills: {dict(killer.kills)}; resumes: {sum(browser.resumes for browser in browsers)}")
        print_figures(users, readings, streams, late)
        for user in users:
            show_left_questions(conversations[user.session_id][1], user, streams)

    check_acknowledged((tmp_path / "acknowledged").read_text().splitlines(), streams)
    assert late, "no kill has interrupted an answer"
    assert late[-1] < TOLERATED
    check_readings(readings, streams)

    assert {id: owner for id, (owner, _) in conversations.items()} == {user.session_id: user.name for user in users}
    ids = Counter(chain.from_iterable(document["nodes"] for _, document in conversations.values()))
    assert set(ids.values()) == {1}, "two conversations have a message of the same id"
    for user in users:
        document = conversations[user.session_id][1]
        assert opened[user.session_id]["activeLeafId"] == document["activeLeafId"]
        assert opened[user.session_id]["nodes"].keys() <= document["nodes"].keys()
        check_conversation(document, user, streams)
