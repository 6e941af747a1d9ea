"""Network faults during single calls: no chunk is stored twice, none that was acknowledged is lost, no call hangs."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support import proxy
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until

from aibind_postgres import (
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    StreamExistsError,
    StreamNotActiveError,
    StreamWriteError,
    WebRequest,
)

HANG = 30  # seconds after which a call counts as hanging
TIMEOUT = {"timeout": 1.0}  # the store option that bounds calls to a silent server
LOST = (psycopg.OperationalError, StreamWriteError)
TEXTS = [f"written {number}" for number in range(1, 31)]
names = (f"stream {number}" for number in count(1))


async def texts_of(store, id):
    return [(chunk.seq, chunk.data) async for chunk in store.read_from(id, follow=False)]


def numbered(texts):
    return list(enumerate(texts, 1))


async def bounded(network, call):
    """Return a call's result and its connection error, one of them None. The call must not hang."""
    async with AsyncBackground(call) as running:
        try:
            return await running.result(HANG), None
        except LOST as error:
            return None, error
        except BaseException:
            network.heal()
            network.cut()  # ends a call that hangs
            raise


async def retry(network, call):
    """Repeat a call until it succeeds: a pool notices its cut connections one by one."""
    for _ in range(20):
        result, error = await bounded(network, call)
        if error is None:
            return result
        await async_sleep(0.05)
    raise error


@dataclass
class Trial:
    """The stores behind the network, the stores without it, a stream, and the number of calls."""

    store: AsyncPostgresStreamStore
    conversations: AsyncPostgresConversationStore
    direct: AsyncPostgresStreamStore
    direct_conversations: AsyncPostgresConversationStore
    server_dsn: str
    id: str
    calls: int = 0

    async def end_sessions(self):
        """Close the stores behind the network, and wait until the server has executed everything that they sent."""
        await self.store.close()
        await self.conversations.close()
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        with psycopg.connect(self.server_dsn, autocommit=True) as admin:
            await async_until(lambda: admin.execute(sessions, [self.id]).fetchone() == (0,))


@asynccontextmanager
async def open_trial(network, server_dsn, direct, options):
    """Yield a trial with an active stream of three chunks, a conversation, and open connections."""
    id = await direct.create(next(names))
    await direct.append_many(id, ["a", "b", "c"])
    dsn = make_conninfo(network.dsn, application_name=id)
    async with (
        AsyncPostgresConversationStore(server_dsn) as direct_conversations,
        AsyncPostgresStreamStore(dsn, retry_for=2, **options) as store,
        AsyncPostgresConversationStore(dsn, **options) as conversations,
    ):
        async with direct_conversations.edit(id) as chat:
            chat.append({"role": "user"})
        await store.get_status("nothing")
        await conversations.touch("nothing")
        yield Trial(store, conversations, direct, direct_conversations, server_dsn, id)


class Append:
    retries, marker = False, None

    async def prepare(self, trial): ...

    async def call(self, trial):
        return await trial.store.append(trial.id, "d", expected_seq=4)

    async def check(self, trial, result):
        assert result == 4
        assert await texts_of(trial.direct, trial.id) == numbered("abcd")


class AppendMany(Append):
    async def call(self, trial):
        return await trial.store.append_many(trial.id, TEXTS, expected_seq=4)

    async def check(self, trial, result):
        assert result == 3 + len(TEXTS)
        assert await texts_of(trial.direct, trial.id) == numbered(["a", "b", "c", *TEXTS])


class Write(Append):
    retries, marker = True, TEXTS[0]

    async def call(self, trial):
        stored = len(await texts_of(trial.direct, trial.id)) - 3
        try:
            async with trial.store.writer(trial.id) as writer:
                for text in TEXTS[stored:]:
                    await writer.write(text)
        except StreamNotActiveError:
            assert trial.calls > 1  # an earlier call ended the stream, and its reply was lost

    async def check(self, trial, result):
        status = await trial.direct.get_status(trial.id)
        found = await texts_of(trial.direct, trial.id)
        assert found == numbered(["a", "b", "c", *TEXTS])[: len(found)]
        complete = len(found) == 3 + len(TEXTS)
        assert complete or status.state == "error"  # a writer that gives up fails its stream
        assert trial.calls > 1 or (complete and status.state == "done")


class Create(Append):
    async def call(self, trial):
        try:
            return await trial.store.create(f"{trial.id}, new")
        except StreamExistsError:
            assert trial.calls > 1
            return f"{trial.id}, new"

    async def check(self, trial, result):
        assert (await trial.direct.get_status(result))[:] == ("active", None, 0)


class Complete(Append):
    state, error = "done", None

    async def call(self, trial):
        return await trial.store.complete(trial.id)

    async def check(self, trial, result):
        assert result or trial.calls > 1
        assert (await trial.direct.get_status(trial.id))[:] == (self.state, self.error, 3)


class Stop(Complete):
    state = "stopped"

    async def call(self, trial):
        return await trial.store.stop(trial.id)


class Fail(Complete):
    state, error = "error", "too hot"

    async def call(self, trial):
        return await trial.store.fail(trial.id, "too hot")


class Delete(Append):
    async def call(self, trial):
        return await trial.store.delete(trial.id)

    async def check(self, trial, result):
        assert result or trial.calls > 1
        assert await trial.direct.get_status(trial.id) is None
        await trial.end_sessions()  # the network may deliver an earlier call late, which would delete the next stream
        await trial.direct.create(trial.id)
        assert await texts_of(trial.direct, trial.id) == []


class Cleanup(Append):
    marker = "aibind_stream_chunks"

    async def prepare(self, trial):
        async with AsyncPostgresStreamStore(trial.server_dsn, ttl=0.001) as store:
            await store.create(f"{trial.id}, expired")
            await store.append(f"{trial.id}, expired", "x")
            await store.complete(f"{trial.id}, expired")
        await async_sleep(0.01)

    async def call(self, trial):
        return await trial.store.cleanup()

    async def check(self, trial, result):
        assert result == (1, 1) or trial.calls > 1
        while await trial.direct.get_status(f"{trial.id}, expired"):  # an earlier call may still run on the server
            await async_sleep(0.01)
        assert await texts_of(trial.direct, trial.id) == numbered("abc")


class ReadFrom(Append):
    retries = True

    async def prepare(self, trial):
        await trial.direct.complete(trial.id)

    async def call(self, trial):
        return [(chunk.seq, chunk.data) async for chunk in trial.store.read_from(trial.id)]

    async def check(self, trial, result):
        assert result == numbered("abc")


class Wait(ReadFrom):
    async def call(self, trial):
        return await trial.store.wait(trial.id)

    async def check(self, trial, result):
        assert result[:] == ("done", None, 3)


class GetStatus(Append):
    async def call(self, trial):
        return await trial.store.get_status(trial.id)

    async def check(self, trial, result):
        assert result[:] == ("active", None, 3)


class Load(Append):
    async def call(self, trial):
        return await trial.conversations.load(trial.id)

    async def check(self, trial, result):
        assert list(result.messages) == [{"role": "user"}]


class Save(Append):
    async def prepare(self, trial):
        self.chat = await trial.conversations.load(trial.id)
        self.chat.append({"role": "assistant"})

    async def call(self, trial):
        await trial.conversations.save(trial.id, self.chat, on_conflict="raise")

    async def check(self, trial, result):
        stored = await trial.direct_conversations.load(trial.id)
        assert stored.to_json() == self.chat.to_json()
        assert len(stored) == 2


OPERATIONS = [Append, AppendMany, Write, Create, Stop, Complete, Fail, Delete, Cleanup, ReadFrom, Wait, GetStatus]
OPERATIONS += [Load, Save]

TRANSIENT = {
    "cut": lambda network, marker: network.cut(),
    "request lost": lambda network, marker: network.cut_at(marker, answered=False),
    "reply lost": lambda network, marker: network.cut_at(marker, answered=True),
    "delayed": lambda network, marker: network.delay(0.02),
}


@pytest.mark.parametrize("fault", [*TRANSIENT, *proxy.LASTING])
@pytest.mark.parametrize("kind", OPERATIONS)
async def test_operation_succeeds_or_raises_and_its_retry_is_safe(network, server_dsn, direct, kind, fault, long):
    options = TIMEOUT if fault in proxy.LASTING else {}
    for _ in range((2 if fault in proxy.LASTING else 5) if long else 1):
        operation = kind()
        async with open_trial(network, server_dsn, direct, options) as trial:
            await operation.prepare(trial)

            async def call(operation=operation, trial=trial):
                trial.calls += 1
                return await operation.call(trial)

            faults = network.faults
            if fault in TRANSIENT:
                TRANSIENT[fault](network, operation.marker or trial.id)
            else:
                proxy.LASTING[fault](network)
            result, error = await bounded(network, call)
            # Another statement with the marker may have met the fault, and may still be running.
            expected = faults + (fault in ("request lost", "reply lost"))
            await async_until(lambda expected=expected: network.faults == expected)
            network.heal()
            if fault == "delayed" or (fault in TRANSIENT and operation.retries):
                assert error is None
            if fault in proxy.LASTING:
                assert error is not None
            if error is not None:
                result = await retry(network, call)
            await operation.check(trial, result)


@pytest.mark.parametrize("answered", [False, True], ids=["request lost", "reply lost"])
async def test_retry_of_combined_appends_is_safe(network, direct, answered, long):
    async with AsyncPostgresStreamStore(network.dsn) as store:
        await store.get_status("nothing")
        for _ in range(30 if long else 3):
            ids = [await direct.create(next(names)) for _ in range(20)]

            async def append(id):
                assert await retry(network, partial(store.append, id, id, expected_seq=1)) == 1

            network.cut_at(ids[-1], answered=answered)
            await async_gather(*[partial(append, id) for id in ids])
            network.heal()
            for id in ids:
                assert await texts_of(direct, id) == [(1, id)]


async def test_close_ends_unanswered_calls(network, direct):
    id = await direct.create(next(names))
    store = AsyncPostgresStreamStore(network.dsn, **TIMEOUT)
    await store.get_status(id)
    network.stall(*proxy.BOTH)
    async with AsyncBackground(partial(async_gather, *[partial(store.append, id, "x")] * 5, errors=True)) as calls:
        await async_sleep(0.2)
        try:
            await bounded(network, store.close)
            assert all(isinstance(error, Exception) for error in await calls.result(HANG))
        finally:
            network.heal()
            network.cut()


async def test_concurrent_first_calls_share_one_connection_timeout(network):
    network.stall(*proxy.BOTH)
    async with AsyncPostgresStreamStore(f"{network.dsn} connect_timeout=2") as store:
        calls = [partial(store.get_status, "nothing")] * 20
        errors, _ = await bounded(network, partial(async_gather, *calls, errors=True))
        assert all(isinstance(error, psycopg.OperationalError) for error in errors)
        assert len(set(map(id, errors))) == len(errors)
        network.heal()
        assert await store.get_status("nothing") is None


async def test_handler_responds_503_while_the_server_is_unreachable(network, caplog):
    async with AsyncPostgresStreamStore(network.dsn) as store:
        handler = AsyncStreamHandler(iter, store=store)
        request = WebRequest("GET", "/__aibind__/stream/resume", {"id": "none"}, {}, b"")
        assert (await handler.handle(request)).status == 404
        network.refuse()
        network.cut()
        response = await handler.handle(request)
        assert (response.status, response.headers.get("Retry-After")) == (503, "5")
        network.heal()
        await retry(network, partial(store.get_status, "none"))
        assert (await handler.handle(request)).status == 404
    assert "the database is unavailable" in caplog.text
    assert "Traceback" not in caplog.text
