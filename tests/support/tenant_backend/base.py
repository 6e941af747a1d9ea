"""A database backend of Django that selects the schema of a tenant, as that of django-tenants does."""

from __future__ import annotations

from typing import Any, NamedTuple

from django.db.backends.postgresql import base


class Tenant(NamedTuple):
    schema_name: str


class DatabaseWrapper(base.DatabaseWrapper):
    tenant = Tenant("public")

    def set_tenant(self, tenant: Any) -> None:
        self.tenant = tenant

    def _cursor(self, name: str | None = None) -> Any:
        cursor = super()._cursor(name)
        cursor.execute(f'SET search_path = "{self.tenant.schema_name}"')
        return cursor
