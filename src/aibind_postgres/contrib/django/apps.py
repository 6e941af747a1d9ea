"""The configuration of the app."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import Tags, register
from django.db.models.signals import post_migrate


class AibindConfig(AppConfig):
    """The app `aibind_postgres.contrib.django`. Its label is `aibind_postgres`."""

    name = "aibind_postgres.contrib.django"
    label = "aibind_postgres"
    verbose_name = "Streams and conversations"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import _checks, _operations

        register(_checks.check_settings)
        register(_checks.check_tables, Tags.database)
        post_migrate.connect(_operations.create_tables_of_tests, sender=self)
        post_migrate.connect(_operations.empty_tables_of_tests, sender=self)
