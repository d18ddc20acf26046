"""Whose signature stands in a finished picture: a certificate chain and its private key.

Users may bring their own. Everyone else gets a local identity, made once and kept under FLUX2_HOME/identity. The key
leaves this module only towards the signing library: it is in no message, no log and no `repr`.

Pitfalls that are dealt with here:
- C2PA refuses a self-signed certificate, so a certificate authority is made first. Its key is thrown away as soon as
  it has signed: nobody, not even this studio, can issue a second certificate under that name.
- without a time stamp from a server (we never ask one) a signature ends with its certificate. The local one therefore
  lives long and is renewed at half of its life, so that every picture can be verified for years to come.
- two processes may start at once: whoever publishes the identity first wins, and the other one takes that.
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
MAX_PEM_BYTES = 1_000_000  # of a PEM file: a chain takes some kilobytes


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A certificate chain and the key of its first certificate, ready for signing."""

    chain: str = field(repr=False)  # PEM: one's own certificate first, then whoever issued it
    key: bytes = field(repr=False)  # PEM, PKCS 8, not encrypted
    algorithm: str  # as C2PA calls it: es256, ps256, ...
    name: str  # whom the certificate names
    serial: str  # of the certificate, in decimal as c2pa's reader shows it
    issuer: str = field(repr=False)  # PEM: the last certificate of the chain
    valid_between: tuple[datetime, datetime]  # from, until: outside of it a new one is due
    local: bool

    @property
    def signature_meaning(self) -> str:
        """What a signature by this identity says to others, in a sentence for the page."""
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
    """The user's own identity from two PEM files, or the local one in `folder`, which is made where there is none.

    Raises `CredentialsError` for files that cannot be read, do not belong together or are out of date.
    """
    if certificate is None and key is None:
        return _local(folder, now())
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
    """The identity by which one's own pictures are recognised, in date or not. None is made: None where none is."""
    try:
        if certificate is not None and key is not None:
            return _parse(_read(certificate, "FLUX2_C2PA_CERTIFICATE"), _read(key, "FLUX2_C2PA_KEY"), local=False)
        return _load_local(folder / "identity.pem")
    except (CredentialsError, OSError):
        return None  # signing will say what is wrong; reading a picture does not depend on it


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


def _local(folder: Path, today: datetime) -> Identity:
    path = folder / "identity.pem"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        kept = _load_local(path)
        if kept is None or not kept.valid_between[0] <= today < kept.valid_between[1]:
            _write_atomically(_make(today), path, renewing=kept is not None)
            kept = _load_local(path)
    except OSError as error:
        raise CredentialsError(
            f"The identity that signs pictures cannot be kept in {folder} ({error.strerror or 'unknown reason'}): "
            f"allow writing there, set FLUX2_HOME to a folder of your own, or do not sign."
        ) from error
    if kept is None:
        raise CredentialsError(f"The identity in {folder} vanished while it was made: try again.")
    return kept


def _load_local(path: Path) -> Identity | None:
    """The identity in the file at `path`, None where there is no file."""
    try:
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)  # restored from a backup, perhaps
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
    """Put `pem` at `path`, whole from the moment it can be seen; a first one never replaces somebody else's."""
    handle, hidden = tempfile.mkstemp(dir=path.parent, prefix=".identity-")  # of mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        if renewing:
            Path(hidden).replace(path)
            return
        with suppress(FileExistsError):
            try:
                path.hardlink_to(hidden)
            except FileExistsError:
                raise
            except OSError:  # no hard links on this drive: then the later of two wins, which serves as well
                Path(hidden).replace(path)
    finally:
        with suppress(FileNotFoundError):
            Path(hidden).unlink()


def _parse(certificates: bytes, key: bytes, local: bool) -> Identity:
    """The identity made of two PEM texts, checked to belong together. Nothing of the key goes into an error."""
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
        name=_subject(own),
        serial=str(own.serial_number),
        issuer=chain[-1].public_bytes(Encoding.PEM).decode(),
        valid_between=(begin, begin + (end - begin) / 2 if local else end),
        local=local,
    )


def _algorithm(key: object) -> str:
    """C2PA's name of the algorithm that goes with a private key. Raises `ValueError` for one that it does not know."""
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


def _subject(certificate: x509.Certificate) -> str:
    from cryptography.x509.oid import NameOID

    for kind in (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME):
        for attribute in certificate.subject.get_attributes_for_oid(kind):
            return str(attribute.value)
    return "a certificate without a name"


def _make(today: datetime) -> bytes:
    """A new local identity as one PEM text: key, certificate, certificate of its authority.

    The profile is that of the C2PA specification, section "Certificate profiles": X.509 v3, a key usage of digital
    signatures alone, an extended key usage that readers know, no authority, and the id of the issuer's key.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    # Each authority has a name of its own: a validator that knows two would otherwise have to guess by the name.
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

    def begun(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(today - timedelta(days=1))  # other machines' clocks may be late
            .not_valid_after(today + LIFETIME)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
        )

    root = (
        begun(authority, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(signs_certificates=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    own = (
        begun(named("flux2-studio local signer"), key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(signs_certificates=False), critical=True)
        # Of the usages that C2PA allows, the one that its readers take without being configured.
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return secret + own.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM)
