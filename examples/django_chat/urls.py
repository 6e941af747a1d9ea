"""URLs of the page, its conversations and the stream handler."""

from django.urls import path
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from aibind_postgres import StreamHandler
from aibind_postgres.contrib import django as aibind

from . import views

# Anyone with the id of a conversation can read and change it. Pass authorize=… to restrict that.
handler = StreamHandler(views.generate, store=views.store, conversations=views.conversations, public=True)

urlpatterns = [
    path("", require_GET(views.page)),
    path("page/<path:name>", require_GET(views.page)),
    path("conversation/<session>", require_http_methods(["GET", "DELETE"])(views.conversation)),
    path("conversation/<session>/answer/<id>", require_POST(views.answer_again)),
    path("conversation/<session>/<action>/<id>", require_POST(views.change)),
    *aibind.urlpatterns(handler),
]
