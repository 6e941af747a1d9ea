import asyncio

from django.contrib.auth.models import User

from aibind_postgres import AsyncStreamHandler, PostgresStreamStore, StreamHandler, wrap_django
from aibind_postgres.contrib import django as aibind

store = aibind.stream_store(poll_interval=0.05)
conversations = aibind.conversation_store(ttl=None)
wrapped_store = PostgresStreamStore(wrap_django(), poll_interval=0.05)
async_store = aibind.async_stream_store(poll_interval=0.05)
async_conversations = aibind.async_conversation_store(ttl=None)


def generate(generation):
    yield f"{generation.prompt}: "
    yield f"{User.objects.count()} users"


async def async_generate(generation):
    yield f"{generation.prompt}: "
    if generation.prompt == "Wait":
        await asyncio.sleep(600)
    yield f"{await User.objects.acount()} users"


handler = StreamHandler(generate, store=store, conversations=conversations, public=True)
async_handler = AsyncStreamHandler(
    async_generate, store=async_store, conversations=async_conversations, public=True, prefix="/async"
)
