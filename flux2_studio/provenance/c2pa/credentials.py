"""Content credentials (C2PA): a finished picture says, signed, how it was made; any picture's are read and judged.

The signature covers every byte of the file, so signing is the last thing that is done to it. Nothing here uses the
network: no time stamp is asked for, no manifest, revocation list or identity that a file points to is fetched.

Settings go to the library as a context of each call. It has no settings of the process then, and calls from several
threads share nothing.

What is written (C2PA 2.4, "Actions" and "Ingredient"; IPTC's digital source types):
- without references: c2pa.created, trainedAlgorithmicMedia;
- with references: c2pa.opened on the first one (parentOf), then c2pa.edited, compositeWithTrainedAlgorithmicMedia, with
  the others as what went into the model (inputTo). A reference is called "Image 1", as the prompt calls it, never by
  its file's name, and gets no thumbnail: neither is ours to publish. Its own credentials go along, as they are;
- c2pa.watermarked.unbound where a watermark was laid: it says how the picture was made, not where its manifest is.
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
from flux2_studio.provenance.c2pa.report import Credentials, no_credentials, parse_report, unreadable_credentials
from flux2_studio.provenance.identity import Identity, known_identity, load_identity

MAX_INSPECTED_BYTES = 200 * 10**6  # of a picture to be read, as for references
MAX_MANIFESTS = 16 * 10**6  # bytes that the references' credentials may add to a picture
READER_SCRIPT = Path(__file__).with_name("reader.py")

SOURCE_TYPE_URL = "http://cv.iptc.org/newscodes/digitalsourcetype/"
ALLOWED_KEY_USAGES = (
    "\n".join(  # the extended key usages that C2PA allows; the library, left alone, knows only the first
        (
            "1.3.6.1.5.5.7.3.4",  # e-mail protection
            "1.3.6.1.5.5.7.3.36",  # document signing
            "1.3.6.1.5.5.7.3.8",  # time stamping
            "1.3.6.1.5.5.7.3.9",  # OCSP signing
            "1.3.6.1.4.1.311.76.59.1.9",  # Microsoft's C2PA signing
            "1.3.6.1.4.1.62558.2.1",  # C2PA's own claim signing
        )
    )
)


@dataclass(frozen=True, kw_only=True)
class ReferenceIngredient:
    """One reference as an ingredient: `data` only where it has credentials to go along; `note` tells of trouble."""

    mime: str | None
    data: bytes | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class SignedPicture:
    """A signed picture's bytes, and what the user should know of it."""

    data: bytes
    notes: tuple[str, ...]


class ManifestReader:
    """Reads the credentials of untrusted pictures, each in a process of its own with limits.

    script: what that process runs. memory: bytes; seconds: of computing, three times that by the clock; longest:
    characters of the library's JSON.
    """

    def __init__(
        self, script: Path = READER_SCRIPT, memory: int = 3 << 30, seconds: int = 10, longest: int = 4 * 10**6
    ) -> None:
        self._script = script
        self._memory = memory
        self._seconds = seconds
        self._longest = longest

    def read(self, data: bytes, identity: Identity | None = None) -> Credentials:
        """The credentials in the bytes of a picture; `identity` is the one to be recognised as one's own."""
        if len(data) > MAX_INSPECTED_BYTES:
            return unreadable_credentials(f"the file is larger than {MAX_INSPECTED_BYTES // 10**6} MB")
        if b"c2pa" not in data and b"provenance" not in data:  # each manifest, and each pointer to one, has the word
            return no_credentials()
        mime = _detect_mime(data)
        if mime is None:
            return unreadable_credentials(
                "this is not a picture of a kind that is read here: PNG, JPEG, WebP, AVIF, GIF or TIFF"
            )
        asked = {
            "mime": mime,
            "settings": _settings(identity),
            "memory": self._memory,
            "seconds": self._seconds,
            "longest": self._longest,
        }
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(self._script)],  # -P: `import c2pa` must not find a file beside the script
                input=json.dumps(asked).encode() + b"\n" + data,
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
            answer = json.loads(done.stdout)
        except ValueError:
            return unreadable_credentials("they made the reader fail: too large, or made to do so")
        if "report" in answer:
            return parse_report(answer["report"], identity.serial if identity else None)
        return no_credentials() if answer.get("absent") else unreadable_credentials(str(answer.get("problem")))


class Signer:
    """Signs finished pictures, and reads the credentials of any.

    folder: where the local identity lives. certificate, key: the user's own instead, as PEM files. Several threads may
    use one `Signer` at once.
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
        """Who signs; made at the first use, renewed when it is due. Raises `CredentialsError`."""
        with self._lock:
            if self._loaded is None or not self._loaded.valid_between[0] <= self._now() < self._loaded.valid_between[1]:
                self._loaded = _verified_identity(self._load())
            return self._loaded

    def make_ingredient(self, number: int, data: bytes) -> ReferenceIngredient:
        """What of reference `number` (1-based), a file's bytes, goes into the credentials of a picture: once per run.

        A reference with damaged or hostile credentials is named without them, and `note` says so.
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
        """The bytes of a finished picture (PNG, JPEG or WebP), signed.

        model: what made it, as users call it. ingredients: `self.make_ingredient` of each of its references. watermark:
        how it was marked, None if it was not. prompt: given only where the user wants it published. Raises
        `CredentialsError`.
        """
        mime = _detect_mime(data)
        if mime not in ("image/png", "image/jpeg", "image/webp"):
            raise CredentialsError("Only PNG, JPEG and WebP pictures can be signed: choose one of these formats.")
        identity, definition = self.identity, self._definition(model, ingredients, watermark, prompt)
        wanted = [number for number, source in enumerate(ingredients) if source.data is not None]
        sound = [number for number in wanted if ingredients[number].note is None]
        for kept in (wanted, sound, []):
            try:
                made = _sign(data, mime, identity, definition, ingredients, kept)
            except _SigningRefused:
                if not kept:
                    raise
                continue
            if not kept or len(made) - len(data) <= MAX_MANIFESTS:
                break
        left = ", ".join(f"Image {number + 1}" for number in wanted if number not in kept)
        notes = (f"Too large or too damaged to go along: the content credentials of {left}.",) if left else ()
        return SignedPicture(data=made, notes=notes)

    def read(self, picture: Path | bytes) -> Credentials:
        """The credentials of any picture, hostile ones too: whatever is wrong is said in the result."""
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
        """The manifest, but for its ingredients. The names of its fields are the specification's."""
        agent = {"name": "flux2-studio", "version": __version__, "model": _encodable(model)}
        when = self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")  # as this machine's clock has it
        made: dict[str, Any] = {"softwareAgent": agent, "when": when, "parameters": {}}
        if prompt is not None:
            made["parameters"]["flux2-studio.prompt"] = _encodable(prompt)
        actions = [made]
        if ingredients:
            made |= {
                "action": "c2pa.edited",
                "digitalSourceType": f"{SOURCE_TYPE_URL}compositeWithTrainedAlgorithmicMedia",
            }
            if len(ingredients) > 1:
                made["parameters"]["ingredientIds"] = [_label(number) for number in range(1, len(ingredients))]
            actions.insert(0, {"action": "c2pa.opened", "parameters": {"ingredientIds": [_label(0)]}})
        else:
            made |= {"action": "c2pa.created", "digitalSourceType": f"{SOURCE_TYPE_URL}trainedAlgorithmicMedia"}
        if watermark is not None:
            actions.append({"action": "c2pa.watermarked.unbound", "softwareAgent": agent, "description": watermark})
        return {
            "claim_generator_info": [{"name": "flux2-studio", "version": __version__}],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions, "allActionsIncluded": True}}],
        }


class _SigningRefused(CredentialsError):
    """The library did not sign."""


def _label(number: int) -> str:
    return f"image {number + 1}"


def _encodable(text: str) -> str:
    """`text` without half characters, which a file's name or a browser may bring and UTF-8 does not have."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _settings(identity: Identity | None) -> dict[str, Any]:
    """The library's settings: offline in every respect, nothing trusted but `identity`."""
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
    """`data`, signed. with_credentials: the sources whose own credentials go along."""
    try:
        import c2pa
    except (ImportError, OSError, RuntimeError) as error:  # what it raises where its binary part is missing
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
    """`identity`, after it has signed a picture that the library then found valid: before hours of work, not after."""
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
    """The kind of a picture by its first bytes; None for anything that is not to reach the library."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "image/avif"
    for start, mime in (
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff", "image/jpeg"),
        (b"GIF8", "image/gif"),
        (b"II*\0", "image/tiff"),
        (b"MM\0*", "image/tiff"),
    ):
        if data.startswith(start):
            return mime
    return None
