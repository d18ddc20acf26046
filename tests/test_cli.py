"""The command line, run in this process. What needs a process of its own is in tests/process."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from flux2_studio.checkpoints import CHECKPOINTS
from flux2_studio.cli import main as cli
from flux2_studio.errors import RequestError, SaveError
from flux2_studio.events import Notice, Preview, Result, Status, Stopped
from flux2_studio.provenance import metadata
from flux2_studio.record import Record
from flux2_studio.request import LoraChoice, Request
from tests.command_line import FOX, Home
from tests.fake_openai import FakeOpenAI, says
from tests.loras import write_lora
from tests.models.fake_hub import TOKEN, TOY, FakeHub, serve


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture(scope="module")
def fox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that the command line has made, for tests that only read it."""
    home = Home(tmp_path_factory.mktemp("fox"))
    home.generate(*FOX, "--out", home.folder / "fox.png")
    return home.folder / "fox.png"


def record_in(path: Path) -> Record:
    found = metadata.read_settings(path.read_bytes())
    assert found.record is not None, found.problem
    return found.record


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


# --- asking for nothing, or for what cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["draw"], "invalid choice: 'draw'"),
        (["models"], "COMMAND"),
        (["models", "download"], "NAME"),
        (["models", "path", "klein"], "no checkpoint called 'klein'"),
        (["models", "path", "klein-4b"], "the text encoder, the transformer and the autoencoder must be downloaded"),
        (["generate", "--out", "a.png"], "--prompt"),
        (["generate", "--prompt", "a fox"], "--out"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--dtype", "int3"], "--dtype: invalid choice: 'int3'"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--promt", "b"], "--promt"),
        (["generate", "--prompt", " ", "--out", "a.png"], "Write a prompt first"),
        (
            ["generate", "--prompt", "a fox", "--out", "a.gif"],
            "--out must end in .png, .jpg, .jpeg or .webp, not 'a.gif'",
        ),
        (
            ["generate", "--prompt", "a fox", "--format", "webp", "--out", "a.png"],
            "--out 'a.png' is not named as a picture of --format webp: change one of them.",
        ),
        (
            ["generate", "--prompt", "a fox", "--upsample", "local", "--out", "a.png"],
            "has no language model on this machine",
        ),
        (
            ["generate", "--prompt", "a fox", "--upsample", "openrouter", "--out", "a.png"],
            "OpenRouter needs an API key",
        ),
        (["generate", "--prompt", "a fox", "--out", "no/such/folder/a.png"], "There is no folder 'no/such/folder'"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--model", "klein"], "no checkpoint called 'klein'"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--count", "0"], "between 1 and"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--steps", "9"], "always runs with steps 4"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--negative", "snow"], "does not use a negative prompt"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--width", "63"], "width must be at least 64"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--device", "toaster"], "no device called 'toaster'"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--image", "no-such.png"], "no-such.png"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--lora", "ink"], "no LoRA called 'ink', nor any other"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--lora", "ink:9"], "a number from -4 to 4, not 9.0"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--lora", "ink:nan"], "a number from -4 to 4, not nan"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--lora", "../ink"], "'../ink' is no LoRA's name"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--lora", "a", "--lora", "a:2"], "LoRA a is chosen twice"),
        (["generate", "--prompt", "a fox", "--out", "a.png", "--image", "README.md"], "README.md is not a picture"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_a_users_error_is_one_line_and_code_2(home: Home, arguments: list[str], says: str) -> None:
    done = home.run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("flux2-studio: "), done.stderr
    assert says in done.stderr
    assert home.outputs == []


def test_a_wrong_environment_is_a_users_error(home: Home) -> None:
    home.environment["FLUX2_DTYPE"] = "int3"
    done = home.run("generate", "--prompt", "a fox", "--out", "a.png")
    assert done.returncode == 2
    assert done.stderr.startswith("flux2-studio: FLUX2_DTYPE is 'int3'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("ink", "ink", 1.0),
        ("ink:0.5", "ink", 0.5),
        ("styles/ink:-2", "styles/ink", -2.0),
        ("ink:v2", "ink:v2", 1.0),  # no number: part of the name
        ("ink:v2:.5", "ink:v2", 0.5),
        ("take:2:1", "take:2", 1.0),
        ("pen: and ink", "pen: and ink", 1.0),
    ],
)
def test_a_lora_and_its_weight(text: str, name: str, weight: float) -> None:
    assert cli.parse_lora_choice(text) == LoraChoice(name=name, weight=weight)


def test_weights_that_are_not_here(home: Home) -> None:
    done = home.run("generate", "--model", "klein-4b", "--prompt", "a fox", "--out", home.folder / "fox.png")
    assert done.returncode == 2
    *progress, last = done.stderr.splitlines()
    assert last.startswith("flux2-studio: ") and "FLUX.2-klein-4B" in last and "_MODEL_PATH" in last
    assert not any(line.startswith(("flux2-studio", "Traceback")) for line in progress)
    assert not (home.folder / "fox.png").exists()


# --- pictures --------------------------------------------------------------------------------------------------------


def test_generate_with_loras(home: Home, fox: Path) -> None:
    write_lora(home.folder / "home" / "loras" / "ink.safetensors", odd=True)
    write_lora(home.folder / "home" / "loras" / "styles" / "grain.safetensors", seed=1)
    pictures = {}
    for loras in ((), ("ink",), ("ink:0.5", "styles/grain:-1"), ("ink:0",)):
        out = home.folder / f"{len(pictures)}.png"
        _, told = home.generate(*FOX, "--out", out, *(part for lora in loras for part in ("--lora", lora)))
        assert ("8 of 12 tensors fit" in told) == bool(loras)
        pictures[loras] = pixels(out)
    assert pictures[()] == pictures["ink:0",] == pixels(fox)
    assert len(set(pictures.values())) == 3
    (written,) = (told for told in map(record_in, home.outputs) if len(told.loras) == 2)
    assert [(lora.name, lora.weight) for lora in written.request.loras] == [("ink", 0.5), ("styles/grain", -1.0)]
    assert [len(sha256) for sha256 in written.loras] == [64, 64]


def test_formats_and_marks(home: Home) -> None:
    out = home.folder / "fox.webp"
    _, told = home.generate(*FOX, "--no-sign", "--no-watermark", "--no-check", "--out", out)
    assert Image.open(out).format == "WEBP" and b"c2pa" not in out.read_bytes()
    assert (record_in(out).request.sign, record_in(out).request.watermark) == (False, False)
    assert "watermark" not in told and "Its settings are in the file" in told
    bare = home.folder / "fox.jpg"
    home.generate(*FOX, "--no-metadata", "--format", "jpeg", "--out", bare)
    data = bare.read_bytes()
    assert Image.open(bare).format == "JPEG" and metadata.read_settings(data) == metadata.FoundSettings()
    assert b"c2pa" in data and b"pink background" not in data


def test_an_enhanced_prompt_is_told_and_written_down(home: Home) -> None:
    with FakeOpenAI(says("A flat fox on ", "a pink background.")) as server:
        home.environment |= {"FLUX2_OPENROUTER_URL": server.url, "FLUX2_UPSAMPLE": "openrouter"}
        out = home.folder / "fox.png"
        _, told = home.generate("--prompt", "fox", "--upsample-model", "some/model", "--out", out)
        assert "Enhanced by some/model: A flat fox on a pink background." in told
        assert (record_in(out).original_prompt, record_in(out).upsampled_by) == ("fox", "some/model")
        home.generate("--prompt", "make it blue", "--image", out, "--out", home.folder / "blue.png")
        assert len(server.asked) == 1, "edits are not enhanced unless that is asked for"


def test_models_loras(home: Home) -> None:
    done = home.run("models", "loras")
    folder = home.folder / "home" / "loras"
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"flux2-studio: no LoRAs yet; put their .safetensors files into {folder}\n"
    write_lora(folder / "styles" / "ink.safetensors", 4096)
    write_lora(folder / "grain.safetensors", 320)
    (folder / "torn.safetensors").write_bytes(b"torn")
    done = home.run("models", "loras")
    assert done.stdout == (
        "grain\tLoRA of rank 4 for a transformer of width 320\nstyles/ink\tLoRA of rank 4 for klein 9B\n"
    )
    assert done.stderr.startswith("note: torn.safetensors is not a whole") and done.stderr.count("\n") == 1


def test_same_seed_same_picture(home: Home, fox: Path) -> None:
    home.generate(*FOX, "--out", home.folder / "again.png")
    home.generate(*FOX[:-1], "2", "--out", home.folder / "other.png")
    assert pixels(home.folder / "again.png") == pixels(fox)
    assert pixels(home.folder / "other.png") != pixels(fox)


def test_several_are_numbered_and_are_the_pictures_of_their_seeds(home: Home, fox: Path) -> None:
    printed, told = home.generate(*FOX, "--count", "3", "--out", home.folder / "fox.png")
    files = [home.folder / f"fox-{i}.png" for i in (1, 2, 3)]
    assert printed.split() == [str(file) for file in files]
    assert "seeds 1 to 3" in told
    assert not (home.folder / "fox.png").exists()
    assert len(home.outputs) == 3
    assert len({pixels(file) for file in files}) == 3
    difference = [abs(a - b) for a, b in zip(pixels(files[0]), pixels(fox), strict=True)]
    assert max(difference) <= 1


def test_edit(home: Home, fox: Path) -> None:
    out = home.folder / "blue.png"
    home.generate("--prompt", "make the background blue", "--image", fox, "--seed", "1", "--out", out)
    with Image.open(out) as image:
        colours = image.resize((3, 3), Image.Resampling.BOX).load()
        assert colours is not None
        red, _, blue = colours[0, 0]
        assert blue > red + 60, "the background should be blue"


def test_two_references_and_a_rounded_size(home: Home, fox: Path) -> None:
    out = home.folder / "both.png"
    prompt = "the object of image 1 on the background of image 2"
    _, told = home.generate(
        "--prompt", prompt, "--image", fox, "--image", fox, "--width", "120", "--height", "128", "--out", out
    )  # fmt: skip
    assert "note: The width was rounded from 120 to 128" in told
    with Image.open(out) as image:
        assert image.size == (128, 128)


def test_bfloat16_is_taken_and_close(home: Home, fox: Path) -> None:
    home.generate(*FOX, "--dtype", "bfloat16", "--device", "cpu", "--out", home.folder / "half.png")
    exact, half = pixels(fox), pixels(home.folder / "half.png")
    mean = sum(abs(a - b) for a, b in zip(exact, half, strict=True)) / len(exact)
    assert 0 < mean < 8


def test_a_name_that_cannot_be_printed(home: Home) -> None:
    out = os.fsdecode(b"f\xc3\xbcchs-\xff.png")
    home.environment["PYTHONIOENCODING"] = "ascii:strict"
    done = home.run("generate", *FOX, "--out", home.folder / out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{home.folder}/f\\xfcchs-\\udcff.png\n"
    assert (home.folder / out).is_file()


# --- models ----------------------------------------------------------------------------------------------------------

KLEIN = "black-forest-labs/FLUX.2-klein-4B"
AUTOENCODER = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    """A hub with klein 4B's autoencoder, as large as a toy's, and the previews' decoder."""
    with serve() as server:
        server.repos = {KLEIN: {AUTOENCODER: TOY}, "madebyollin/taef2": {"taef2.safetensors": b"tiny"}}
        yield server


@pytest.fixture
def online(home: Home, fake: FakeHub) -> Home:
    """A machine with that hub, and with the larger parts of klein 4B as the user's own files."""
    own = home.folder / "own"
    own.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "klein.safetensors"):
        (own / name).touch()
    home.environment |= {
        "HF_ENDPOINT": fake.url,
        "HF_TOKEN": TOKEN,
        "KLEIN_4B_MODEL_PATH": str(own / "klein.safetensors"),
        "QWEN3_4B_MODEL_PATH": str(own),
    }
    del home.environment["HF_HUB_OFFLINE"]
    return home


def test_models_list(home: Home) -> None:
    done = home.run("models", "list")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    names = [line.partition(":")[0] for line in lines if not line.startswith(" ")]
    assert names == [checkpoint.name for checkpoint in CHECKPOINTS]
    at = lines.index("klein-4b: FLUX.2 klein 4B")
    assert lines[at + 1 : at + 3] == ["  not on disk, 16.1 GB to download", "  Apache 2.0, not gated"]
    assert lines[at + 3].startswith("  shares the text encoder with klein-base-4b; the autoencoder with klein-9b, ")
    assert "  FLUX non-commercial licence, gated: accept it at https://huggingface.co/" in done.stdout
    assert lines[lines.index("nano: Nano (a toy, on board)") + 1] == "  on board"
    assert not (home.folder / "hub").exists()


def test_models_download_path_list_remove(online: Home, fake: FakeHub) -> None:
    online.environment["HF_HUB_OFFLINE"] = "1"
    offline = online.run("models", "download", "klein-4b")
    assert offline.returncode == 2 and "HF_HUB_OFFLINE forbids downloading it" in offline.stderr.splitlines()[-1]
    del online.environment["HF_HUB_OFFLINE"]

    done = online.run("models", "download", "klein-4b")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "Downloading FLUX.2-klein-4B autoencoder"
    assert "Downloading FLUX.2-klein-4B autoencoder: 3.0 of 3.0 MB" in lines
    assert lines[-1] == "FLUX.2 klein 4B is on this machine"
    assert f"Bearer {TOKEN}" in fake.tokens and fake.cdn_tokens == {None} and TOKEN not in done.stderr
    fake.asked.clear()

    path = online.run("models", "path", "klein-4b")
    places = dict(line.split("\t") for line in path.stdout.splitlines())
    assert list(places) == ["text encoder", "tokenizer", "transformer", "autoencoder"]
    assert Path(places["autoencoder"]).read_bytes() == TOY
    assert places["transformer"] == online.environment["KLEIN_4B_MODEL_PATH"]

    listed = online.run("models", "list").stdout.splitlines()
    assert listed[listed.index("klein-4b: FLUX.2 klein 4B") + 1] == "  on disk, 3.0 MB downloaded"
    assert listed[listed.index("klein-9b: FLUX.2 klein 9B") + 1].startswith("  partly on disk (3.0 MB), 34.")

    removed = online.run("models", "remove", "klein-4b")
    assert (removed.returncode, removed.stdout, removed.stderr) == (0, "", "3.0 MB freed\n")
    gone = online.run("models", "path", "klein-4b")
    assert gone.returncode == 2 and gone.stderr == (
        "flux2-studio: Of FLUX.2 klein 4B, the autoencoder must be downloaded first: "
        "`flux2-studio models download klein-4b`.\n"
    )
    assert len(gone.stdout.splitlines()) == 3  # what is there is told all the same
    assert "nothing to remove of klein-4b" in online.run("models", "remove", "klein-4b").stderr
    assert fake.asked == []
    assert sorted(path.name for path in (online.folder / "own").iterdir()) == [
        "config.json", "klein.safetensors", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip


# --- the parts -------------------------------------------------------------------------------------------------------


def test_output_files(tmp_path: Path) -> None:
    assert cli.output_files(tmp_path / "a.png", 1) == (tmp_path / "a.png",)
    assert cli.output_files(tmp_path / "a.PNG", 2) == (tmp_path / "a-1.PNG", tmp_path / "a-2.PNG")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(RequestError, match="is a folder"):
        cli.output_files(tmp_path / "b.png", 1)


def test_copying_replaces_or_leaves_everything_as_it_was(tmp_path: Path) -> None:
    source, target = tmp_path / "source.png", tmp_path / "target.png"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    cli.copy_file(source, target)
    assert target.read_bytes() == b"new"
    with pytest.raises(SaveError, match=r"missing\.png"):
        cli.copy_file(tmp_path / "missing.png", target)
    assert target.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.png", "target.png"]


def test_off_a_terminal_a_download_is_told_in_large_steps() -> None:
    stream = io.StringIO()
    with cli.ProgressLine(stream, min_fraction_step=0.05) as progress:
        progress.show("Downloading a")
        for percent in range(101):
            progress.show(f"Downloading a: {percent} of 100 MB, 1.0 MB/s", percent / 100)
        progress.show("Downloading b: 100 of 100 MB", 1.0)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Downloading a" and lines[-1] == "Downloading b: 100 of 100 MB"
    assert 20 <= len(lines) <= 24 and "Downloading a: 100 of 100 MB, 1.0 MB/s" in lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_redraws_itself() -> None:
    terminal = Terminal()
    with cli.ProgressLine(terminal) as progress:
        progress.show("Loading")
        progress.show("step 2 of 4", 0.5)
        progress.note("The width was rounded")
    shown = terminal.getvalue()
    assert shown.count("\n") == 1 and "note: The width was rounded\n" in shown
    assert f"[{'#' * 12}{'.' * 12}] step 2 of 4" in shown
    assert shown.endswith("\r\033[K")  # nothing is left behind


def test_how_a_run_ends() -> None:
    request = Request(prompt="a fox", seed=1).resolve(CHECKPOINTS[0])
    preview = Preview(step=1, steps=4, images=(), first_index=1, count=2, seconds_left=2.4)
    result = Result(request=request, images=(Path("a.png"),), seeds=(1,), seconds=1.0)
    stream = io.StringIO()
    events = [Status(text="Loading"), Status(text="Loading"), Notice(text="cut"), preview, result]
    assert cli.show_events(iter(events), cli.ProgressLine(stream)) == result
    assert stream.getvalue().splitlines() == ["Loading", "note: cut", "picture 2 of 2, step 1 of 4, 2 s left"]
    assert cli.show_events(iter([Stopped()]), cli.ProgressLine(stream)) == Stopped()
