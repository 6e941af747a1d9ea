"""Tests of an application, as its developers write them."""

import asyncio
import contextlib
import threading
from urllib.request import Request, urlopen

from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.db import transaction
from django.test import LiveServerTestCase, SimpleTestCase, TestCase, TransactionTestCase

from aibind_postgres import AibindError, AsyncDurableStream, DurableStream

from .views import async_conversations, async_store, conversations, store, wrapped_store

BODY = '{"prompt": "Hello", "sessionId": "session"}'
TEXTS = [b"data: Hello: ", b"data: 1 users"]


class InTransaction(TestCase):
    def setUp(self):
        User.objects.create_user("ada")

    def check_source_ran_here(self):
        def source():
            threads.append(threading.current_thread())
            yield User.objects.get().username

        threads, finished = [], []
        stream = DurableStream.start(
            store, source(), id="same in each test", on_finish=lambda *call: finished.append(call), timeout=60
        )
        assert threads == [threading.current_thread()]
        assert finished == [("ada", ("done", None, 1))]
        assert store.get_status(stream.id) == ("done", None, 1)
        assert stream.wait(0) == ("done", None, 1)
        assert [event.data for event in store.events(stream.id)] == ["ada"]
        assert b"data: ada" in b"".join(stream.sse())
        assert User.objects.exists()  # the connection is still open

    def test_source_runs_before_start_returns(self):
        self.check_source_ran_here()

    def test_rows_are_rolled_back_after_each_test(self):
        assert list(store.list()) == []
        self.check_source_ran_here()

    def test_failing_source(self):
        def source():
            yield "a"
            raise ValueError("hidden")

        with self.assertLogs("aibind_postgres"):
            stream = DurableStream.start(store, source())
        assert stream.wait(0).state == "error"

    def test_source_that_stops_its_stream(self):
        def source():
            yield "a"
            store.stop("one")
            yield "b"

        DurableStream.start(store, source(), id="one")
        assert store.get_status("one") == ("stopped", None, 1)

    def test_produce(self):
        store.create("job", lease=60)
        assert DurableStream.produce(store, "job", iter(["a", "b"])) == ("done", None, 2)

    def test_writer(self):
        store.create("written")
        with store.writer("written") as writer:
            writer.text("a")
        assert store.get_status("written") == ("done", None, 1)

    def test_request(self):
        response = self.client.post("/__aibind__/stream", BODY, "application/json")
        body = b"".join(response.streaming_content)
        for text in TEXTS:
            assert text in body
        assert conversations.load("session").messages[-1]["content"] == "Hello: 1 users"
        assert User.objects.exists()

    def test_a_block_of_the_application_is_no_obstacle(self):
        with transaction.atomic():
            stream = DurableStream.start(store, iter(["a"]))
        assert stream.wait(0).state == "done"

    def test_wrap_django(self):
        assert DurableStream.start(wrapped_store, iter(["a"])).wait(0) == ("done", None, 1)
        with transaction.atomic():  # which the producer would not see outside of tests either
            stream = DurableStream.start(wrapped_store, iter(["a"]))
            with contextlib.suppress(AibindError):
                stream.wait(20)
                self.fail("the producer has found its stream")

    async def test_asynchronous_request(self):
        response = await self.async_client.post("/async/stream", BODY, "application/json")
        body = b"".join([part async for part in response.streaming_content])
        for text in TEXTS:
            assert text in body
        chat = await async_conversations.load("session")
        assert chat.messages[-1]["content"] == "Hello: 1 users"
        assert await User.objects.aexists()

    async def test_asynchronous_source_runs_before_start_returns(self):
        async def source():
            yield (await User.objects.aget()).username

        stream = await AsyncDurableStream.start(async_store, source(), id="same in each test")
        assert await async_store.get_status(stream.id) == ("done", None, 1)
        assert await stream.wait(0) == ("done", None, 1)
        assert b"data: ada" in b"".join([part async for part in stream.sse()])

    async def test_rows_are_visible_in_both_flavours(self):
        await async_store.create("both")
        assert [info.id async for info in async_store.list()] == ["both"]

        def list_ids():
            return [info.id for info in store.list()]

        assert await sync_to_async(list_ids)() == ["both"]


class Committed(TransactionTestCase):
    def check_source_ran_in_a_thread(self):
        def source():
            threads.append(threading.current_thread())
            yield "a"

        threads = []
        assert list(store.list()) == []
        assert conversations.load("session").is_empty
        stream = DurableStream.start(store, source(), id="same in each test")
        assert stream.wait(30) == ("done", None, 1)
        assert threads != [threading.current_thread()]
        with conversations.edit("session") as chat:
            chat.append("a")

    def test_source_runs_in_a_thread(self):
        self.check_source_ran_in_a_thread()

    def test_rows_are_deleted_after_each_test(self):
        self.check_source_ran_in_a_thread()

    async def test_asynchronous_store(self):
        async def source():
            yield "a"
            await asyncio.sleep(0)

        stream = await AsyncDurableStream.start(async_store, source(), id="same in each test")
        assert await stream.wait(30) == ("done", None, 1)


class WithoutDatabase(SimpleTestCase):
    def test_store_is_refused(self):
        with self.assertRaisesMessage(AssertionError, "Database connections to 'default' are not allowed"):
            store.create()

    async def test_asynchronous_store_is_refused(self):
        with self.assertRaisesMessage(AssertionError, "Database connections to 'default' are not allowed"):
            await async_store.create()


class Live(LiveServerTestCase):
    def test_request(self):
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"{self.live_server_url}/__aibind__/stream", BODY.encode(), headers), timeout=30) as body:
            assert b"data: 0 users" in body.read()
        [info] = store.list()
        assert info.state == "done"
