"""Unmanaged models of streams and conversations, for the admin and for queries. Write through the stores."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db import models
from django.db.models import Func

from ..._stream_list import IN_RANGE
from ...models import NEVER_MS, from_epoch_ms
from ._settings import as_db_table, table_names

_NAMES = table_names()


class Milliseconds(Func):
    """The time of the server in milliseconds since the epoch."""

    template = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
    output_field = models.BigIntegerField()


class TimeField(models.DateTimeField):
    """A time, or None for one that Python's datetime does not have, such as `-infinity`."""

    def select_format(self, compiler: Any, sql: str, params: Any) -> tuple[str, Any]:
        """Return the SQL that selects the column."""
        return f"CASE WHEN {sql} {IN_RANGE} THEN {sql} END", (*params, *params)


class StreamManager(models.Manager):
    """Excludes streams that are being deleted, and the marker row of housekeepers."""

    def get_queryset(self) -> Any:
        """Return the streams."""
        return super().get_queryset().exclude(state="deleted")


class ConversationManager(models.Manager):
    """Excludes expired conversations, and with them the marker row of housekeepers."""

    def get_queryset(self) -> Any:
        """Return the conversations."""
        return super().get_queryset().filter(expires_at__gt=Milliseconds())


class Stream(models.Model):
    """The status of a stream."""

    id = models.TextField(primary_key=True)
    state = models.TextField()
    error = models.TextField(null=True)
    total_chunks = models.IntegerField("chunks")
    session_id = models.TextField("session", null=True)
    owner = models.TextField(null=True)
    metadata = models.JSONField(null=True)
    wire = models.TextField("wire format", null=True)
    created_at = TimeField("created", null=True)
    archived_at = TimeField("archived", null=True)
    expires_at = models.BigIntegerField()
    ttl_ms = models.BigIntegerField(null=True)
    lease_until = models.BigIntegerField(null=True)

    objects = StreamManager()

    class Meta:
        managed = False
        db_table = as_db_table(_NAMES.status)
        ordering = ("-id",)
        default_permissions = ("view",)
        permissions = (("stop_stream", "Can stop stream"),)

    def __str__(self) -> str:
        return str(self.id)

    @property
    def expires(self) -> datetime | None:
        """The time after which a stream that has ended may be deleted, or None for never."""
        return _time(self.expires_at)

    @property
    def lease_ends(self) -> datetime | None:
        """The time at which the lease of the producer ends unless it is renewed, or None without a lease."""
        return _time(self.lease_until)


class Conversation(models.Model):
    """A conversation. Its messages are loaded by the store."""

    session_id = models.TextField("session", primary_key=True)
    title = models.TextField(null=True)
    owner = models.TextField(null=True)
    metadata = models.JSONField(null=True)
    created_at = TimeField("created", null=True)
    updated_at = TimeField("updated", null=True)
    expires_at = models.BigIntegerField()

    objects = ConversationManager()

    class Meta:
        managed = False
        db_table = as_db_table(_NAMES.conversations)
        ordering = ("-updated_at", "-session_id")
        default_permissions = ("view",)

    def __str__(self) -> str:
        return str(self.title or self.session_id)

    @property
    def expires(self) -> datetime | None:
        """The time at which the conversation expires, or None for never."""
        return _time(self.expires_at)


def _time(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None or milliseconds > NEVER_MS else from_epoch_ms(milliseconds)
