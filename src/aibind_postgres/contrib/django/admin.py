"""The admin of streams and conversations. It can stop streams, and changes nothing else."""

from __future__ import annotations

from itertools import islice
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.utils import display_for_value, quote, unquote
from django.core.exceptions import BadRequest, PermissionDenied
from django.core.paginator import Paginator
from django.db import router
from django.db.models import Q
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.urls import path, reverse
from django.utils.functional import cached_property
from django.views.decorators.http import require_POST

from ..._sync.conversation_store import PostgresConversationStore
from ..._sync.stream_store import PostgresStreamStore
from ...adapters import wrap_django
from ...errors import InvalidHistoryError, StreamNotFoundError
from ._message_list import MessageLine, message_lines
from ._settings import table_names
from ._tail import TailPage, tail_page
from .models import Conversation, Stream

MAX_COUNT = 10_000  # rows that a list counts: counting a large table would take seconds
TAIL_CHUNKS = 500  # in one answer for the page of a stream


class BoundedPaginator(Paginator):
    """Counts at most `MAX_COUNT` rows. Older rows are on no page: search for them."""

    @cached_property
    def count(self) -> int:
        """The number of rows."""
        return int(self.object_list.order_by()[:MAX_COUNT].count())


class ReadOnlyAdmin(admin.ModelAdmin):
    """The base of both lists."""

    paginator = BoundedPaginator
    show_full_result_count = False
    list_per_page = 50

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        """Return the row, or None if there is none. PostgreSQL refuses a NUL, which no id contains."""
        return None if "\0" in object_id else super().get_object(request, object_id, from_field)

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> Any:
        """Show the list. Django passes filters on any field to PostgreSQL."""
        if any("\0" in value for data in (request.GET, request.POST) for _, values in data.lists() for value in values):
            raise BadRequest("a parameter contains a NUL")
        return super().changelist_view(request, extra_context)

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Refuse additions."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse changes."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse deletions."""
        return False


class StateFilter(admin.SimpleListFilter):
    """Filters by state. Django's own filter would read the states from the table."""

    title = "state"
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        """Return the states."""
        return [(state, state) for state in ("active", "done", "stopped", "error")]

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        """Return the streams in the chosen state."""
        return queryset if self.value() is None else queryset.filter(state=self.value())


@admin.register(Stream)
class StreamAdmin(ReadOnlyAdmin):
    """Streams: a list, and a page for each one that shows its chunks while they are written."""

    list_display = ("id", "state", "session_id", "owner", "total_chunks", "created_at")
    list_filter = (StateFilter, "created_at")
    search_fields = ("id", "owner", "session_id")
    search_help_text = "The whole id, owner or session"
    fields = (
        "id",
        "state",
        "error",
        "total_chunks",
        ("session_id", "owner"),
        ("created_at", "archived_at"),
        ("expires", "lease_ends"),
        "wire",
        "metadata",
    )
    readonly_fields = ("expires", "lease_ends")
    actions = ("stop_streams",)

    class Media:
        css = {"all": ["aibind_postgres/admin.css"]}

    def expires(self, stream: Stream) -> str:
        """Return the time after which a stream that has ended may be deleted."""
        return str(display_for_value(stream.expires, "-"))

    def lease_ends(self, stream: Stream) -> str:
        """Return the time at which the lease of the producer ends unless it is renewed."""
        return str(display_for_value(stream.lease_ends, "-"))

    def has_stop_permission(self, request: HttpRequest) -> bool:
        """Return True if the user may stop streams."""
        return bool(request.user.has_perm("aibind_postgres.stop_stream"))

    def get_search_results(self, request: HttpRequest, queryset: Any, search_term: str) -> tuple[Any, bool]:
        """Search for equal values, which have indexes."""
        term = search_term.strip()
        if not term:
            return queryset, False
        return queryset.filter(Q(id=term) | Q(owner=term) | Q(session_id=term)), False

    def get_urls(self) -> list[Any]:
        """Add the pages for the chunks and for stopping."""
        view = self.admin_site.admin_view
        return [
            path("<path:object_id>/chunks/", view(self.chunks_view), name="aibind_postgres_stream_chunks"),
            path("<path:object_id>/stop/", view(require_POST(self.stop_view)), name="aibind_postgres_stream_stop"),
            *super().get_urls(),
        ]

    def change_view(self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None) -> Any:
        """Show a stream."""
        context = {
            "chunks_url": self._url("chunks", object_id),
            "stop_url": self._url("stop", object_id),
            "can_stop": self.has_stop_permission(request),
            **(extra_context or {}),
        }
        return super().change_view(request, object_id, form_url, context)

    def chunks_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Return the chunks after the query parameter `after` as JSON; without it, the last ones."""
        stream = self._stream(request, object_id)
        after = request.GET.get("after", "")
        try:
            page = self._page(stream.id, int(after) if after else None)
        except StreamNotFoundError:
            raise Http404 from None
        except ValueError:  # also of the store, for a number that is too large
            raise BadRequest("after must be a sequence number") from None
        return JsonResponse(page._asdict(), headers={"Cache-Control": "no-store"})

    def stop_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Stop a stream."""
        stream = self._stream(request, object_id)
        if not self.has_stop_permission(request):
            raise PermissionDenied
        self.stop_streams(request, [stream])
        return HttpResponseRedirect(self._url("change", object_id))

    @admin.action(description="Stop selected streams", permissions=["stop"])
    def stop_streams(self, request: HttpRequest, queryset: Any) -> None:
        """Stop streams. Those that have ended stay as they are."""
        store = self._store()
        stopped = 0
        for stream in queryset:
            try:
                ended = store.stop(stream.id)
            except StreamNotFoundError:
                continue
            if ended:
                stopped += 1
                self.log_change(request, stream, "Stopped.")
        self.message_user(request, f"Streams stopped: {stopped}.", messages.SUCCESS if stopped else messages.WARNING)

    def _page(self, stream_id: str, after: int | None) -> TailPage:
        store = self._store()
        info = store.get_info(stream_id)  # first, so that the chunks of an ended stream are complete
        if info is None:
            raise StreamNotFoundError(stream_id)
        cursor = max(0, info.total_chunks - TAIL_CHUNKS) if after is None else after
        chunks = list(islice(store.read_from(stream_id, cursor, follow=False), TAIL_CHUNKS))
        return tail_page(info, cursor, chunks)

    def _stream(self, request: HttpRequest, object_id: str) -> Stream:
        if not self.has_view_permission(request):  # first, so that the answer does not show whether the stream exists
            raise PermissionDenied
        stream = self.get_object(request, unquote(object_id))
        if stream is None:
            raise Http404
        return stream

    def _store(self) -> PostgresStreamStore:
        names = table_names()
        client = wrap_django(router.db_for_write(Stream))
        return PostgresStreamStore(client, chunks_table=names.chunks, status_table=names.status)

    def _url(self, page: str, object_id: str) -> str:
        name = f"{self.admin_site.name}:aibind_postgres_stream_{page}"
        return reverse(name, args=[quote(unquote(object_id))])


@admin.register(Conversation)
class ConversationAdmin(ReadOnlyAdmin):
    """Conversations: a list, and a page for each one that shows its messages with their branches."""

    list_display = ("session_id", "title", "owner", "created_at", "updated_at")
    list_filter = ("updated_at",)
    search_fields = ("session_id", "owner", "title")
    search_help_text = "A part of the title, or the whole session or owner"
    fields = ("session_id", "title", "owner", ("created_at", "updated_at"), "expires", "metadata")
    readonly_fields = ("expires",)

    class Media:
        css = {"all": ["aibind_postgres/admin.css"]}

    def expires(self, conversation: Conversation) -> str:
        """Return the time at which a conversation expires."""
        return str(display_for_value(conversation.expires, "-"))

    def get_search_results(self, request: HttpRequest, queryset: Any, search_term: str) -> tuple[Any, bool]:
        """Search for equal sessions and owners, and for titles that contain the term."""
        term = search_term.strip()
        if not term:
            return queryset, False
        return queryset.filter(Q(session_id=term) | Q(owner=term) | Q(title__icontains=term)), False

    def change_view(self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None) -> Any:
        """Show a conversation."""
        context: dict[str, Any] = {"lines": [], "problem": "", **(extra_context or {})}
        conversation = self.get_object(request, unquote(object_id))
        if conversation is not None and self.has_view_permission(request, conversation):
            try:
                context["lines"] = self._lines(conversation.session_id)
            except InvalidHistoryError as error:
                context["problem"] = str(error)
            streams = self.admin_site._registry.get(Stream)  # another site need not show them
            if streams is not None and streams.has_view_permission(request):
                context["streams_url"] = reverse(f"{self.admin_site.name}:aibind_postgres_stream_changelist")
        return super().change_view(request, object_id, form_url, context)

    def _lines(self, session_id: str) -> list[MessageLine]:
        names = table_names()
        client = wrap_django(router.db_for_write(Conversation))
        store = PostgresConversationStore(client, table=names.conversations, status_table=names.status)
        return message_lines(store.load(session_id).tree)
