"""Hashes of weights: told by the hub's cache, read once, remembered, and never taken for another file's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flux2_studio.checkpoints import KLEIN_4B, NANO
from flux2_studio.errors import WeightsError
from flux2_studio.models.hub import fingerprint
from flux2_studio.models.hub.fingerprint import WeightHashes
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.manager import ModelManager
from flux2_studio.settings import ASSETS, Settings
from tests.tiny import Toys

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Told:
    def __init__(self) -> None:
        self.fractions: list[float] = []

    def __call__(self, text: str, fraction: float | None) -> None:
        assert text == "Reading the checkpoint's fingerprint (once)" and fraction is not None
        self.fractions.append(fraction)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(CONTENT)
    return file


@pytest.fixture
def remembered(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hashes.json"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how much is read without asking."""

    def chosen(size: int) -> None:
        monkeypatch.setattr(fingerprint, "MAX_QUICK_HASH_BYTES", size)

    return chosen


def test_a_file_is_read_once(weights: Path, remembered: Path, at_once: Callable[[int], None]) -> None:
    told = Told()
    prints = WeightHashes(remembered)
    at_once(100)
    assert prints.get_quick(weights) is None and not remembered.exists(), "it is too large to be read in passing"
    assert prints.compute(weights, told) == SHA256
    assert told.fractions == [0.0]
    for it in (prints, WeightHashes(remembered)):  # and after the next start
        assert it.get_quick(weights) == it.compute(weights, told) == SHA256
    assert len(told.fractions) == 1
    (entry,) = json.loads(remembered.read_text("utf-8")).values()
    found = weights.stat()
    assert entry == {
        "inode": found.st_ino,
        "size": len(CONTENT),
        "mtime_ns": found.st_mtime_ns,
        "sha256": SHA256,
    }
    assert [it.name for it in remembered.parent.iterdir()] == ["hashes.json"], "nothing half-written is left"


def test_a_small_file_is_read_in_passing(weights: Path, remembered: Path) -> None:
    assert WeightHashes(remembered).get_quick(weights) == SHA256


@pytest.mark.parametrize("how", ["written", "touched", "replaced"])
def test_a_file_that_changed_is_read_again(weights: Path, remembered: Path, how: str) -> None:
    prints = WeightHashes(remembered)
    prints.get_quick(weights)
    before = weights.stat()
    content = CONTENT
    if how == "written":
        content = CONTENT + b"more"
        weights.write_bytes(content)
    elif how == "touched":
        content = CONTENT[::-1]
        weights.write_bytes(content)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    else:  # by one of the same size and time
        content = CONTENT[::-1]
        other = weights.with_name("other")
        other.write_bytes(content)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(weights)
    assert (
        prints.get_quick(weights) == WeightHashes(remembered).get_quick(weights) == hashlib.sha256(content).hexdigest()
    )


def test_a_file_that_is_gone_is_forgotten(weights: Path, remembered: Path, tmp_path: Path) -> None:
    prints = WeightHashes(remembered)
    prints.get_quick(weights)
    weights.unlink()
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other")
    prints.get_quick(other)
    assert list(json.loads(remembered.read_text("utf-8"))) == [str(other)]
    with pytest.raises(WeightsError, match=r"weights\.safetensors cannot be read.*download it again"):
        prints.get_quick(weights)


def test_giving_up(weights: Path, remembered: Path) -> None:
    def give_up(text: str, fraction: float | None) -> None:
        raise KeyboardInterrupt

    prints = WeightHashes(remembered)
    with pytest.raises(KeyboardInterrupt):
        prints.compute(weights, give_up)
    assert not remembered.exists()
    assert prints.compute(weights, Told()) == SHA256


def test_how_far_it_is(weights: Path, remembered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WEIGHT_HASH_CHUNK_BYTES", 700)
    monkeypatch.setattr(fingerprint, "HASH_PROGRESS_SECONDS", 0.0)
    told = Told()
    WeightHashes(remembered).compute(weights, told)
    assert told.fractions == [step / 10 for step in range(10)]


def test_a_file_that_is_written_to_while_it_is_read(weights: Path, remembered: Path) -> None:
    def write(text: str, fraction: float | None) -> None:
        weights.write_bytes(CONTENT + b"more")

    with pytest.raises(WeightsError, match="is being written to: try again"):
        WeightHashes(remembered).compute(weights, write)
    assert not remembered.exists()


# --- what is remembered may be damaged, or not be kept at all ---


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '"text"', "\x00\xff", "[" * 10_000, '{"%s": {"sha256": "%s"}}', '{"%s": 3}']
)
def test_a_damaged_memory_is_passed_over_and_written_anew(
    weights: Path, remembered: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    remembered.parent.mkdir()
    remembered.write_bytes(damage.replace("%s", str(weights), 1).replace("%s", "0" * 64).encode("latin-1"))
    assert WeightHashes(remembered).get_quick(weights) == SHA256
    assert "hashes.json" in caplog.text
    assert json.loads(remembered.read_text("utf-8"))[str(weights)]["sha256"] == SHA256


def test_what_is_whole_of_a_damaged_memory_is_kept(weights: Path, remembered: Path) -> None:
    prints = WeightHashes(remembered)
    prints.get_quick(weights)
    content = json.loads(remembered.read_text("utf-8"))
    content[str(weights)]["sha256"] = "a" * 64  # to see where it comes from
    remembered.write_text(json.dumps({**content, "/nowhere": {"inode": "1"}}), "utf-8")
    assert WeightHashes(remembered).get_quick(weights) == "a" * 64
    content[str(weights)]["sha256"] = "no hash"
    remembered.write_text(json.dumps(content), "utf-8")
    assert WeightHashes(remembered).get_quick(weights) == SHA256


def test_a_memory_that_cannot_be_written_lasts_as_long_as_the_studio(
    weights: Path, tmp_path: Path, at_once: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    prints = WeightHashes(tmp_path / "home" / "hashes.json")
    assert prints.compute(weights, Told()) == SHA256
    assert "cannot be written" in caplog.text
    at_once(0)
    assert prints.get_quick(weights) == SHA256
    assert WeightHashes(tmp_path / "home" / "hashes.json").get_quick(weights) is None


def test_two_studios_keep_each_others_hashes(weights: Path, remembered: Path, tmp_path: Path) -> None:
    one, two = WeightHashes(remembered), WeightHashes(remembered)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other")
    one.get_quick(weights)
    two.get_quick(other)
    one.get_quick(weights)
    assert list(json.loads(remembered.read_text("utf-8"))) == sorted([str(weights), str(other)])


# --- the hub's cache, folders, checkpoints ---


def cached(root: Path, name: str) -> Path:
    """A file in a snapshot of the hub's cache, a link to the blob called `name`."""
    repository = root / "models--black-forest-labs--FLUX.2-klein-4B"
    blob = repository / "blobs" / name
    blob.parent.mkdir(parents=True)
    blob.write_bytes(CONTENT)
    file = repository / "snapshots" / "abc" / "flux-2-klein-4b.safetensors"
    file.parent.mkdir(parents=True)
    file.symlink_to(Path("..") / ".." / "blobs" / name)
    return file


def test_the_hubs_cache_knows_it(tmp_path: Path, remembered: Path, at_once: Callable[[int], None]) -> None:
    at_once(0)
    file = cached(tmp_path, "f" * 64)
    told = Told()
    prints = WeightHashes(remembered)
    assert prints.get_quick(file) == prints.compute(file, told) == "f" * 64
    assert told.fractions == [] and not remembered.exists()


def test_a_blob_that_no_hash_names_is_read(tmp_path: Path, remembered: Path) -> None:
    assert WeightHashes(remembered).get_quick(cached(tmp_path, "f" * 40)) == SHA256, "the id of a small file, in git"
    link, target = tmp_path / "link", tmp_path / ("e" * 64)
    target.write_bytes(CONTENT)
    link.symlink_to(target)
    assert WeightHashes(remembered).get_quick(link) == SHA256, "any link may lead to a file of such a name"


def test_a_folder_of_several(toys: Toys, remembered: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(toys.klein.sharded, folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    lines = "".join(f"{shard.name} {hashlib.sha256(shard.read_bytes()).hexdigest()}\n" for shard in shards)
    expected = hashlib.sha256(lines.encode()).hexdigest()
    prints = WeightHashes(remembered)
    assert prints.get_quick(folder) == expected
    assert len(json.loads(remembered.read_text("utf-8"))) == len(shards)
    shutil.copytree(folder, tmp_path / "repository" / "transformer")
    assert prints.get_quick(tmp_path / "repository", "transformer") == expected
    (folder / "unrelated.safetensors").write_bytes(b"anything")
    assert prints.get_quick(folder) == expected, "only what the index names"
    shards[0].unlink()
    with pytest.raises(WeightsError, match="lacks"):
        prints.get_quick(folder)


def test_checkpoints(toys: Toys, tmp_path: Path, at_once: Callable[[int], None]) -> None:
    settings = toys.settings(tmp_path / "home", ["klein-4b"])
    models = ModelManager(settings, Hub(settings))
    nano = hashlib.sha256((ASSETS / NANO.flow.path).read_bytes()).hexdigest()
    assert models.quick_hash(NANO) == nano
    at_once(100)
    assert models.quick_hash(KLEIN_4B) is None
    expected = hashlib.sha256(toys.klein.file.read_bytes()).hexdigest()
    assert models.compute_hash(KLEIN_4B, Told()) == expected
    assert models.quick_hash(KLEIN_4B) == expected
    assert sorted(json.loads((settings.home / "hashes.json").read_text("utf-8"))) == sorted(
        [str(ASSETS / NANO.flow.path), str(toys.klein.file)]
    )
    missing = replace(settings, path_overrides={"KLEIN_4B_MODEL_PATH": tmp_path / "nowhere"})
    assert ModelManager(missing, Hub(missing)).quick_hash(KLEIN_4B) is None
    with pytest.raises(WeightsError, match="KLEIN_4B_MODEL_PATH"):
        ModelManager(missing, Hub(missing)).compute_hash(KLEIN_4B, Told())
    nowhere = Settings(home=tmp_path)
    assert ModelManager(nowhere, Hub(nowhere, cache=tmp_path / "empty")).quick_hash(KLEIN_4B) is None
