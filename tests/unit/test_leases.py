"""When a process may end a stream whose lease has expired."""

from __future__ import annotations

from aibind_postgres._leases import CONTACT, MAX_SILENCE, Contact


def test_contact_is_steady_after_some_seconds_of_statements():
    contact = Contact()
    assert not contact.is_steady(0)
    for second in range(int(CONTACT)):
        contact.succeeded(second)
        assert not contact.is_steady(second)
    contact.succeeded(CONTACT)
    assert contact.is_steady(CONTACT)


def test_failure_and_silence_interrupt_the_contact():
    for interrupt in (lambda contact: contact.failed(), lambda contact: None):
        contact = Contact()
        for second in range(20):
            contact.succeeded(second)
        assert contact.is_steady(20)
        interrupt(contact)
        after = 20 + MAX_SILENCE + 1
        assert not contact.is_steady(after)
        contact.succeeded(after)
        assert not contact.is_steady(after)
        for second in range(9):
            contact.succeeded(after + second)
        assert contact.is_steady(after + 8)


def test_slow_statements_do_not_interrupt_the_contact():
    contact = Contact()
    for start in range(0, 20, 5):
        contact.succeeded(start + 4.5, start)  # half a second after the one before
    assert contact.is_steady(20)
    contact.succeeded(30, 19.6 + MAX_SILENCE)
    assert not contact.is_steady(30)
