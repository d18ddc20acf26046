"""The signing identity: a certificate chain and its private key.

Users may bring their own. Everyone else gets a local identity, made once and stored under FLUX2_HOME/identity. This
module passes the key to the signing library only: it is in no message, no log and no `repr`.

Pitfalls handled here:
- C2PA refuses self-signed certificates, so a certificate authority is made first. Its key is discarded after signing:
  nobody, not even this studio, can issue a second certificate under that name.
- Without a time stamp from a server (we never request one) a signature expires with its certificate. So the local
  certificate is valid for long and is renewed at half of its life: every picture stays verifiable for years.
- Two processes may start at once: the first to publish its identity wins, and the other one uses it.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from flux2_studio.errors import CredentialsError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

LOCAL_NAME = "flux2-studio, local identity"
LIFETIME = timedelta(days=3650)
MAX_PEM_BYTES = 1_000_000  # per PEM file; a chain takes a few kilobytes


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A certificate chain and the key of its first certificate, ready for signing."""

    chain: str = field(repr=False)  # PEM: own certificate first, then its issuers
    key: bytes = field(repr=False)  # PEM, PKCS 8, not encrypted
    algorithm: str  # C2PA name: es256, ps256, ...
    name: str  # the certificate's subject
    serial: str  # of the certificate, in decimal like c2pa's reader
    issuer: str = field(repr=False)  # PEM: the last certificate of the chain
    valid_between: tuple[datetime, datetime]  # from, until; outside of it a new one is needed
    local: bool

    @property
    def signature_meaning(self) -> str:
        """What a signature by this identity proves, in a sentence for the page."""
        if self.local:
            return (
                "Pictures are signed with an identity made on this machine. It proves that a picture is unchanged "
                "since it was signed; it does not prove who made it, for nobody has confirmed the name. All pictures "
                "signed with it can be told to come from the same installation."
            )
        return (
            f"Pictures are signed with your own certificate, issued to {self.name}. It proves that a picture is "
            f"unchanged since it was signed; who signed it is proven to those who trust the certificate's issuer."
        )


def _now() -> datetime:
    return datetime.now(UTC)


def load_identity(
    folder: Path, certificate: Path | None = None, key: Path | None = None, now: Callable[[], datetime] = _now
) -> Identity:
    """Load the user's identity from two PEM files, or the local one from `folder`, which is made if it is missing.

    Raises `CredentialsError` for files that cannot be read, do not belong together or are outside their validity.
    """
    if certificate is None and key is None:
        return _load_or_make_local(folder, now())
    if certificate is None or key is None:
        raise CredentialsError("Set both FLUX2_C2PA_CERTIFICATE and FLUX2_C2PA_KEY, or neither of them.")
    identity = _parse(_read(certificate, "FLUX2_C2PA_CERTIFICATE"), _read(key, "FLUX2_C2PA_KEY"), local=False)
    begin, end = identity.valid_between
    if not begin <= now() < end:
        raise CredentialsError(
            f"The certificate that FLUX2_C2PA_CERTIFICATE names is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}, not "
            f"today: have it renewed, or unset FLUX2_C2PA_CERTIFICATE and FLUX2_C2PA_KEY to sign with a local identity."
        )
    return identity


def known_identity(folder: Path, certificate: Path | None = None, key: Path | None = None) -> Identity | None:
    """Load the identity by which one's own pictures are recognised, even if expired. Makes none: returns None if there
    is none.
    """
    try:
        if certificate is not None and key is not None:
            return _parse(_read(certificate, "FLUX2_C2PA_CERTIFICATE"), _read(key, "FLUX2_C2PA_KEY"), local=False)
        return _load_local(folder / "identity.pem")
    except (CredentialsError, OSError):
        return None  # signing reports the problem; reading a picture works without it


def _read(path: Path, variable: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        raise CredentialsError(
            f"The file that {variable} names cannot be read ({error.strerror or 'unknown reason'}): correct the path, "
            f"or allow reading it."
        ) from error
    if len(data) > MAX_PEM_BYTES:
        raise CredentialsError(f"The file that {variable} names is too large to be a PEM file: correct the path.")
    return data


def _load_or_make_local(folder: Path, today: datetime) -> Identity:
    path = folder / "identity.pem"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        identity = _load_local(path)
        if identity is None or not identity.valid_between[0] <= today < identity.valid_between[1]:
            _write_atomically(_make_local(today), path, renewing=identity is not None)
            identity = _load_local(path)
    except OSError as error:
        raise CredentialsError(
            f"The identity that signs pictures cannot be kept in {folder} ({error.strerror or 'unknown reason'}): "
            f"allow writing there, set FLUX2_HOME to a folder of your own, or do not sign."
        ) from error
    if identity is None:
        raise CredentialsError(f"The identity in {folder} vanished while it was made: try again.")
    return identity


def _load_local(path: Path) -> Identity | None:
    """Load the identity in the file at `path`; None if there is no file."""
    try:
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)  # may have been restored from a backup
        with path.open("rb") as file:
            data = file.read(MAX_PEM_BYTES)
    except FileNotFoundError:
        return None
    try:
        return _parse(data, data, local=True)
    except CredentialsError as error:
        raise CredentialsError(
            f"The identity in {path} is damaged: delete that file, and a new one is made. Pictures signed before stay "
            f"verifiable."
        ) from error


def _write_atomically(pem: bytes, path: Path, renewing: bool) -> None:
    """Write `pem` to `path` atomically. A first identity never replaces one from another process."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".identity-")  # of mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        if renewing:
            Path(temporary).replace(path)
            return
        with suppress(FileExistsError):
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                raise
            except OSError:  # no hard links on this drive: the later of two processes wins, which is fine too
                Path(temporary).replace(path)
    finally:
        with suppress(FileNotFoundError):
            Path(temporary).unlink()


def _parse(certificates: bytes, key: bytes, local: bool) -> Identity:
    """Parse two PEM texts and check that they belong together. Errors contain nothing of the key."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
        load_pem_private_key,
    )

    try:
        chain = x509.load_pem_x509_certificates(certificates)
    except ValueError as error:
        raise CredentialsError(
            "The file that FLUX2_C2PA_CERTIFICATE names holds no PEM certificates: name the chain, your own first."
        ) from error
    try:
        private = load_pem_private_key(key, None)
        algorithm = _algorithm(private)
    except TypeError:
        raise CredentialsError(
            "The key that FLUX2_C2PA_KEY names is locked by a password: name a copy without one, readable by you alone."
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise CredentialsError(
            "The file that FLUX2_C2PA_KEY names holds no key that C2PA can use: name a PEM key of kind ECDSA (P-256, "
            "P-384, P-521), RSA of at least 2048 bits, or Ed25519."
        ) from None
    own = chain[0]

    def public(key: object) -> bytes:
        return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]

    if public(own.public_key()) != public(private.public_key()):
        raise CredentialsError(
            "FLUX2_C2PA_KEY is not the key of the first certificate in FLUX2_C2PA_CERTIFICATE: put your own "
            "certificate first, and its issuers after it."
        )
    begin, end = own.not_valid_before_utc, own.not_valid_after_utc
    return Identity(
        chain="".join(it.public_bytes(Encoding.PEM).decode() for it in chain),
        key=private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        algorithm=algorithm,
        name=_subject_name(own),
        serial=str(own.serial_number),
        issuer=chain[-1].public_bytes(Encoding.PEM).decode(),
        valid_between=(begin, begin + (end - begin) / 2 if local else end),
        local=local,
    )


def _algorithm(key: object) -> str:
    """C2PA's name of the algorithm for a private key. Raises `ValueError` for an unsupported key."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ec.EllipticCurvePrivateKey):
        found = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}.get(key.curve.name)
    elif isinstance(key, rsa.RSAPrivateKey):
        found = "ps256" if key.key_size >= 2048 else None
    else:
        found = "ed25519" if isinstance(key, ed25519.Ed25519PrivateKey) else None
    if found is None:
        raise ValueError("not a key for C2PA")
    return found


def _subject_name(certificate: x509.Certificate) -> str:
    from cryptography.x509.oid import NameOID

    for kind in (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME):
        for attribute in certificate.subject.get_attributes_for_oid(kind):
            return str(attribute.value)
    return "a certificate without a name"


def _make_local(today: datetime) -> bytes:
    """Make a local identity. Returns one PEM text: key, certificate, certificate of its authority.

    Follows the C2PA specification, section "Certificate profiles": X.509 v3, key usage for digital signatures only, an
    extended key usage that readers know, no certificate authority, and the issuer's key id.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    # A unique name per authority: otherwise a validator that knows two could not tell them apart by name.
    number = secrets.token_hex(8)

    def named(text: str) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, LOCAL_NAME),
                x509.NameAttribute(NameOID.COMMON_NAME, text),
            ]
        )

    authority = named(f"flux2-studio local authority {number}")

    def usage(signs_certificates: bool) -> x509.KeyUsage:
        return x509.KeyUsage(
            digital_signature=not signs_certificates,
            key_cert_sign=signs_certificates,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            crl_sign=False,
            encipher_only=False,
            decipher_only=False,
        )

    def certificate_builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(today - timedelta(days=1))  # other machines' clocks may be slow
            .not_valid_after(today + LIFETIME)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
        )

    root = (
        certificate_builder(authority, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(signs_certificates=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    own = (
        certificate_builder(named("flux2-studio local signer"), key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(signs_certificates=False), critical=True)
        # The only usage allowed by C2PA that its readers accept by default.
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return secret + own.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM)
