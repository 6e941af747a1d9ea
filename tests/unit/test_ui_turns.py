"""What a page of useChat may change in a stored message."""

from __future__ import annotations

import pytest

from aibind_postgres._ui_turns import with_tool_results

CALL = {"type": "tool-search", "toolCallId": "1", "state": "input-available", "input": {}}


@pytest.mark.parametrize(
    ("stored", "sent", "kept"),
    [
        ({}, {"state": "output-available", "output": 1}, False),
        ({"providerExecuted": True}, {"state": "output-available", "output": 1}, True),
        ({"providerExecuted": True}, {"state": "output-error", "errorText": "x"}, True),
        ({"state": "output-available", "output": 2}, {"state": "output-available", "output": 1}, True),
        ({}, {"state": "input-available", "input": {"other": 1}}, True),
        ({}, {"toolCallId": "2", "state": "output-available", "output": 1}, True),
    ],
)
def test_page_gives_results_of_its_own_tools_only(stored, sent, kept):
    part = {**CALL, **stored}
    changed = with_tool_results({"id": "a", "parts": [part]}, {"parts": [{**CALL, **sent}]})
    expected = part if kept else {**part, **sent}
    assert changed == {"id": "a", "parts": [expected]}


def test_page_approves_calls_that_the_provider_executes():
    part = {**CALL, "providerExecuted": True, "state": "approval-requested", "approval": {"id": "p"}}
    sent = {**part, "state": "approval-responded", "approval": {"id": "p", "approved": True}}
    [changed] = with_tool_results({"parts": [part]}, {"parts": [sent]})["parts"]
    assert (changed["state"], changed["approval"]["approved"]) == ("approval-responded", True)
