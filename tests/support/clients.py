"""Clients that only have a flavour."""

from __future__ import annotations


class CoroutineClient:
    async def query(self, sql: str, params: object) -> list[object]:
        raise NotImplementedError


class PlainClient:
    def query(self, sql: str, params: object) -> list[object]:
        raise NotImplementedError
