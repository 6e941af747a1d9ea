"""Django: URL patterns of a handler, stores on the databases of DATABASES, and an app.

The app adds migrations, an admin, the command `manage.py aibind`, and system checks:

    INSTALLED_APPS = [..., "aibind_postgres.contrib.django"]
"""

from ._asgi import with_lifespan
from ._stores import async_conversation_store, async_stream_store, conversation_store, stream_store
from ._urls import urlpatterns

__all__ = [
    "async_conversation_store",
    "async_stream_store",
    "conversation_store",
    "stream_store",
    "urlpatterns",
    "with_lifespan",
]
