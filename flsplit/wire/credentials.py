"""What lets a host in: the session's certificate, and a token for each host."""

import hashlib
import ipaddress
import secrets
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flsplit.wire.wire_errors import TokenRefused

SESSION_NAME = "session.flsplit"
"""A name that every session's certificate carries, whatever address its server is reached under.

A host trusts one certificate only, so the name proves nothing; with a fixed one, a server behind
a port forwarding or under a second address is still the one that was pinned.
"""

_CLOCK_SKEW = timedelta(days=1)
_NEVER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280: no well-defined end
_TOKEN_BYTES = 32
MOST_TOKENS = 2**16
"""How many tokens of a session are remembered; earlier ones open nothing any more."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A self-signed certificate and its private key, both in PEM."""

    certificate_pem: bytes  # what a host pins; public
    key_pem: bytes  # stays in the server's process

    def __repr__(self) -> str:
        """Leave the key out of logs."""
        return f"{type(self).__name__}({len(self.certificate_pem)} bytes)"


def make_certificate(hosts: Iterable[str] = (), valid_for: timedelta | None = None) -> Certificate:
    """Make the certificate of one session, on the curve P-256.

    By default a stream can be opened with it without end: a host pins the certificate for one
    session, whose invitations have an end. A stream that is open is not cut off.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SESSION_NAME)])
    names = [_general_name(host) for host in dict.fromkeys([SESSION_NAME, *hosts])]
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + valid_for if valid_for else _NEVER)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return Certificate(certificate.public_bytes(serialization.Encoding.PEM), key_pem)


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a token stands for."""

    host: str  # the host that was given it
    epoch: int  # the host's epoch at that time


class TokenBook:
    """The tokens of a session: one for each host and epoch, each good for one stream.

    Only digests are kept, and only of the last tokens that were given out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tickets: dict[bytes, Ticket] = {}
        self._used: set[bytes] = set()
        self._current: dict[str, bytes] = {}

    def issue(self, host: str, epoch: int = 0) -> str:
        """Return a new token for `host`; its earlier ones stop being good.

        ValueError if the host has been given one of a later epoch.
        """
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        digest = _digest(token)
        with self._lock:
            current = self._current.get(host)
            if current is not None and self._tickets[current].epoch > epoch:
                latest = self._tickets[current].epoch
                raise ValueError(f"host {host!r} is at epoch {latest} already, past {epoch}")
            self._tickets[digest] = Ticket(host, epoch)
            self._current[host] = digest
            if len(self._tickets) > MOST_TOKENS:
                self._forget_the_oldest()
        return token

    def redeem(self, token: str) -> Ticket:
        """Return whom `token` belongs to, and never again.

        TokenRefused if it is unknown, used already, or replaced by a newer one.
        """
        # Looked up by digest: how long that takes tells nothing about the tokens that there are.
        found = _digest(token)
        with self._lock:
            if found not in self._tickets:
                raise TokenRefused("the token is unknown")
            ticket = self._tickets[found]
            if found in self._used:
                raise TokenRefused(f"the token of host {ticket.host!r} was used already")
            if self._current[ticket.host] != found:
                latest = self._tickets[self._current[ticket.host]].epoch
                raise TokenRefused(
                    f"the token of host {ticket.host!r} is of epoch {ticket.epoch} and was "
                    f"replaced by one of epoch {latest}"
                )
            self._used.add(found)
            return ticket

    def _forget_the_oldest(self) -> None:
        digest = next(iter(self._tickets))
        ticket = self._tickets.pop(digest)
        self._used.discard(digest)
        if self._current.get(ticket.host) == digest:
            del self._current[ticket.host]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
