"""Content credentials (C2PA): sign finished pictures, and read and validate the credentials of any picture.

The signature covers every byte of the file, so signing is the last step. Nothing here uses the network: no time stamp
is requested, and no manifest, revocation list or identity that a file points to is fetched.

Each call passes its settings to the library as a context. So there are no process-wide settings, and calls from several
threads share nothing.

What is written (C2PA 2.4, "Actions" and "Ingredient"; IPTC's digital source types):
- without references: c2pa.created, trainedAlgorithmicMedia;
- with references: c2pa.opened for the first one (parentOf), then c2pa.edited, compositeWithTrainedAlgorithmicMedia,
  with the others as model inputs (inputTo). A reference is named "Image 1", as in the prompt, never by its file name,
  and gets no thumbnail: neither is ours to publish. Its own credentials are copied unchanged;
- c2pa.watermarked.unbound for a picture with a watermark: the watermark says how the picture was made, not where its
  manifest is.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flux2_studio import __version__
from flux2_studio.errors import CredentialsError
from flux2_studio.files.picture_types import detect_picture_type
from flux2_studio.provenance.c2pa.report import Credentials, no_credentials, parse_report, unreadable_credentials
from flux2_studio.provenance.identity import Identity, known_identity, load_identity
from flux2_studio.record import SOURCE_TYPE_URL

MAX_INSPECTED_BYTES = 200 * 10**6  # per inspected picture; the limit for references is the same
MAX_MANIFESTS = 16 * 10**6  # bytes that the references' credentials may add to a picture
READER_SCRIPT = Path(__file__).with_name("reader.py")

READABLE_MIMES = {"image/png", "image/jpeg", "image/webp", "image/avif", "image/gif", "image/tiff"}
ALLOWED_KEY_USAGES = "\n".join(  # extended key usages that C2PA allows; by default the library knows only the first
    (
        "1.3.6.1.5.5.7.3.4",  # e-mail protection
        "1.3.6.1.5.5.7.3.36",  # document signing
        "1.3.6.1.5.5.7.3.8",  # time stamping
        "1.3.6.1.5.5.7.3.9",  # OCSP signing
        "1.3.6.1.4.1.311.76.59.1.9",  # Microsoft's C2PA signing
        "1.3.6.1.4.1.62558.2.1",  # C2PA's own claim signing
    )
)


@dataclass(frozen=True, kw_only=True)
class ReferenceIngredient:
    """One reference as an ingredient. data: its file, if its credentials are copied. note: their problem, if any."""

    mime: str | None
    data: bytes | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class SignedPicture:
    """A signed picture's bytes, and notes for the user."""

    data: bytes
    notes: tuple[str, ...]


class ManifestReader:
    """Reads the credentials of untrusted pictures, each in its own process with limits.

    script: what the process runs. memory: bytes. seconds: of CPU time; the limit of wall time is three times that.
    longest: characters of the library's JSON.
    """

    def __init__(
        self, script: Path = READER_SCRIPT, memory: int = 3 << 30, seconds: int = 10, longest: int = 4 * 10**6
    ) -> None:
        self._script = script
        self._memory = memory
        self._seconds = seconds
        self._longest = longest

    def read(self, data: bytes, identity: Identity | None = None) -> Credentials:
        """Read the credentials in a picture's bytes. identity: recognised as one's own."""
        if len(data) > MAX_INSPECTED_BYTES:
            return unreadable_credentials(f"the file is larger than {MAX_INSPECTED_BYTES // 10**6} MB")
        if b"c2pa" not in data and b"provenance" not in data:  # every manifest or pointer to one has one of these
            return no_credentials()
        mime = _detect_mime(data)
        if mime is None:
            return unreadable_credentials(
                "this is not a picture of a kind that is read here: PNG, JPEG, WebP, AVIF, GIF or TIFF"
            )
        options = {
            "mime": mime,
            "settings": _settings(identity),
            "memory": self._memory,
            "seconds": self._seconds,
            "longest": self._longest,
        }
        try:
            process = subprocess.run(
                [sys.executable, "-P", str(self._script)],  # -P: `import c2pa` must not find a file beside the script
                input=json.dumps(options).encode() + b"\n" + data,
                capture_output=True,
                timeout=3 * self._seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return unreadable_credentials("reading them takes too long")
        except OSError as error:
            return unreadable_credentials(
                f"no process could be started to read them ({error.strerror or 'unknown reason'})"
            )
        try:
            answer = json.loads(process.stdout)
        except ValueError:
            return unreadable_credentials("they made the reader fail: too large, or made to do so")
        if "report" in answer:
            return parse_report(answer["report"], identity.serial if identity else None)
        return no_credentials() if answer.get("absent") else unreadable_credentials(str(answer.get("problem")))


class Signer:
    """Signs finished pictures, and reads the credentials of any picture.

    folder: where the local identity is stored. certificate, key: the user's own instead, as PEM files. Thread-safe.
    """

    def __init__(
        self,
        folder: Path,
        certificate: Path | None = None,
        key: Path | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        reader: ManifestReader | None = None,
    ) -> None:
        self._load = lambda: load_identity(folder, certificate, key, now)
        self._known = lambda: known_identity(folder, certificate, key)
        self._now = now
        self._reader = reader or ManifestReader()
        self._lock = threading.Lock()
        self._loaded: Identity | None = None

    @property
    def identity(self) -> Identity:
        """The signing identity, loaded or made at first use and renewed when due. Raises `CredentialsError`."""
        with self._lock:
            if self._loaded is None or not self._loaded.valid_between[0] <= self._now() < self._loaded.valid_between[1]:
                self._loaded = _verified_identity(self._load())
            return self._loaded

    def make_ingredient(self, number: int, data: bytes) -> ReferenceIngredient:
        """Prepare reference `number` (1-based; `data` is its file) for the credentials of a picture. Call it once per
        run.

        Credentials that cannot be read are left out, and broken ones are copied; `note` says so.
        """
        mime = _detect_mime(data)
        found = self._reader.read(data)
        if found.state == "none":
            return ReferenceIngredient(mime=mime)
        if found.state == "unreadable":
            return ReferenceIngredient(
                mime=mime, note=f"Image {number}: {found.summary} They are left out of the new picture's."
            )
        if found.state == "broken":
            note = f"Image {number}: {found.summary} Its credentials go along, marked as what they are."
            return ReferenceIngredient(mime=mime, data=data, note=note)
        return ReferenceIngredient(mime=mime, data=data)

    def sign(
        self,
        data: bytes,
        model: str,
        ingredients: Sequence[ReferenceIngredient] = (),
        watermark: str | None = None,
        prompt: str | None = None,
    ) -> SignedPicture:
        """Sign the bytes of a finished picture (PNG, JPEG or WebP).

        model: its name as users know it. ingredients: `self.make_ingredient` of each reference. watermark: its
        description, None if there is none. prompt: only if the user wants it published. Raises `CredentialsError`.
        """
        mime = _detect_mime(data)
        if mime not in ("image/png", "image/jpeg", "image/webp"):
            raise CredentialsError("Only PNG, JPEG and WebP pictures can be signed: choose one of these formats.")
        identity, definition = self.identity, self._definition(model, ingredients, watermark, prompt)
        with_credentials = [number for number, source in enumerate(ingredients) if source.data is not None]
        unproblematic = [number for number in with_credentials if ingredients[number].note is None]
        for included in (with_credentials, unproblematic, []):
            try:
                signed = _sign(data, mime, identity, definition, ingredients, included)
            except _SigningRefused:
                if not included:
                    raise
                continue
            if not included or len(signed) - len(data) <= MAX_MANIFESTS:
                break
        omitted = ", ".join(f"Image {number + 1}" for number in with_credentials if number not in included)
        notes = (f"Too large or too damaged to go along: the content credentials of {omitted}.",) if omitted else ()
        return SignedPicture(data=signed, notes=notes)

    def read(self, picture: Path | bytes) -> Credentials:
        """Read the credentials of any picture, including hostile ones; problems are reported in the result."""
        if isinstance(picture, bytes):
            data = picture
        else:
            try:
                with picture.open("rb") as file:
                    data = file.read(MAX_INSPECTED_BYTES + 1)
            except OSError as error:
                return unreadable_credentials(f"the file cannot be opened ({error.strerror or 'unknown reason'})")
        return self._reader.read(data, self._known())

    def _definition(
        self, model: str, ingredients: Sequence[ReferenceIngredient], watermark: str | None, prompt: str | None
    ) -> dict[str, Any]:
        """The manifest without its ingredients. The specification defines the field names."""
        agent = {"name": "flux2-studio", "version": __version__, "model": _encodable(model)}
        when = self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")  # by this machine's clock
        main_action: dict[str, Any] = {"softwareAgent": agent, "when": when, "parameters": {}}
        if prompt is not None:
            main_action["parameters"]["flux2-studio.prompt"] = _encodable(prompt)
        actions = [main_action]
        if ingredients:
            main_action |= {
                "action": "c2pa.edited",
                "digitalSourceType": f"{SOURCE_TYPE_URL}compositeWithTrainedAlgorithmicMedia",
            }
            if len(ingredients) > 1:
                main_action["parameters"]["ingredientIds"] = [_label(number) for number in range(1, len(ingredients))]
            actions.insert(0, {"action": "c2pa.opened", "parameters": {"ingredientIds": [_label(0)]}})
        else:
            main_action |= {"action": "c2pa.created", "digitalSourceType": f"{SOURCE_TYPE_URL}trainedAlgorithmicMedia"}
        if watermark is not None:
            actions.append({"action": "c2pa.watermarked.unbound", "softwareAgent": agent, "description": watermark})
        return {
            "claim_generator_info": [{"name": "flux2-studio", "version": __version__}],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions, "allActionsIncluded": True}}],
        }


class _SigningRefused(CredentialsError):
    """The library refused to sign."""


def _label(number: int) -> str:
    return f"image {number + 1}"


def _encodable(text: str) -> str:
    """Replace lone surrogates in `text`, which file names and browsers may contain and UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _settings(identity: Identity | None) -> dict[str, Any]:
    """The library's settings: fully offline, and only `identity` is trusted."""
    trust = {"trust_config": ALLOWED_KEY_USAGES} | ({"user_anchors": identity.issuer} if identity else {})
    return {
        "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": True},
        "core": {"allowed_network_hosts": [], "allow_redirects": False, "decode_identity_assertions": False},
        "builder": {"thumbnail": {"enabled": False}},
        "trust": trust,
    }


def _sign(
    data: bytes,
    mime: str,
    identity: Identity,
    definition: dict[str, Any],
    ingredients: Sequence[ReferenceIngredient],
    with_credentials: Sequence[int],
) -> bytes:
    """Sign `data`. with_credentials: indices of the ingredients whose own credentials are copied."""
    try:
        import c2pa
    except (ImportError, OSError, RuntimeError) as error:  # raised if its binary part is missing
        raise CredentialsError(
            "The library that signs pictures cannot be loaded here: install c2pa-python anew (pip install -r "
            "requirements.txt), or do not sign."
        ) from error

    described = [
        {"title": f"Image {number + 1}", "label": _label(number), "relationship": "inputTo" if number else "parentOf"}
        | ({"format": source.mime} if source.mime else {})
        for number, source in enumerate(ingredients)
    ]
    bare = [ingredient for number, ingredient in enumerate(described) if number not in with_credentials]
    info = c2pa.C2paSignerInfo(identity.algorithm, identity.chain.encode(), identity.key, None)
    out = io.BytesIO()
    try:
        with (
            c2pa.Context.from_dict(_settings(None)) as context,
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(definition | {"ingredients": bare}, context=context) as builder,
        ):
            for number in with_credentials:
                builder.add_ingredient(
                    described[number], ingredients[number].mime, io.BytesIO(ingredients[number].data or b"")
                )
            builder.sign(signer, mime, io.BytesIO(data), out)
    except c2pa.C2paError as error:
        raise _SigningRefused(
            f"The picture could not be signed ({str(error)[:200]}): check the certificate and its key, or do not sign."
        ) from error
    return out.getvalue()


def _verified_identity(identity: Identity) -> Identity:
    """Return `identity` after a test signature that the library finds valid: fail early, not after hours."""
    from PIL import Image

    blank = io.BytesIO()
    Image.new("RGB", (8, 8)).save(blank, "PNG")
    created = {"action": "c2pa.created", "digitalSourceType": f"{SOURCE_TYPE_URL}trainedAlgorithmicMedia"}
    definition = {"assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}]}
    try:
        _sign(blank.getvalue(), "image/png", identity, definition, (), ())
    except _SigningRefused as error:
        raise CredentialsError(
            "The certificate that FLUX2_C2PA_CERTIFICATE names is not one for signing pictures: name one that follows "
            "C2PA's profile, with all of its chain, or unset FLUX2_C2PA_CERTIFICATE and FLUX2_C2PA_KEY to sign with a "
            "local identity."
            if not identity.local
            else str(error)
        ) from error
    return identity


def _detect_mime(data: bytes) -> str | None:
    """Detect a picture's MIME type from its first bytes; None for anything that must not reach the library."""
    found = detect_picture_type(data)
    return found.mime if found and found.mime in READABLE_MIMES else None
