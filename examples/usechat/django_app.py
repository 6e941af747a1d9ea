"""A chat with `useChat` of the AI SDK, in Django. Run these commands in this folder.

npm install && npm run build
pip install 'aibind-postgres[binary,cli,django]' gunicorn
export DATABASE_URL=postgresql://…
aibind-postgres migrate && gunicorn --threads 100 django_app:application
"""

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.urls import path
from django.views.static import serve

from aibind_postgres import AiSdkHandler, Generation, PostgresConversationStore, PostgresStreamStore
from aibind_postgres.contrib.django import urlpatterns as chat_patterns

settings.configure(SECRET_KEY=secrets.token_hex(), ALLOWED_HOSTS=["127.0.0.1", "localhost"], ROOT_URLCONF=__name__)
store = PostgresStreamStore(os.environ["DATABASE_URL"])
conversations = PostgresConversationStore(os.environ["DATABASE_URL"], ttl=None)


def generate(generation: Generation) -> Iterator[str]:
    for word in f"You asked: {generation.prompt}".split():  # replace this with your model
        yield f"{word} "
        time.sleep(0.1)


# With `public`, the id of a chat suffices to read it. With a login, pass `owner` instead.
handler = AiSdkHandler(generate, store=store, conversations=conversations, public=True)
page = {"document_root": Path(__file__).with_name("dist")}
urlpatterns = [
    *chat_patterns(handler),
    path("", serve, {**page, "path": "index.html"}),
    path("<path:path>", serve, page),
]
application = get_wsgi_application()
