"""`inspect` tells in a terminal what a picture says of itself, whoever made it, and as JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from flux2_studio.cli import inspect as cli_inspect
from flux2_studio.provenance import watermark
from flux2_studio.provenance.c2pa.credentials import Signer
from flux2_studio.provenance.metadata import encode_picture
from flux2_studio.provenance.watermark import PUBLISHED_MESSAGE, WatermarkMessage
from flux2_studio.record import Record
from flux2_studio.request import Request
from tests.command_line import Done, Home

HOSTILE = "a fox\x1b[2J\r\n\u202e<b>"
RECORD = Record(
    request=Request(
        prompt=HOSTILE, negative_prompt="", checkpoint="nano", width=256, height=256, steps=4, guidance=1.0, seed=9
    ),
    label="nano",
)


class Studio(Home):
    """Makes pictures, and has the command line inspect them."""

    def inspect(self, *arguments: str | Path, **environment: str) -> Done:
        return self.run("inspect", *arguments, **environment)

    def picture(self, message: WatermarkMessage = PUBLISHED_MESSAGE) -> Path:
        image = watermark.embed_watermark(Image.new("RGB", (256, 256), "teal"), message).image
        data = encode_picture(image, "png", RECORD).data
        path = self.folder / "fox.png"
        path.write_bytes(Signer(self.folder / "home" / "identity").sign(data, "nano", prompt=HOSTILE).data)
        return path


@pytest.fixture
def home(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


def test_a_picture_of_ones_own_in_words(home: Studio) -> None:
    done = home.inspect(home.picture())
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("fox.png: PNG, 256 x 256 pixels, ")
    assert any(line.startswith("- The settings in the file are those that this installation wrote") for line in lines)
    assert any(line.startswith("- Watermark found: 46 of the 46 bits") for line in lines)
    assert "  Seed: 9" in lines and "  Checkpoint: nano (nano)" in lines
    assert any(line.startswith("  Signed by: ") and line.endswith("(this installation)") for line in lines)


def test_nothing_in_a_file_reaches_the_terminal_but_text(home: Studio) -> None:
    done = home.inspect(home.picture())
    assert "  Prompt: a fox [2J   <b>" in done.stdout.splitlines()
    assert all(line.isprintable() for line in done.stdout.splitlines())


def test_as_json(home: Studio) -> None:
    done = home.inspect(home.picture(), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    read = json.loads(done.stdout)
    assert read["settings"]["request"]["prompt"] == HOSTILE
    assert read["watermark"]["found"] is True and read["credentials"]["own"] is True
    assert read["file"]["name"] == "fox.png" and read["findings"]
    assert done.stdout.isascii() and "\x1b" not in done.stdout


def test_ones_own_message_is_looked_for_too(home: Studio) -> None:
    picture = home.picture(WatermarkMessage.parse("studio 1"))
    assert "Watermark found" in home.inspect(picture, FLUX2_WATERMARK_MESSAGE="studio 1").stdout
    assert "No watermark found" in home.inspect(picture).stdout


def test_anybodys_picture(home: Studio) -> None:
    path = home.folder / "photo.jpg"
    Image.new("RGB", (300, 300)).save(path)
    done = home.inspect(path)
    assert done.returncode == 0
    assert "- There are no settings in the file." in done.stdout and "no content credentials" in done.stdout
    assert not (home.folder / "home").exists(), "looking at a picture makes no identity"


@pytest.mark.parametrize("json_too", [(), ("--json",)])
@pytest.mark.parametrize(
    ("content", "says"), [(None, "There is no file"), (b"rubbish", "is not a picture"), (b"", "empty")]
)
def test_no_file_and_no_picture_are_a_users_error(
    home: Studio, content: bytes | None, says: str, json_too: tuple[str, ...]
) -> None:
    path = home.folder / "x.png"
    if content is not None:
        path.write_bytes(content)
    done = home.inspect(path, *json_too)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flux2-studio: ") and says in done.stderr and done.stderr.count("\n") == 1


def test_plain_is_one_line() -> None:
    assert cli_inspect.strip_control_characters("a\x1b[0m\n\u202eb\x9bc 狐") == "a [0m  b c 狐"
