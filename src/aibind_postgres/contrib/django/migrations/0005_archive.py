from django.db import migrations, models

from .._operations import RunSqlFile
from .._settings import as_db_table, table_names
from ..models import TimeField

NAMES = table_names()


class Migration(migrations.Migration):
    dependencies = [("aibind_postgres", "0004_chats")]
    operations = [
        RunSqlFile("0005_archive.sql"),
        migrations.CreateModel(
            "Stream",
            [
                ("id", models.TextField(primary_key=True, serialize=False)),
                ("state", models.TextField()),
                ("error", models.TextField(null=True)),
                ("total_chunks", models.IntegerField(verbose_name="chunks")),
                ("session_id", models.TextField(null=True, verbose_name="session")),
                ("owner", models.TextField(null=True)),
                ("metadata", models.JSONField(null=True)),
                ("wire", models.TextField(null=True, verbose_name="wire format")),
                ("created_at", TimeField(null=True, verbose_name="created")),
                ("archived_at", TimeField(null=True, verbose_name="archived")),
                ("expires_at", models.BigIntegerField()),
                ("ttl_ms", models.BigIntegerField(null=True)),
                ("lease_until", models.BigIntegerField(null=True)),
            ],
            options={
                "db_table": as_db_table(NAMES.status),
                "ordering": ("-id",),
                "managed": False,
                "default_permissions": ("view",),
                "permissions": (("stop_stream", "Can stop stream"),),
            },
        ),
        migrations.CreateModel(
            "Conversation",
            [
                ("session_id", models.TextField(primary_key=True, serialize=False, verbose_name="session")),
                ("title", models.TextField(null=True)),
                ("owner", models.TextField(null=True)),
                ("metadata", models.JSONField(null=True)),
                ("created_at", TimeField(null=True, verbose_name="created")),
                ("updated_at", TimeField(null=True, verbose_name="updated")),
                ("expires_at", models.BigIntegerField()),
            ],
            options={
                "db_table": as_db_table(NAMES.conversations),
                "ordering": ("-updated_at", "-session_id"),
                "managed": False,
                "default_permissions": ("view",),
            },
        ),
    ]
