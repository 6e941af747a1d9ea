"""Query objects without a database, one for each flavour."""

from __future__ import annotations


class CoroutineClient:
    async def query(self, sql: str, params: object) -> list[object]:
        raise NotImplementedError


class PlainClient:
    def query(self, sql: str, params: object) -> list[object]:
        raise NotImplementedError
