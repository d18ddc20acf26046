"""Certificates of the kinds that users bring: a chain of two, fit for C2PA unless a test asks otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

KINDS: dict[str, Any] = {
    "es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "es512": lambda: ec.generate_private_key(ec.SECP521R1()),
    "ps256": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "short rsa": lambda: rsa.generate_private_key(65537, 1024),
    "odd curve": lambda: ec.generate_private_key(ec.SECP256K1()),
}


@dataclass(frozen=True, kw_only=True)
class Made:
    certificate: Path
    key: Path


def make(
    folder: Path,
    kind: str = "es256",
    name: str = "Fox & Sons",
    usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.EMAIL_PROTECTION,
    begins: timedelta = timedelta(days=-1),
    ends: timedelta = timedelta(days=30),
    responder: str | None = None,
    password: bytes | None = None,
) -> Made:
    """Write chain.pem and key.pem into `folder`. responder: the OCSP address that the certificate names."""

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, text)])

    root_key, key = KINDS["es256"](), KINDS[kind]()
    today = datetime.now(UTC)

    def begun(subject: str, public: Any, begin: timedelta, end: timedelta) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named("Some authority"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(today + begin)
            .not_valid_after(today + end)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        )

    def uses(**which: bool) -> x509.KeyUsage:
        names = (
            "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign "
            "crl_sign encipher_only decipher_only"
        )
        return x509.KeyUsage(**(dict.fromkeys(names.split(), False) | which))

    root = (
        begun("Some authority", root_key.public_key(), timedelta(days=-900), timedelta(days=900))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(uses(key_cert_sign=True), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    own = (
        begun(name, key.public_key(), begins, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(uses(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    )
    if responder is not None:
        address = x509.AccessDescription(AuthorityInformationAccessOID.OCSP, x509.UniformResourceIdentifier(responder))
        own = own.add_extension(x509.AuthorityInformationAccess([address]), critical=False)
    chain = own.sign(root_key, hashes.SHA256()).public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM)
    lock: KeySerializationEncryption = BestAvailableEncryption(password) if password else NoEncryption()
    made = Made(certificate=folder / "chain.pem", key=folder / "key.pem")
    made.certificate.write_bytes(chain)
    made.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    return made
