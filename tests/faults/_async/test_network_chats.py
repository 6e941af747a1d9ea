"""Answers of a chat whose conversation store loses its connection."""

from __future__ import annotations

import json
import uuid

import pytest

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresConversationStore,
    AsyncStreamHandler,
    WebRequest,
)


@pytest.mark.parametrize("answered", [False, True], ids=["request lost", "reply lost"])
async def test_answer_is_saved_once(network, server_dsn, direct, answered, long):
    for _ in range(20 if long else 2):
        session_id, text = str(uuid.uuid4()), str(uuid.uuid4())

        async def generate(generation, text=text):
            network.cut_at(text, answered=answered)  # the streams do not use the proxy
            yield text

        async with AsyncPostgresConversationStore(network.dsn) as conversations:
            handler = AsyncStreamHandler(generate, store=direct, conversations=conversations, public=True)
            body = json.dumps({"prompt": "question", "sessionId": session_id}).encode()
            headers = {"content-type": "application/json"}
            faults = network.faults
            response = await handler.handle(WebRequest("POST", "/__aibind__/stream", {}, headers, body))
            assert response.status == 200
            assert (await direct.wait(response.headers["X-Stream-Id"], 60)).state == "done"
            assert await AsyncDurableStream.shutdown(direct, 60)
            assert network.faults == faults + 1
        async with AsyncPostgresConversationStore(server_dsn) as conversations:
            chat = await conversations.load(session_id)
        assert [message["content"] for message in chat.messages] == ["question", text]
        assert len(chat) == 2
