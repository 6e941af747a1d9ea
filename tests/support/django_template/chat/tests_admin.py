"""The admin of streams and conversations."""

from django import urls
from django.contrib.admin import AdminSite
from django.contrib.admin.models import LogEntry
from django.contrib.admin.utils import quote
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import TestCase, override_settings

from aibind_postgres import StreamEvent, models
from aibind_postgres.contrib.django.admin import ConversationAdmin
from aibind_postgres.contrib.django.models import Conversation

from .views import conversations, store

STREAMS = "/admin/aibind_postgres/stream/"
CONVERSATIONS = "/admin/aibind_postgres/conversation/"
HOSTILE = "<script>alert(1)</script>"

other_site = AdminSite("other")
other_site.register(Conversation, ConversationAdmin)
urlpatterns = [urls.path("other/", other_site.urls)]


class Admin(TestCase):
    def setUp(self):
        self.client.force_login(User.objects.create_superuser("root"))

    def ids(self, path, query=""):
        response = self.client.get(path, {"q": query} if query else None)
        assert response.status_code == 200
        return [row.pk for row in response.context["cl"].result_list]

    def login_with(self, *permissions):
        user = User.objects.create_user("ada", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
        self.client.force_login(user)


class Streams(Admin):
    def create(self, *chunks, id="one", **details):
        store.create(id, **details)
        if chunks:
            store.append_many(id, chunks)

    def tail(self, after="", id="one"):
        response = self.client.get(f"{STREAMS}{id}/chunks/?after={after}")
        assert response.status_code == 200
        return response.json()

    def test_list(self):
        self.create()
        self.create(id="two", owner="ada", session_id="chat")
        self.create(id="three", owner="ada")
        store.stop("two")
        assert self.ids(STREAMS) == ["two", "three", "one"]
        assert self.ids(f"{STREAMS}?state=stopped") == ["two"]
        assert self.ids(f"{STREAMS}?state=stoppd") == []
        assert self.ids(STREAMS, "one") == ["one"]
        assert self.ids(STREAMS, "ada") == ["two", "three"]
        assert self.ids(STREAMS, "chat") == ["two"]
        assert self.ids(STREAMS, "on") == []

    def test_rows_of_housekeeping_and_of_deletions_are_hidden(self):
        self.create()
        with connection.cursor() as cursor:
            cursor.execute("UPDATE aibind_stream_status SET state = 'deleted'")
        assert self.ids(STREAMS) == []
        assert self.client.get(f"{STREAMS}one/change/").status_code == 302

    def test_times_that_python_does_not_have(self):
        self.create()
        for time in ("-infinity", "infinity", "10000-01-01", "0001-01-01 BC"):
            with connection.cursor() as cursor:
                cursor.execute("UPDATE aibind_stream_status SET created_at = %s, expires_at = %s", [time, 2**63 - 1])
            assert self.ids(STREAMS) == ["one"]
            assert self.client.get(f"{STREAMS}one/change/").status_code == 200

    def test_tail(self):
        self.create("Hello", models.chunk_text(HOSTILE), models.chunk_text(StreamEvent("usage", "{}")))
        page = self.tail()
        assert page["chunks"] == [
            {"seq": 1, "event": "message", "data": "Hello"},
            {"seq": 2, "event": "message", "data": HOSTILE},
            {"seq": 3, "event": "usage", "data": "{}"},
        ]
        assert (page["state"], page["after"], page["last"], page["complete"]) == ("active", 0, 3, False)
        page = self.tail(2)
        assert [chunk["seq"] for chunk in page["chunks"]] == [3]
        store.fail("one", HOSTILE)
        page = self.tail(3)
        assert page == {
            "state": "error",
            "error": HOSTILE,
            "total": 3,
            "after": 3,
            "last": 3,
            "complete": True,
            "chunks": [],
        }

    def test_tail_of_a_long_stream(self):
        self.create(*map(str, range(1200)))
        store.complete("one")
        page = self.tail()
        assert (page["after"], page["last"], len(page["chunks"]), page["complete"]) == (700, 1200, 500, True)
        page = self.tail(0)
        assert (page["after"], page["last"], page["complete"]) == (0, 500, False)

    def test_chunks_of_other_wire_formats_are_shown_as_they_are_stored(self):
        self.create('{"type":"start"}', wire="ai_sdk")
        assert self.tail()["chunks"] == [{"seq": 1, "event": "ai_sdk", "data": '{"type":"start"}'}]

    def test_tail_of_a_missing_stream(self):
        assert self.client.get(f"{STREAMS}one/chunks/").status_code == 404

    def test_tail_after_an_invalid_number(self):
        self.create()
        for after in (2**63, "9" * 5000):
            assert self.client.get(f"{STREAMS}one/chunks/?after={after}").status_code == 400

    def test_page_escapes_texts(self):
        self.create(id=HOSTILE, owner=HOSTILE, metadata={"a": HOSTILE})
        store.fail(HOSTILE, HOSTILE)
        path = f"{STREAMS}{quote(HOSTILE)}/"
        response = self.client.get(f"{path}change/")
        assert response.status_code == 200
        assert HOSTILE not in response.content.decode()
        assert f'data-url="{path}chunks/"' in response.content.decode()
        assert self.client.get(f"{path}chunks/").json()["state"] == "error"
        assert HOSTILE not in self.client.get(STREAMS).content.decode()

    def test_stop(self):
        self.create()
        assert "Stop" in self.client.get(f"{STREAMS}one/change/").content.decode()
        response = self.client.post(f"{STREAMS}one/stop/", follow=True)
        assert "Streams stopped: 1." in response.content.decode()
        assert store.get_status("one").state == "stopped"
        assert LogEntry.objects.get().change_message == "Stopped."
        assert 'id="aibind-stop"' not in response.content.decode()
        assert self.client.get(f"{STREAMS}one/stop/").status_code == 405

    def test_stop_action(self):
        for id in ("one", "two", "ended"):
            self.create(id=id)
        store.complete("ended")
        data = {"action": "stop_streams", "_selected_action": ["one", "ended"]}
        response = self.client.post(STREAMS, data, follow=True)
        assert "Streams stopped: 1." in response.content.decode()
        states = {info.id: info.state for info in store.list()}
        assert states == {"one": "stopped", "two": "active", "ended": "done"}

    def test_view_permission(self):
        self.create("text")
        self.login_with("view_stream")
        assert self.ids(STREAMS) == ["one"]
        assert self.tail()["last"] == 1
        assert "Stop" not in self.client.get(f"{STREAMS}one/change/").content.decode()
        assert self.client.post(f"{STREAMS}one/stop/").status_code == 403
        self.client.post(STREAMS, {"action": "stop_streams", "_selected_action": ["one"]})
        assert store.get_status("one").state == "active"

    def test_missing_permission_does_not_show_which_streams_exist(self):
        self.create()
        self.login_with()
        for id in ("one", "missing"):
            assert self.client.get(f"{STREAMS}{id}/chunks/").status_code == 403
            assert self.client.post(f"{STREAMS}{id}/stop/").status_code == 403

    def test_stop_permission_needs_the_view_permission(self):
        self.create()
        self.login_with("stop_stream")
        for path in (STREAMS, f"{STREAMS}one/change/", f"{STREAMS}one/chunks/"):
            assert self.client.get(path).status_code == 403
        assert self.client.post(f"{STREAMS}one/stop/").status_code == 403
        User.objects.get(username="ada").user_permissions.add(Permission.objects.get(codename="view_stream"))
        assert self.client.post(f"{STREAMS}one/stop/").status_code == 302
        assert store.get_status("one").state == "stopped"

    def test_without_a_login(self):
        self.create()
        self.client.logout()
        for path in (STREAMS, f"{STREAMS}one/change/", f"{STREAMS}one/chunks/"):
            assert self.client.get(path).url.startswith("/admin/login/")
        assert self.client.post(f"{STREAMS}one/stop/").url.startswith("/admin/login/")
        assert store.get_status("one").state == "active"

    def test_addresses_with_a_nul(self):
        self.create()
        assert self.client.get(f"{STREAMS}one%00/change/").status_code == 302
        assert self.client.get(f"{STREAMS}one%00/chunks/").status_code == 404
        assert self.client.post(f"{STREAMS}one%00/stop/").status_code == 404
        assert self.client.get(f"{CONVERSATIONS}one%00/change/").status_code == 302
        for query in ("state=%00", "q=%00", "id=%00", "owner__in=a,%00", "metadata__a=%00"):
            assert self.client.get(f"{STREAMS}?{query}").status_code == 400, query
        assert self.client.get(f"{CONVERSATIONS}?title=%00").status_code == 400
        selected = {"action": "stop_streams", "_selected_action": ["one", "\0"]}
        assert self.client.post(STREAMS, selected).status_code == 400
        assert store.get_status("one").state == "active"

    def test_nothing_can_be_added_changed_or_deleted(self):
        self.create()
        assert self.client.post(f"{STREAMS}add/", {"id": "two"}).status_code == 403
        assert self.client.post(f"{STREAMS}one/change/", {"state": "done"}).status_code == 403
        assert self.client.post(f"{STREAMS}one/delete/", {"post": "yes"}).status_code == 403
        data = {"action": "delete_selected", "_selected_action": ["one"], "post": "yes"}
        self.client.post(STREAMS, data)
        assert [info.state for info in store.list()] == ["active"]


class Conversations(Admin):
    def page(self, session_id="one"):
        response = self.client.get(f"{CONVERSATIONS}{session_id}/change/")
        assert response.status_code == 200
        return response

    def test_list(self):
        for session_id, owner, title in (("one", "ada", "About trees"), ("two", "bob", None)):
            with conversations.edit(session_id, owner=owner) as chat:
                chat.append({"role": "user", "content": "Hi"})
            conversations.describe(session_id, title=title)
        assert self.ids(CONVERSATIONS) == ["two", "one"]
        assert self.ids(CONVERSATIONS, "TREE") == ["one"]
        assert self.ids(CONVERSATIONS, "bob") == ["two"]
        assert self.ids(CONVERSATIONS, "one") == ["one"]
        assert self.ids(CONVERSATIONS, "o") == ["one"]  # a part of a title

    def test_expired_conversations_are_hidden(self):
        with conversations.edit("one") as chat:
            chat.append("Hi")
        with connection.cursor() as cursor:
            cursor.execute("UPDATE aibind_conversations SET expires_at = 0")
        assert self.ids(CONVERSATIONS) == []

    def test_conversation_from_before_migration_0004(self):
        with conversations.edit("one") as chat:
            chat.append("Hi")
        with connection.cursor() as cursor:
            cursor.execute("UPDATE aibind_conversations SET updated_at = '-infinity', created_at = NULL")
        assert self.ids(CONVERSATIONS) == ["one"]
        self.page()

    def test_branches(self):
        with conversations.edit("one") as chat:
            question = chat.append({"role": "user", "content": "Why?"})
            chat.append({"role": "assistant", "content": "First answer"})
            chat.append({"role": "user", "content": "Really?"})
            chat.tree.branch(question, {"role": "assistant", "parts": [{"type": "text", "text": "Second answer"}]})
        lines = self.page().context["lines"]
        assert [line[:5] for line in lines] == [
            ("user", "Why?", 0, "", True),
            ("assistant", "First answer", 1, "1 of 2", False),
            ("user", "Really?", 1, "", False),
            ("assistant", "Second answer", 1, "2 of 2", True),
        ]

    def test_messages_of_other_shapes(self):
        messages = ["text", 7, {"role": 7, "content": ""}, {"content": [{"type": "image"}]}]
        with conversations.edit("one") as chat:
            for message in messages:
                chat.append(message)
        assert [line.role for line in self.page().context["lines"]] == [""] * 4

    def test_page_escapes_texts(self):
        with conversations.edit("one", owner=HOSTILE) as chat:
            chat.append({"role": HOSTILE, "content": HOSTILE})
        conversations.describe("one", title=HOSTILE, metadata={"a": HOSTILE})
        content = self.page().content.decode()
        assert HOSTILE not in content
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in content

    def test_document_that_cannot_be_read(self):
        with conversations.edit("one") as chat:
            chat.append("Hi")
        with connection.cursor() as cursor:
            cursor.execute("UPDATE aibind_conversations SET data = '{}'")
        assert "errornote" in self.page().content.decode()

    def test_link_to_the_streams_needs_their_permission(self):
        with conversations.edit("one") as chat:
            chat.append("Hi")
        assert f"{STREAMS}?q=one" in self.page().content.decode()
        self.login_with("view_conversation")
        assert f"{STREAMS}?q=one" not in self.page().content.decode()

    @override_settings(ROOT_URLCONF=__name__)
    def test_another_site_without_streams(self):
        with conversations.edit("one") as chat:
            chat.append("Hi")
        page = self.client.get("/other/aibind_postgres/conversation/one/change/").content.decode()
        assert "<pre>Hi</pre>" in page
        assert "Streams of this conversation" not in page

    def test_permission(self):
        with conversations.edit("one") as chat:
            chat.append({"role": "user", "content": "private"})
        self.login_with("view_stream")
        assert self.client.get(CONVERSATIONS).status_code == 403
        assert self.client.get(f"{CONVERSATIONS}one/change/").status_code == 403

    def test_nothing_can_be_added_changed_or_deleted(self):
        with conversations.edit("one") as chat:
            chat.append("Hi")
        assert self.client.post(f"{CONVERSATIONS}add/", {"session_id": "two"}).status_code == 403
        assert self.client.post(f"{CONVERSATIONS}one/change/", {"title": "x"}).status_code == 403
        assert self.client.post(f"{CONVERSATIONS}one/delete/", {"post": "yes"}).status_code == 403
        assert conversations.get_info("one").title is None

    def test_missing_conversation(self):
        assert self.client.get(f"{CONVERSATIONS}one/change/").status_code == 302
