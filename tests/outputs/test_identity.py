"""Who signs: made once, kept safe, renewed in time; or the user's own, refused with a reason where it will not do."""

from __future__ import annotations

import os
import stat
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from flux2_studio.errors import CredentialsError
from flux2_studio.provenance.identity import LIFETIME, Identity, known_identity, load_identity
from tests import certificates

ROOT = Path(__file__).resolve().parents[2]
TODAY = datetime(2026, 3, 1, tzinfo=UTC)


def at(days: int, folder: Path) -> Identity:
    return load_identity(folder, now=lambda: TODAY + timedelta(days=days))


def certificate_of(identity: Identity) -> x509.Certificate:
    return x509.load_pem_x509_certificates(identity.chain.encode())[0]


def test_a_local_identity_follows_the_profile_of_c2pa(tmp_path: Path) -> None:
    identity = load_identity(tmp_path / "identity")
    own, authority = x509.load_pem_x509_certificates(identity.chain.encode())
    own.verify_directly_issued_by(authority)
    authority.verify_directly_issued_by(authority)
    extensions = own.extensions
    assert own.version is x509.Version.v3
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    allowed = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(allowed) == [ExtendedKeyUsageOID.EMAIL_PROTECTION]
    issuer = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    assert issuer == authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert identity.algorithm == "es256"
    assert identity.local
    assert identity.serial == str(own.serial_number)
    assert "local identity" in identity.name
    assert "does not prove who made it" in identity.signature_meaning


def test_the_authority_cannot_sign_again(tmp_path: Path) -> None:
    load_identity(tmp_path / "identity")
    (path,) = (tmp_path / "identity").iterdir()
    text = path.read_bytes()
    assert text.count(b"PRIVATE KEY") == 2, "one key, between BEGIN and END"
    own, authority = x509.load_pem_x509_certificates(text)
    kept = load_pem_private_key(text, None).public_key()
    assert kept == own.public_key()
    assert kept != authority.public_key()


@pytest.mark.skipif(os.name != "posix", reason="other systems have no modes")
def test_the_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "identity"
    old = os.umask(0)
    try:
        load_identity(folder)
    finally:
        os.umask(old)
    (path,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)  # as from a backup
    folder.chmod(0o755)
    load_identity(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_is_made_once_and_renewed_long_before_its_pictures_expire(tmp_path: Path) -> None:
    first = at(0, tmp_path)
    half = LIFETIME.days // 2
    assert at(0, tmp_path) == at(half - 1, tmp_path) == first
    renewed = at(half + 1, tmp_path)
    assert renewed.serial != first.serial
    assert at(half + 2, tmp_path) == renewed
    assert certificate_of(first).not_valid_after_utc - (TODAY + timedelta(days=half)) > timedelta(days=4 * 365)
    assert [it.name for it in tmp_path.iterdir()] == ["identity.pem"]


def test_one_made_by_a_clock_that_was_ahead_is_made_anew(tmp_path: Path) -> None:
    ahead = at(1000, tmp_path)
    assert at(0, tmp_path).serial != ahead.serial
    assert at(1, tmp_path).valid_between[0] < TODAY


def test_looking_makes_none_and_knows_an_old_one(tmp_path: Path) -> None:
    assert known_identity(tmp_path / "identity") is None
    assert not (tmp_path / "identity").exists()
    old = at(-5000, tmp_path)
    assert known_identity(tmp_path) == old
    (tmp_path / "identity.pem").write_text("damaged")
    assert known_identity(tmp_path) is None


def test_a_drive_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, target: str) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    assert load_identity(tmp_path).serial == load_identity(tmp_path).serial
    assert [it.name for it in tmp_path.iterdir()] == ["identity.pem"]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\x00", "half", "key alone"])
def test_a_damaged_identity_is_told(tmp_path: Path, content: bytes | str) -> None:
    load_identity(tmp_path)
    path = tmp_path / "identity.pem"
    whole = path.read_bytes()
    cut = {"half": len(whole) // 3, "key alone": whole.index(b"-----BEGIN CERTIFICATE")}
    path.write_bytes(content if isinstance(content, bytes) else whole[: cut[content]])
    with pytest.raises(CredentialsError, match=r"identity\.pem is damaged: delete that file, and a new one is made"):
        load_identity(tmp_path)
    path.unlink()
    load_identity(tmp_path)


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(CredentialsError, match="set FLUX2_HOME to a folder of your own, or do not sign"):
        load_identity(tmp_path / "home" / "identity")


def test_a_full_drive_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CredentialsError, match="No space left on device"):
        load_identity(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["es256", "es384", "es512", "ps256", "ed25519"])
def test_own_certificates(tmp_path: Path, kind: str) -> None:
    made = certificates.make(tmp_path, kind)
    identity = load_identity(tmp_path / "identity", made.certificate, made.key)
    assert (identity.algorithm, identity.name, identity.local) == (kind, "Fox & Sons", False)
    assert "Fox & Sons" in identity.signature_meaning
    assert not (tmp_path / "identity").exists()
    assert known_identity(tmp_path / "identity", made.certificate, made.key) == identity


def refusal(certificate: Path | None, key: Path | None) -> str:
    """What is said of a certificate and key, after a look that no key is in the message or its trace."""
    with pytest.raises(CredentialsError) as caught:
        load_identity(Path("never written"), certificate, key)
    whole = "".join(traceback.format_exception(caught.value))
    if key is not None and key.is_file():
        secrets = [line for line in key.read_text(errors="replace").splitlines() if line and "-----" not in line]
        assert not any(line in whole for line in secrets)
    return str(caught.value)


def test_own_certificates_that_will_not_do_are_refused_with_a_reason(tmp_path: Path) -> None:
    good = certificates.make(tmp_path)
    assert "Set both FLUX2_C2PA_CERTIFICATE and FLUX2_C2PA_KEY" in refusal(good.certificate, None)
    assert "Set both" in refusal(None, good.key)
    assert "FLUX2_C2PA_CERTIFICATE names cannot be read" in refusal(tmp_path / "nowhere.pem", good.key)
    assert "FLUX2_C2PA_KEY names cannot be read" in refusal(good.certificate, tmp_path)
    assert "holds no PEM certificates" in refusal(good.key, good.key)
    assert "holds no key that C2PA can use" in refusal(good.certificate, good.certificate)
    (tmp_path / "large.pem").write_bytes(b"x" * 1_000_001)
    assert "too large to be a PEM file" in refusal(tmp_path / "large.pem", good.key)
    broken = tmp_path / "broken.pem"
    broken.write_text(good.key.read_text().replace("M", "N"))
    assert "holds no key that C2PA can use" in refusal(good.certificate, broken)
    (tmp_path / "other").mkdir()
    other = certificates.make(tmp_path / "other")
    assert "is not the key of the first certificate" in refusal(good.certificate, other.key)
    locked = certificates.make(tmp_path / "other", password=b"sesame")
    assert "locked by a password" in refusal(locked.certificate, locked.key)
    for kind in ("odd curve", "short rsa"):
        weak = certificates.make(tmp_path / "other", kind)
        assert "holds no key that C2PA can use" in refusal(weak.certificate, weak.key)


@pytest.mark.parametrize(("begins", "ends"), [(-9, -2), (2, 9)])
def test_an_own_certificate_out_of_date_is_refused(tmp_path: Path, begins: int, ends: int) -> None:
    made = certificates.make(tmp_path, begins=timedelta(days=begins), ends=timedelta(days=ends))
    assert "not today: have it renewed" in refusal(made.certificate, made.key)
    assert known_identity(tmp_path, made.certificate, made.key) is not None, "its pictures are recognised all the same"


def test_a_key_is_never_shown(tmp_path: Path) -> None:
    identity = load_identity(tmp_path)
    body = identity.key.decode().splitlines()[1]
    assert len(body) > 40
    assert body not in repr(identity) + str(identity) + f"{identity!r:>10}"
    assert "PRIVATE" not in repr(identity)
