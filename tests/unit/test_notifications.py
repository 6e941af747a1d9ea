"""Packing stream ids into the payloads of notifications, and decoding them."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from support.clients import PlainClient

from aibind_postgres._arguments import MAX_ID_BYTES
from aibind_postgres._notifications import MAX_PAYLOAD_BYTES, decode_payload, encode_payloads
from aibind_postgres._subscriptions import Subscriptions
from aibind_postgres._sync.notifying import Notifier


@pytest.mark.parametrize("sender", [None, "me"])
@pytest.mark.parametrize(
    "ids",
    [
        ["a"],
        ["", '"', "\n", "ü", "😀", "\x01"],
        [f"{number:036}" for number in range(1000)],
        ["\x01" * MAX_ID_BYTES, "é" * (MAX_ID_BYTES // 2), "😀" * (MAX_ID_BYTES // 4)] * 3,
        ["x" * length for length in range(1, MAX_ID_BYTES)],
    ],
    ids=["one", "odd", "many", "longest", "every length"],
)
def test_payloads_fit_and_lose_nothing(ids, sender):
    payloads = list(encode_payloads(ids, sender))
    assert all(payload.isascii() and len(payload) <= MAX_PAYLOAD_BYTES for payload in payloads)
    assert [id for payload in payloads for id in decode_payload(payload, "another")] == ids
    decoded_by_sender = [decode_payload(payload, "me") for payload in payloads]
    assert decoded_by_sender == ([[]] * len(payloads) if sender else [decode_payload(p, "x") for p in payloads])
    # The number of payloads is minimal: no two neighbours fit into one.
    assert all(len(a) + len(b) > MAX_PAYLOAD_BYTES - 20 for a, b in pairwise(payloads))


def test_no_ids_need_no_payload():
    assert list(encode_payloads([], "me")) == []


@pytest.mark.parametrize("payload", ["", "x", "1", "null", "[]", '["a"]', "{}", '{"ids": "a"}', '{"ids": [1]}', "{"])
def test_unknown_payload_means_all_streams(payload):
    assert decode_payload(payload, "me") is None


def test_sender_differs_in_a_forked_process(monkeypatch):
    notifier = Notifier(PlainClient(), Subscriptions(share=True), "channel")
    sender = notifier.sender
    assert sender == notifier.sender
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert sender != notifier.sender
