"""Finished pictures are signed so that c2pa's own reader says Valid; any picture's credentials are read and judged."""

from __future__ import annotations

import http.server
import io
import json
import logging
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux2_studio import __version__
from flux2_studio.errors import CredentialsError
from flux2_studio.provenance.c2pa.credentials import MAX_INSPECTED_BYTES, ManifestReader, ReferenceIngredient, Signer
from flux2_studio.provenance.identity import load_identity
from tests import certificates

ROOT = Path(__file__).resolve().parents[2]
MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
FORMATS = pytest.mark.parametrize("format", MIME)
NOON = datetime(2026, 2, 3, 12, 30, 59, tzinfo=UTC)
OFFLINE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer(tmp_path_factory.mktemp("home") / "identity", now=lambda: datetime.now(UTC))


def picture(format: str = "PNG", seed: int = 0) -> bytes:
    """A picture of smooth colours, 64 x 64."""
    grid = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(grid).resize((64, 64), Image.Resampling.BICUBIC).save(out, format)
    return out.getvalue()


def sources_of(signer: Signer, references: Sequence[bytes]) -> list[ReferenceIngredient]:
    return [signer.make_ingredient(number, data) for number, data in enumerate(references, start=1)]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def store_of(data: bytes, format: str = "PNG") -> dict[str, Any]:
    """What c2pa's own reader says, with its usual settings but for the network."""
    with c2pa.Context.from_dict(OFFLINE) as context, c2pa.Reader(MIME[format], io.BytesIO(data), context=context) as it:
        return json.loads(it.json())


def manifest_of(data: bytes, format: str = "PNG") -> dict[str, Any]:
    store = store_of(data, format)
    return store["manifests"][store["active_manifest"]]


def actions_of(data: bytes) -> list[dict[str, Any]]:
    (assertion,) = manifest_of(data)["assertions"]
    assert assertion["label"] == "c2pa.actions.v2"
    return assertion["data"]["actions"]


def failures(store: Mapping[str, Any]) -> list[str]:
    return [status["code"] for status in store["validation_results"]["activeManifest"]["failure"]]


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG: their kinds, and themselves whole."""
    at = 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        yield data[at + 4 : at + 8], data[at : at + 12 + length]
        at += 12 + length


def stranger(
    folder: Path, *assertions: dict[str, Any], url: str | None = None, thumbnail: bytes | None = None, **more: Any
) -> bytes:
    """A PNG signed by another program and identity. url: where its manifest is said to be, instead of being in it."""
    identity = load_identity(folder)
    created = {"action": "c2pa.created", "digitalSourceType": f"{IPTC}digitalCapture"}
    actions = {"label": "c2pa.actions.v2", "data": {"actions": [created]}}
    manifest = {"claim_generator_info": [{"name": "Camera"}], "assertions": [actions, *assertions], **more}
    out = io.BytesIO()
    info = c2pa.C2paSignerInfo("es256", identity.chain.encode(), identity.key, None)
    if thumbnail is not None:
        manifest["thumbnail"] = {"format": "image/jpeg", "identifier": "small.jpg"}
    settings = OFFLINE | {"builder": {"thumbnail": {"enabled": False}}}
    with c2pa.Context.from_dict(settings) as context, c2pa.Builder(manifest, context=context) as builder:
        if thumbnail is not None:
            builder.add_resource("small.jpg", io.BytesIO(thumbnail))
        if url is not None:
            builder.set_remote_url(url)
            builder.set_no_embed()
        with c2pa.Signer.from_info(info) as it:
            builder.sign(it, "image/png", io.BytesIO(picture(seed=7)), out)
    return out.getvalue()


@FORMATS
def test_the_library_itself_says_valid(signer: Signer, format: str) -> None:
    before = picture(format)
    signed = signer.sign(before, "FLUX.2 [klein] 4B")
    assert signed.notes == ()
    store = store_of(signed.data, format)
    assert store["validation_state"] == "Valid"
    assert failures(store) == ["signingCredential.untrusted"], "which every identity is that nobody vouches for"
    np.testing.assert_array_equal(pixels(signed.data), pixels(before))
    found = signer.read(signed.data)
    assert (found.state, found.intact, found.own, found.problems) == ("intact", True, True, ())
    assert found.summary == "Intact: unchanged since this installation signed it."
    assert found.generator == f"flux2-studio {__version__}"
    assert found.assertions == ("c2pa.actions.v2",)


def test_a_generated_picture_says_how_it_was_made_but_not_the_prompt(tmp_path: Path) -> None:
    signer = Signer(tmp_path, now=lambda: NOON.replace(year=datetime.now(UTC).year))
    data = signer.sign(picture(), "FLUX.2 [klein] 4B", watermark="dwtDctSvd, 46 bits").data
    agent = {"name": "flux2-studio", "version": __version__, "model": "FLUX.2 [klein] 4B"}
    made, marked = actions_of(data)
    assert made["action"] == "c2pa.created"
    assert made["digitalSourceType"] == f"{IPTC}trainedAlgorithmicMedia"
    assert made["softwareAgent"] == agent
    assert made["when"].endswith("-02-03T12:30:59Z")
    assert not made.get("parameters")
    assert (marked["action"], marked["description"]) == ("c2pa.watermarked.unbound", "dwtDctSvd, 46 bits")
    assert manifest_of(data).get("ingredients", []) == []
    assert "thumbnail" not in manifest_of(data)
    assert signer.read(data).actions[0].text == "Created, made by an AI model"
    assert signer.read(data).actions[0].agent == f"FLUX.2 [klein] 4B in flux2-studio {__version__}"


def test_the_prompt_is_told_where_the_user_wants_it(signer: Signer) -> None:
    for prompt in ('a "quoted" <b>fox</b>,\nüber 狐', ""):
        data = signer.sign(picture(), "nano", prompt=prompt).data
        assert actions_of(data)[0]["parameters"]["flux2-studio.prompt"] == prompt
    assert actions_of(signer.sign(picture(), "odd \udcff", prompt="\ud800!").data)[0]["parameters"] == {
        "flux2-studio.prompt": "?!"
    }


def test_an_edit_names_its_references_and_keeps_their_credentials(signer: Signer, tmp_path: Path) -> None:
    photo = stranger(tmp_path)
    generated = signer.sign(picture("JPEG", 2), "nano").data
    references = [photo, picture("WEBP", 3), generated, b"BM, which no reader of credentials knows"]
    sources = sources_of(signer, references)
    assert [source.note for source in sources] == [None] * 4
    assert [source.data is not None for source in sources] == [True, False, True, False]
    signed = signer.sign(picture(), "nano", sources)
    assert signed.notes == ()
    assert store_of(signed.data)["validation_state"] == "Valid"
    opened, edited = actions_of(signed.data)
    ingredients = {it["title"]: it for it in manifest_of(signed.data)["ingredients"]}
    assert {title: it["relationship"] for title, it in ingredients.items()} == {
        "Image 1": "parentOf",
        "Image 2": "inputTo",
        "Image 3": "inputTo",
        "Image 4": "inputTo",
    }
    assert all("thumbnail" not in it for it in ingredients.values()), "what the user shows the model is not published"

    def named(action: Mapping[str, Any]) -> set[str]:
        urls = {it["url"].rpartition("/")[2] for it in action["parameters"]["ingredients"]}
        return {title for title, it in ingredients.items() if it["label"] in urls}

    assert (opened["action"], named(opened)) == ("c2pa.opened", {"Image 1"})
    assert (edited["action"], named(edited)) == ("c2pa.edited", {"Image 2", "Image 3", "Image 4"})
    assert edited["digitalSourceType"] == f"{IPTC}compositeWithTrainedAlgorithmicMedia"
    kept = store_of(signed.data)["manifests"]
    assert kept[store_of(photo)["active_manifest"]]["claim_generator_info"][0]["name"] == "Camera"
    assert store_of(generated, "JPEG")["active_manifest"] in kept
    found = signer.read(signed.data)
    assert [(it.title, it.relation, it.signed, it.problems) for it in found.ingredients] == [
        ("Image 1", "the picture that was edited", True, ()),
        ("Image 2", "shown to the model", False, ()),
        ("Image 3", "shown to the model", True, ()),
        ("Image 4", "shown to the model", False, ()),
    ]
    assert found.ingredients[0].generator == "Camera"


def test_the_same_reference_twice_and_an_edit_of_an_edit(signer: Signer) -> None:
    data = signer.sign(picture(seed=1), "nano").data
    for _ in range(3):
        data = signer.sign(picture(), "nano", sources_of(signer, [data, data])).data
    found = signer.read(data)
    assert (found.state, found.own, len(found.ingredients)) == ("intact", True, 2)
    assert len(json.loads(found.report)["manifests"]) == 4


def changed(data: bytes, format: str) -> bytes:
    """A signed picture with one pixel (PNG) or a byte of its coded pixels changed, credentials left in place."""
    if format == "PNG":
        image = Image.open(io.BytesIO(data))
        red, green, blue = image.getpixel((5, 5))  # type: ignore[misc]
        image.putpixel((5, 5), (red ^ 1, green, blue))
        out = io.BytesIO()
        image.save(out, "PNG")
        (kept,) = [whole for kind, whole in chunks(data) if kind == b"caBX"]
        (header, *rest) = [whole for _, whole in chunks(out.getvalue())]
        return data[:8] + header + kept + b"".join(rest)
    begin = data.index(b"VP8 ") + 60 if format == "WEBP" else len(data) - 300
    for at in range(begin, begin + 300):
        edited = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        with suppress(OSError):  # not every change leaves a picture
            if not np.array_equal(pixels(edited), pixels(data)):
                return edited
    raise AssertionError("no byte was found")


def forge(data: bytes) -> bytes:
    """A signed picture whose credentials say something else, with nothing done to hide it."""
    assert data.count(b"trainedAlgorithmicMedia") == 1
    return data.replace(b"trainedAlgorithmicMedia", b"drainedAlgorithmicMedia")


@FORMATS
def test_a_changed_pixel_is_told(signer: Signer, format: str) -> None:
    data = signer.sign(picture(format), "nano").data
    edited = changed(data, format)
    assert not np.array_equal(pixels(edited), pixels(data))
    found = signer.read(edited)
    assert (found.state, found.own) == ("broken", False)
    assert found.summary == "Not intact: The picture was changed after it was signed."


def test_a_changed_statement_is_told(signer: Signer) -> None:
    data = signer.sign(picture(), "nano").data
    found = signer.read(forge(data))
    assert found.state == "broken"
    assert "A statement in the credentials was changed after they were signed." in found.problems


def test_changed_metadata_is_told(signer: Signer) -> None:
    info = PngInfo()
    info.add_text("parameters", "seed 1")
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "PNG", pnginfo=info)
    data = signer.sign(out.getvalue(), "nano").data
    assert Image.open(io.BytesIO(data)).text["parameters"] == "seed 1"  # type: ignore[attr-defined]
    text = b"tEXtparameters\0seed 1"
    forged = text.replace(b"1", b"2")
    both = [it + struct.pack(">I", zlib.crc32(it)) for it in (text, forged)]
    assert both[0] in data
    assert signer.read(data.replace(both[0], both[1])).state == "broken"


@FORMATS
def test_credentials_that_another_program_dropped_are_missed(signer: Signer, format: str) -> None:
    out = io.BytesIO()
    Image.open(io.BytesIO(signer.sign(picture(format), "nano").data)).save(out, format)
    for data in (out.getvalue(), picture(format)):
        found = signer.read(data)
        assert (found.state, found.present) == ("none", False)
        assert "never signed, or a program that saved it again dropped them" in found.summary


def test_somebody_elses_signature_is_intact_but_confirms_no_name(signer: Signer, tmp_path: Path) -> None:
    found = signer.read(stranger(tmp_path))
    assert (found.state, found.own, found.generator) == ("intact", False, "Camera")
    assert "nobody here confirms that name" in found.summary
    mine = signer.sign(picture(), "nano").data
    assert not Signer(tmp_path / "elsewhere").read(mine).own
    assert not (tmp_path / "elsewhere").exists(), "reading makes no identity"


def test_what_is_no_picture_is_not_signed(signer: Signer) -> None:
    for data in (b"", b"hello", picture("GIF"), b"%PDF-1.4"):
        with pytest.raises(CredentialsError, match="Only PNG, JPEG and WebP"):
            signer.sign(data, "nano")
    with pytest.raises(CredentialsError, match="The picture could not be signed"):
        signer.sign(picture()[:40], "nano")


@pytest.mark.parametrize("kind", ["es384", "ps256", "ed25519"])
def test_own_certificates_sign(tmp_path: Path, kind: str) -> None:
    made = certificates.make(tmp_path, kind)
    signer = Signer(tmp_path / "identity", made.certificate, made.key)
    data = signer.sign(picture(), "nano").data
    assert store_of(data)["validation_state"] == "Valid"
    found = signer.read(data)
    assert (found.state, found.own, found.signer) == ("intact", True, "Fox & Sons")


def test_an_own_certificate_for_document_signing_is_taken(tmp_path: Path) -> None:
    usage = ExtendedKeyUsageOID.EMAIL_PROTECTION.__class__("1.3.6.1.5.5.7.3.36")
    made = certificates.make(tmp_path, usage=usage)
    signer = Signer(tmp_path / "identity", made.certificate, made.key)
    assert signer.read(signer.sign(picture(), "nano").data).own


def test_an_own_certificate_that_c2pa_refuses_is_told_before_a_run(tmp_path: Path) -> None:
    made = certificates.make(tmp_path, usage=ExtendedKeyUsageOID.CODE_SIGNING)
    signer = Signer(tmp_path / "identity", made.certificate, made.key)
    with pytest.raises(CredentialsError, match="is not one for signing pictures: name one that follows C2PA's profile"):
        signer.identity  # noqa: B018 - asked for, it is made and tried
    assert not (tmp_path / "identity").exists(), "no silent fallback"


def test_an_identity_due_for_renewal_is_renewed_while_running(tmp_path: Path) -> None:
    clock = [datetime.now(UTC) - timedelta(days=6 * 365)]
    signer = Signer(tmp_path, now=lambda: clock[0])
    first = signer.identity
    assert signer.identity is first
    clock[0] = datetime.now(UTC)
    assert signer.identity.serial != first.serial
    assert signer.read(signer.sign(picture(), "nano").data).own


def test_broken_or_hostile_references_are_told_and_do_not_break_the_run(signer: Signer, tmp_path: Path) -> None:
    good = signer.sign(picture(seed=1), "nano").data
    forged = forge(signer.sign(picture(seed=2), "nano").data)
    endless = stranger(tmp_path, {"label": "org.example.long", "data": {"text": "x" * 30_000}})
    signer = Signer(tmp_path, reader=ManifestReader(longest=20_000))
    references = [
        changed(good, "PNG"),
        forged,
        good[: len(good) // 2],
        endless,
        b"\x89PNG\r\n\x1a\n" + b"c2pa" * 50,
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 0xFFFFFFF0) + b"caBX" + b"c2pa" * 50,
        b"not a picture, but c2pa",
        b"",
    ]
    sources = sources_of(signer, references)
    notes = [source.note or "" for source in sources]
    assert "Image 1: Not intact: The picture was changed after it was signed. Its credentials go along" in notes[0]
    assert "A statement in the credentials was changed" in notes[1]
    assert "The content credentials cannot be read" in notes[2]
    assert "characters long. They are left out of the new picture's." in notes[3]
    assert all(f"Image {number}: The content" in note for number, note in enumerate(notes[4:7], start=5))
    assert notes[7] == ""
    signed = signer.sign(picture(), "nano", sources)
    assert signed.notes == ()
    found = signer.read(signed.data)
    assert (found.state, found.own, len(found.ingredients)) == ("intact", True, 8)
    assert [bool(it.problems) for it in found.ingredients] == [True, True, *[False] * 6]
    assert found.ingredients[1].problems == ("A statement in the credentials was changed after they were signed.",)


def test_references_whose_credentials_contradict_each_other(signer: Signer) -> None:
    good = signer.sign(picture(seed=1), "nano").data
    signed = signer.sign(picture(), "nano", sources_of(signer, [changed(good, "PNG"), good, forge(good)]))
    assert signed.notes == ("Too large or too damaged to go along: the content credentials of Image 1, Image 3.",)
    found = signer.read(signed.data)
    assert (found.state, found.own) == ("intact", True)
    assert [it.signed for it in found.ingredients] == [False, True, False]


def test_references_with_very_large_credentials_are_named_without_them(signer: Signer, tmp_path: Path) -> None:
    sources = sources_of(signer, [stranger(tmp_path, thumbnail=bytes(17_000_000))])
    assert sources[0].note is None
    signed = signer.sign(picture(), "nano", sources)
    assert signed.notes == ("Too large or too damaged to go along: the content credentials of Image 1.",)
    assert len(signed.data) < 100_000
    assert signer.read(signed.data).own


def test_hostile_texts_are_cut_and_stripped(signer: Signer, tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>\x1b[2J\u202e\n" + "x" * 1000
    action = {"action": "c2pa.edited", "description": nasty, "softwareAgent": {"name": nasty, "model": nasty}}
    more = {"label": "c2pa.actions.v2", "data": {"actions": [action] * 60}}
    ingredients = [{"title": nasty, "relationship": "componentOf"} for _ in range(60)]
    found = signer.read(stranger(tmp_path, more, ingredients=ingredients))
    texts = [found.summary, found.signer, found.generator, *found.assertions, *found.problems]
    texts += [text for it in found.actions for text in (it.text, it.name, it.agent, it.when, it.prompt)]
    texts += [text for it in found.ingredients for text in (it.title, it.relation, it.generator, *it.problems)]
    assert all(text.isprintable() for text in texts)
    assert max(map(len, texts)) < 1000
    assert (len(found.ingredients), found.ingredients[-1].title) == (51, "and 10 more")
    assert len(found.actions) == 51
    assert found.ingredients[0].title.startswith("<script>"), "shown as text by the page"


def test_no_process_is_started_for_a_picture_without_credentials(tmp_path: Path) -> None:
    path = tmp_path / "reader.py"
    path.write_text("raise SystemExit('started')")
    signer = Signer(tmp_path, reader=ManifestReader(path))
    for data in (picture("PNG"), picture("JPEG"), picture("WEBP"), picture("GIF"), b"hello", b""):
        assert signer.read(data).state == "none"
    assert signer.read(signer.sign(picture(), "nano").data).state == "unreadable"


def test_files_that_cannot_be_read_are_told(signer: Signer, tmp_path: Path) -> None:
    assert "the file cannot be opened (No such file" in signer.read(tmp_path / "gone.png").summary
    assert "the file cannot be opened" in signer.read(tmp_path).summary
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(MAX_INSPECTED_BYTES + 1)
    assert "larger than 200 MB" in signer.read(large).summary


class _Server(http.server.ThreadingHTTPServer):
    """Notes who asks."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/manifest.c2pa"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        self.server.asked.append(self.path)
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_nothing_is_fetched(signer: Signer, tmp_path: Path, server: _Server) -> None:
    remote = stranger(tmp_path, url=server.url)
    found = signer.read(remote)
    assert found.state == "unreadable"
    assert f"they are kept on the network, which is not asked ({server.url})" in found.summary
    sources = sources_of(signer, [remote])
    assert "which is not asked" in (sources[0].note or "")
    assert signer.read(signer.sign(picture(), "nano", sources).data).own
    made = certificates.make(tmp_path, responder=server.url)
    own = Signer(tmp_path / "identity", made.certificate, made.key)
    assert own.read(own.sign(picture(), "nano").data).own
    assert server.asked == []
    with pytest.raises(c2pa.C2paError):
        c2pa.Reader("image/png", io.BytesIO(remote))
    assert server.asked == ["/manifest.c2pa"], "the library left alone would have asked, so the test can fail"


def test_threads_may_sign_and_read_at_once(tmp_path: Path) -> None:
    signer = Signer(tmp_path)  # not made yet: all of them ask for it

    def work(number: int) -> bytes:
        data = signer.sign(picture(seed=number), f"model {number}").data
        assert actions_of(data)[0]["softwareAgent"]["model"] == f"model {number}"
        return data

    with ThreadPoolExecutor(6) as pool:
        signed = list(pool.map(work, range(12)))
        assert all(found.own for found in pool.map(signer.read, signed[:6]))
    assert len({manifest_of(data)["signature_info"]["cert_serial_number"] for data in signed}) == 1


def test_the_key_is_in_no_log_output_or_picture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    made = certificates.make(tmp_path)
    signer = Signer(tmp_path / "identity", made.certificate, made.key)
    data = signer.sign(picture(), "nano").data
    errors = []
    for damaged in (picture()[:40], b""):
        with pytest.raises(CredentialsError) as caught:
            signer.sign(damaged, "nano")
        errors.append(repr(caught.value) + repr(caught.value.__cause__))
    told = "".join(
        [caplog.text, *capfd.readouterr(), *errors, repr(signer), repr(signer.read(data)), repr(vars(signer))]
    )
    body = [line for line in made.key.read_text().splitlines() if "-----" not in line]
    assert body
    for line in body:
        assert line not in told
        assert line.encode() not in data
