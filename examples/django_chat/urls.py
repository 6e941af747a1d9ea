"""URLs of the page and of the stream handler."""

from django.urls import path
from django.views.decorators.http import require_GET
from shared.model import generate

from aibind_postgres import StreamHandler
from aibind_postgres.contrib import django as aibind

from . import views

handler = StreamHandler(generate, store=views.store, conversations=views.conversations, owner=views.owner)

urlpatterns = [
    path("", require_GET(views.page)),
    path("page/<path:name>", require_GET(views.file)),
    *aibind.urlpatterns(handler),
]
