"""A certificate for a SuperLink on this machine, and keys for SuperNodes."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from flsplit.wire.credentials import make_certificate


def make_certificate_files(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1, which is its own authority: certificate, private key."""
    folder.mkdir(parents=True, exist_ok=True)
    made = make_certificate(["127.0.0.1", "localhost"])
    certificate, key = folder / "server.crt", folder / "server.key"
    certificate.write_bytes(made.certificate_pem)
    key.write_bytes(made.key_pem)
    return certificate, key


def make_node_key(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a SuperNode's key pair (ECDSA, P-384), as ``ssh-keygen`` does: private, public."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    private, public = folder / name, folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    private.chmod(0o600)
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return private, public
