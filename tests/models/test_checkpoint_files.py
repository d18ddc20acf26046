"""Files that come, change and go between and during runs: what is opened anew, and what is read of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2_studio.checkpoints import KLEIN_4B, NANO
from flux2_studio.errors import WeightsError
from flux2_studio.models.checkpoint_files import CheckpointFiles, CheckpointOpener, is_safe_to_mmap, stamp_part
from flux2_studio.models.hub.repositories import Hub, PartFiles, ProgressCallback
from flux2_studio.settings import ASSETS, Settings
from tests.tiny import Toys

CPU = torch.device("cpu")


def silent(text: str, fraction: float | None) -> None:
    pass


def opener(settings: Settings) -> CheckpointOpener:
    return CheckpointOpener(settings, Hub(settings), CPU)


def told(opener: CheckpointOpener) -> list[str]:
    """What opening says: nothing where no header has to be read."""
    said: list[str] = []
    opener.open(KLEIN_4B, lambda text, fraction: said.append(text))
    return said


def weight(opened: CheckpointFiles) -> torch.Tensor:
    found: torch.Tensor = opened.load("flow", CPU).img_in.weight
    return found


def with_files(settings: Settings, **changed: Path) -> Settings:
    return replace(settings, path_overrides={**settings.path_overrides, **changed})


@pytest.fixture
def repository(toys: Toys, tmp_path: Path) -> Path:
    """Transformer and autoencoder as a repository in diffusers' layout has them."""
    shutil.copytree(toys.klein.sharded, tmp_path / "repository" / "transformer")
    shutil.copytree(toys.autoencoder.folder, tmp_path / "repository" / "vae")
    return tmp_path / "repository"


def of_repository(toys: Toys, tmp_path: Path, repository: Path) -> CheckpointOpener:
    settings = toys.settings(tmp_path, ["klein-4b"])
    return opener(with_files(settings, KLEIN_4B_MODEL_PATH=repository, AE_MODEL_PATH=repository))


def rewrite(repository: Path) -> torch.Tensor:
    """Write the shard with `x_embedder` anew, with other values; these."""
    for shard in (repository / "transformer").glob("*.safetensors"):
        state = load_file(shard)
        if "x_embedder.weight" in state:
            state = {key: tensor.clone() for key, tensor in state.items()}
            state["x_embedder.weight"] += 1
            save_file(state, shard)
            return state["x_embedder.weight"]
    raise AssertionError("no shard has it")


# --- what changes is opened anew ---


def test_a_shard_that_was_written_anew_is_noticed(toys: Toys, tmp_path: Path, repository: Path) -> None:
    models = of_repository(toys, tmp_path, repository)
    first = models.open(KLEIN_4B, silent)
    assert told(models) == []
    written = rewrite(repository)
    with pytest.raises(WeightsError, match="has changed since it was opened"):
        first.load("flow", CPU)
    second = models.open(KLEIN_4B, silent)
    assert weight(second).equal(written)
    assert second.keys["flow"] != first.keys["flow"] and second.keys["text"] == first.keys["text"]
    assert told(models) == []


def test_a_file_with_the_size_and_time_of_the_one_before_is_another(toys: Toys, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    shutil.copy2(toys.klein.file, own)
    models = opener(with_files(toys.settings(tmp_path, ["klein-4b"]), KLEIN_4B_MODEL_PATH=own))
    first = models.open(KLEIN_4B, silent)
    own.rename(tmp_path / "old.safetensors")
    shutil.copy2(toys.klein.file, own)
    assert weight(models.open(KLEIN_4B, silent)).equal(load_file(own)["img_in.weight"])
    assert models.open(KLEIN_4B, silent).keys["flow"] != first.keys["flow"]


def test_a_load_that_fails_has_the_file_opened_anew(toys: Toys, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    shutil.copy2(toys.klein.file, own)
    models = opener(with_files(toys.settings(tmp_path, ["klein-4b"]), KLEIN_4B_MODEL_PATH=own))
    opened = models.open(KLEIN_4B, silent)
    own.rename(tmp_path / "away")
    with pytest.raises(WeightsError, match="could not be read"):
        opened.load("flow", CPU)
    (tmp_path / "away").rename(own)
    assert [text.partition(" ")[0] for text in told(models)] == ["Checking"]
    assert told(models) == []


def test_giving_up_a_load_is_no_reason_to_open_anew(toys: Toys, tmp_path: Path) -> None:
    models = opener(toys.settings(tmp_path, ["klein-4b"]))
    opened = models.open(KLEIN_4B, silent)

    def give_up(share: float) -> None:
        raise InterruptedError

    for kind in opened.keys:
        with pytest.raises(InterruptedError):
            opened.load(kind, CPU, give_up)
        shares: list[float] = []
        opened.load(kind, CPU, shares.append)
        assert shares == sorted(set(shares)) and shares[-1] == 1.0
    assert told(models) == []


def test_nothing_is_kept_of_files_that_were_replaced(toys: Toys, tmp_path: Path, repository: Path) -> None:
    models = of_repository(toys, tmp_path, repository)
    models.open(KLEIN_4B, silent)
    kept = len(models._headers), len(models._footprints)
    for _ in range(3):
        rewrite(repository)
        models.open(KLEIN_4B, silent)
    assert (len(models._headers), len(models._footprints)) == kept


# --- what is looked at ---


def test_only_what_is_read_is_looked_at(toys: Toys, tmp_path: Path, repository: Path) -> None:
    """Someone may point at a folder with much else in it."""
    files = PartFiles(weights=repository, tokenizer=None)
    before = stamp_part("flow", files)
    assert {Path(file).parent for file, *_ in before} == {repository / "transformer"}
    for name in ("deep/er/model.safetensors", "picture.png", "vae/config.json", "transformer/other/a.safetensors"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_bytes(b"something else")
    (repository / "transformer" / "nowhere.json").symlink_to(tmp_path / "nothing")
    assert stamp_part("flow", files) == before
    (repository / "transformer" / "config.json").write_text("{}")
    assert stamp_part("flow", files) != before
    assert weight(of_repository(toys, tmp_path, repository).open(KLEIN_4B, silent)).shape[0] > 0


@pytest.mark.parametrize("kind", ["flow", "tiny autoencoder", "autoencoder"])
def test_a_file_that_goes_as_soon_as_it_was_found(toys: Toys, tmp_path: Path, kind: str) -> None:
    class Vanishing(Hub):
        def find_or_download(self, part: object, progress: ProgressCallback) -> PartFiles:
            found = super().find_or_download(part, progress)  # type: ignore[arg-type]
            if part.kind == kind:  # type: ignore[attr-defined]
                return replace(found, weights=tmp_path / "gone.safetensors")
            return found

    settings = toys.settings(tmp_path, ["klein-4b"])
    models = CheckpointOpener(settings, Vanishing(settings), CPU)
    if kind == "tiny autoencoder":  # which a picture can be drawn without
        assert "gone.safetensors cannot be read (No such file" in models.open(KLEIN_4B, silent).notes[0]
    else:
        with pytest.raises(WeightsError, match=r"gone\.safetensors cannot be read \(No such file.*put it back"):
            models.open(KLEIN_4B, silent)


def test_a_decoder_for_previews_that_comes_later_is_used(toys: Toys, tmp_path: Path) -> None:
    later = tmp_path / "later.safetensors"
    models = opener(with_files(toys.settings(tmp_path, ["klein-4b"]), TAEF2_MODEL_PATH=later))
    first = models.open(KLEIN_4B, silent)
    assert first.tiny is None and "later.safetensors" in first.notes[0]
    later.write_bytes(b"damaged")
    assert "not a whole safetensors file" in models.open(KLEIN_4B, silent).notes[0]
    shutil.copy(toys.taef2, later)
    second = models.open(KLEIN_4B, silent)
    assert second.tiny is not None and second.notes == ()


# --- mapped or copied ---


def test_only_what_nobody_writes_over_is_mapped(toys: Toys, tmp_path: Path) -> None:
    plain = Settings(home=tmp_path)
    assert all(is_safe_to_mmap(part, plain) for part in (*KLEIN_4B.parts, *NANO.parts))
    own = replace(NANO.flow, path=str(tmp_path / "own.safetensors"))
    assert not is_safe_to_mmap(own, plain)
    settings = toys.settings(tmp_path, ["klein-4b"])
    assert not any(is_safe_to_mmap(part, settings) for part in KLEIN_4B.parts)
    assert opener(settings).open(KLEIN_4B, silent).mapped == frozenset()
    assert opener(plain).open(NANO, silent).mapped == {"text", "flow", "autoencoder"}


def test_what_ships_with_the_studio_is_mapped(tmp_path: Path) -> None:
    """Seen by what nobody does: writing over it."""
    shutil.copytree(ASSETS / "nano", tmp_path / "assets" / "nano")
    settings = Settings(home=tmp_path, assets=tmp_path / "assets", dtype="bfloat16", device="cpu")
    opened = opener(settings).open(NANO, silent)
    text = opened.load("text", CPU)
    file = tmp_path / "assets" / "nano" / "text_encoder" / "model.safetensors"
    with file.open("r+b") as data:
        data.write(bytes(file.stat().st_size))
    assert not any(tensor.any() for tensor in text.text_decoder.parameters())
