"""Packing the digests of stream ids into the payloads of notifications, and decoding them."""

from __future__ import annotations

import os

import pytest
from support.clients import PlainClient

from aibind_postgres._arguments import MAX_ID_BYTES
from aibind_postgres._notifications import decode_payload, digest_of, encode_payloads
from aibind_postgres._subscriptions import Subscriptions
from aibind_postgres._sync.notifying import Notifier

MAX_PAYLOAD_BYTES = 7_999  # PostgreSQL accepts less than 8,000


@pytest.mark.parametrize("sender", [None, "me"])
@pytest.mark.parametrize(
    "ids",
    [[], ["a"], ["", '"', "\n", "ü", "😀", "\x01", "a b"], [f"{n:036}" for n in range(1000)], ["é" * MAX_ID_BYTES] * 3],
    ids=["none", "one", "odd", "many", "long"],
)
def test_payloads_fit_and_lose_nothing(ids, sender):
    payloads = list(encode_payloads(ids, sender))
    assert [digest for payload in payloads for digest in decode_payload(payload, "another")] == [
        digest_of(id) for id in ids
    ]
    assert all(payload.isascii() and len(payload) <= MAX_PAYLOAD_BYTES for payload in payloads)
    assert not any(decode_payload(payload, "me") for payload in payloads if sender)
    assert len(payloads) == -(-len(ids) // 200)


def test_payloads_contain_no_ids():
    ids = ["secret", "another secret"]
    assert not any(id in payload for payload in encode_payloads(ids, "me") for id in ids)


@pytest.mark.parametrize(
    "payload", ["", " ", "x", "null", '{"ids": ["a"]}', "a", "- a", "- é", "[" * MAX_PAYLOAD_BYTES, "me a", "\0", "- "]
)
def test_unknown_payload_concerns_no_stream(payload):
    subscriptions = Subscriptions(share=True)
    for id in ("a", ""):
        subscription = subscriptions.subscribe(id, float("inf"), lambda: None)
        subscription.stream.waiting.add(subscription)
    assert subscriptions.notified(decode_payload(payload, "me")) == []
    assert len(subscriptions.notified(decode_payload(f"- {digest_of('a')} x {digest_of('b')}", "me"))) == 1


def test_sender_differs_in_a_forked_process(monkeypatch):
    notifier = Notifier(PlainClient(), Subscriptions(share=True), "channel", enabled=True)
    sender = notifier.sender
    assert sender == notifier.sender
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert sender != notifier.sender
