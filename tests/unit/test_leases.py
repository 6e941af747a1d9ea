"""When a process may end a stream whose lease has expired."""

from __future__ import annotations

from aibind_postgres._leases import CONTACT, CONTACT_AFTER_FAILURE, MAX_SILENCE, RENEWALS, Contact, renewal_timeout


def test_contact_is_steady_after_some_seconds_of_statements():
    contact = Contact()
    assert not contact.is_steady(0)
    for second in range(int(CONTACT)):
        contact.succeeded(second)
        assert not contact.is_steady(second)
    contact.succeeded(CONTACT)
    assert contact.is_steady(CONTACT)


def test_failure_and_silence_interrupt_the_contact():
    for interrupt, required in ((lambda contact: contact.failed(), CONTACT_AFTER_FAILURE), (lambda _: None, CONTACT)):
        contact = Contact()
        for second in range(20):
            contact.succeeded(second)
        assert contact.is_steady(20)
        interrupt(contact)
        after = 20 + MAX_SILENCE + 1
        assert not contact.is_steady(after)
        for second in range(int(required)):
            contact.succeeded(after + second)
            assert not contact.is_steady(after + second)
        contact.succeeded(after + required)
        assert contact.is_steady(after + required)


def test_silence_after_a_failure_does_not_shorten_the_contact_that_follows():
    contact = Contact()
    contact.failed()
    contact.succeeded(0)
    for second in range(100, 100 + int(CONTACT_AFTER_FAILURE)):
        contact.succeeded(second)
        assert not contact.is_steady(second)
    contact.succeeded(100 + CONTACT_AFTER_FAILURE)
    assert contact.is_steady(100 + CONTACT_AFTER_FAILURE)
    for second in range(200, 200 + int(CONTACT) + 1):  # the failure is over
        contact.succeeded(second)
    assert contact.is_steady(200 + CONTACT)


def test_slow_statements_do_not_interrupt_the_contact():
    contact = Contact()
    for start in range(0, 20, 5):
        contact.succeeded(start + 4.5, start)  # half a second after the one before
    assert contact.is_steady(20)
    contact.succeeded(30, 19.6 + MAX_SILENCE)
    assert not contact.is_steady(30)


def test_statement_that_may_have_outlasted_an_outage_interrupts_the_contact():
    contact = Contact()
    for second in range(20):
        contact.succeeded(second)
    contact.succeeded(19 + CONTACT + MAX_SILENCE + 1, started=19.5)
    assert not contact.is_steady(19 + CONTACT + MAX_SILENCE + 1)


def test_second_attempt_of_a_renewal_is_in_time():
    for lease in (0.6, 15, 60, 3600):
        assert lease / RENEWALS + 2 * renewal_timeout(lease) < lease
        assert 2 * renewal_timeout(lease) < CONTACT
