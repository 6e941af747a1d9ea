"""Placeholder until merged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def assemble(
    chunks: Iterable[dict[str, Any]],
    message: dict[str, Any] | None = None,
    *,
    message_id: str = "",
    sdk_version: int = 7,
) -> dict[str, Any]:
    m = (
        {"id": message_id, "role": "assistant", "parts": []}
        if message is None
        else {**message, "parts": list(message["parts"])}
    )
    for c in chunks:
        if c.get("type") == "start":
            m["id"] = c.get("messageId", m["id"])
        elif c.get("type") == "text-start":
            m["parts"].append({"type": "text", "text": "", "state": "streaming"})
        elif c.get("type") == "text-delta":
            m["parts"][-1]["text"] += c["delta"]
        elif c.get("type") == "text-end":
            m["parts"][-1]["state"] = "done"
        elif c.get("type") == "start-step":
            m["parts"].append({"type": "step-start"})
    return m


def message_chunks(message: dict[str, Any], sdk_version: int = 7) -> list[dict[str, Any]]:
    return [{"type": "start", "messageId": message["id"]}]
