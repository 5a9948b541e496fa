import contextlib
import ipaddress
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from flsplit.wire import Ticket, TokenBook, TokenRefused, credentials, make_certificate
from flsplit.wire.credentials import SESSION_NAME


def test_the_certificate_names_its_hosts_and_is_short_lived():
    made = make_certificate(["10.0.0.7", "gpu.example", "::1"], timedelta(hours=2))
    certificate = x509.load_pem_x509_certificate(made.certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [SESSION_NAME, "gpu.example"]
    addresses = names.get_values_for_type(x509.IPAddress)
    assert addresses == [ipaddress.ip_address("10.0.0.7"), ipaddress.ip_address("::1")]
    assert certificate.not_valid_after_utc < datetime.now(UTC) + timedelta(hours=2)
    assert isinstance(certificate.public_key().curve, ec.SECP256R1)
    assert b"PRIVATE" not in made.certificate_pem
    assert "PRIVATE" not in repr(made)


def test_a_token_is_good_once():
    book = TokenBook()
    token = book.issue("a", 3)
    assert len(token) > 40
    assert book.redeem(token) == Ticket("a", 3)
    with pytest.raises(TokenRefused, match="used already"):
        book.redeem(token)


@pytest.mark.parametrize("token", ["", "guess", "ä\udc80", "x" * 100_000])
def test_an_unknown_token_is_refused(token):
    book = TokenBook()
    book.issue("a")
    with pytest.raises(TokenRefused, match="unknown"):
        book.redeem(token)


def test_a_new_token_replaces_the_old_one():
    book = TokenBook()
    old, other = book.issue("a", 0), book.issue("b", 0)
    new = book.issue("a", 1)
    with pytest.raises(TokenRefused, match="epoch 0 and was replaced by one of epoch 1"):
        book.redeem(old)
    with pytest.raises(ValueError, match="epoch 1 already"):
        book.issue("a", 0)
    assert book.redeem(new) == Ticket("a", 1)
    assert book.redeem(other) == Ticket("b", 0)


def test_of_many_threads_one_redeems_a_token():
    book = TokenBook()
    token = book.issue("a")
    redeemed = []

    def redeem():
        with contextlib.suppress(TokenRefused):
            redeemed.append(book.redeem(token))

    threads = [threading.Thread(target=redeem) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert redeemed == [Ticket("a", 0)]


def test_the_book_holds_no_token():
    book = TokenBook()
    token = book.issue("a")
    assert token not in str(vars(book))


@pytest.mark.chaos(
    "a run of weeks",
    "its certificate lasts as long as its invitations",
)
def test_a_session_s_certificate_does_not_end_before_its_invitations():
    made = x509.load_pem_x509_certificate(make_certificate().certificate_pem)
    assert made.not_valid_after_utc > datetime.now(UTC) + timedelta(days=10_000)
    assert made.not_valid_before_utc < datetime.now(UTC) - timedelta(hours=23)  # for slow clocks


@pytest.mark.chaos(
    "nodes that are invited for ever",
    "the book of tokens does not grow",
)
def test_the_book_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(credentials, "MOST_TOKENS", 3)
    book = TokenBook()
    tokens = [book.issue(f"host-{index}") for index in range(100)]
    assert [len(one) for one in (book._tickets, book._current, book._used)] == [3, 3, 0]
    with pytest.raises(TokenRefused, match="unknown"):
        book.redeem(tokens[0])
    assert book.redeem(tokens[-1]) == Ticket("host-99", 0)
    again = [book.issue("host-99", epoch) for epoch in range(1, 100)]
    assert [len(one) for one in (book._tickets, book._current, book._used)] == [3, 1, 0]
    assert book.redeem(again[-1]) == Ticket("host-99", 99)
