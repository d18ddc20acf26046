"""Finding parts, what the hub refuses, and removing parts, against a small hub of our own on 127.0.0.1."""

from __future__ import annotations

import logging
import shutil
import socket
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download

from flux2_studio.checkpoints import NANO, Checkpoint, Part
from flux2_studio.errors import DownloadError, WeightsError
from flux2_studio.models.hub.repositories import Hub, PartFiles
from tests.models.fake_hub import (
    CHECKPOINT,
    COMMIT,
    FLOW,
    GATED,
    MB,
    NEWER,
    OTHER,
    ROOT_TEXT,
    SHARDED,
    TEXT,
    TINY,
    TOKEN,
    TOKENIZER,
    TOY,
    VAE,
    FakeHub,
    etag,
    git_id,
    hub,
    settings,
    silent,
)


def refused(hub: Hub, part: Part) -> str:
    with pytest.raises(DownloadError) as error:
        hub.find_or_download(part, silent)
    message = str(error.value)
    assert TOKEN not in message and "Error" not in message and "Traceback" not in message
    return message


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- downloading --------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once_and_then_used_without_the_network(fake: FakeHub, tmp_path: Path) -> None:
    ours = hub(fake, tmp_path)
    assert not ours.is_on_disk(VAE) and fake.asked == []
    files = ours.find_or_download(VAE, silent)
    assert files.tokenizer is None and files.weights.read_bytes() == b"vae"
    assert files.weights.name == "model.safetensors"
    fake.asked.clear()
    assert ours.is_on_disk(VAE) and ours.find_or_download(VAE, silent) == files
    assert hub(fake, tmp_path).find_or_download(VAE, silent) == files
    assert fake.asked == []


def test_a_text_encoder_comes_with_its_tokenizer_and_without_pickles(fake: FakeHub, tmp_path: Path) -> None:
    files = hub(fake, tmp_path).find_or_download(TEXT, silent)
    assert names(files.weights) == set(SHARDED)
    assert files.tokenizer is not None and names(files.tokenizer) == set(TOKENIZER)
    assert not any("toy.safetensors" in asked or ".bin" in asked or "README" in asked for asked in fake.asked)


def test_a_root_repository_is_not_downloaded_twice_over(fake: FakeHub, tmp_path: Path) -> None:
    files = hub(fake, tmp_path).find_or_download(ROOT_TEXT, silent)
    assert names(files.weights) == set(SHARDED)
    assert files.tokenizer is not None and names(files.tokenizer) == {*TOKENIZER, "config.json"}
    assert not any("consolidated" in asked for asked in fake.asked)


def test_a_broken_off_folder_is_not_on_disk_and_is_completed(fake: FakeHub, tmp_path: Path) -> None:
    ours = hub(fake, tmp_path)
    files = ours.find_or_download(TEXT, silent)
    assert files.tokenizer is not None
    for missing in (
        files.weights / "model-00002-of-00002.safetensors",
        files.weights / "model.safetensors.index.json",
        files.weights / "config.json",
        files.tokenizer / "tokenizer.json",
        files.tokenizer / "tokenizer_config.json",
        files.tokenizer / "chat_template.jinja",
    ):
        missing.unlink()
        assert not ours.is_on_disk(TEXT), missing.name
        assert ours.find_or_download(TEXT, silent) == files
        assert missing.is_file() and ours.is_on_disk(TEXT)


def test_what_another_tool_left_in_the_cache_is_judged_by_the_index(fake: FakeHub, tmp_path: Path) -> None:
    """Without the listing that newer versions of huggingface_hub keep."""
    hub(fake, tmp_path).find_or_download(TEXT, silent)
    shutil.copytree(tmp_path / "cache", tmp_path / "others", symlinks=True, ignore=shutil.ignore_patterns("trees"))
    ours = Hub(settings(tmp_path), endpoint=fake.url, cache=tmp_path / "others")
    fake.asked.clear()
    assert ours.is_on_disk(TEXT)
    snapshot = tmp_path / "others" / "models--maker--Toy-4B" / "snapshots" / COMMIT
    words = snapshot / "tokenizer"
    for missing in (snapshot / "text_encoder" / "model-00001-of-00002.safetensors", words / "tokenizer_config.json"):
        content = missing.read_bytes()
        missing.unlink()
        assert not ours.is_on_disk(TEXT), missing.name
        missing.write_bytes(content)
    (words / "tokenizer.json").rename(words / "vocab.json")
    assert not ours.is_on_disk(TEXT)  # a vocabulary in two files, of which one is missing
    fill(words, "merges.txt")
    assert ours.is_on_disk(TEXT)
    assert ours.size_on_disk(TEXT) > 0 and fake.asked == []


def test_other_tools_find_what_we_downloaded(fake: FakeHub, tmp_path: Path) -> None:
    hub(fake, tmp_path).find_or_download(TEXT, silent)
    hub(fake, tmp_path).find_or_download(VAE, silent)
    cache = tmp_path / "cache"
    file = hf_hub_download(VAE.repo, VAE.path, cache_dir=cache, local_files_only=True)
    assert Path(file).read_bytes() == b"vae"
    folder = snapshot_download(TEXT.repo, allow_patterns="tokenizer/*", cache_dir=cache, local_files_only=True)
    assert names(Path(folder) / "tokenizer") == set(TOKENIZER)
    (repo,) = scan_cache_dir(cache).repos
    assert repo.repo_id == "maker/Toy-4B" and list(repo.refs) == ["main"]
    assert {path.name for path in (cache / "models--maker--Toy-4B" / "blobs").iterdir()} >= {git_id(b"x")}


def test_a_new_commit_leaves_what_it_did_not_change(fake: FakeHub, tmp_path: Path) -> None:
    ours = hub(fake, tmp_path)
    ours.find_or_download(VAE, silent)
    fake.commits["maker/Toy-4B"] = NEWER
    fake.repos["maker/Toy-4B"]["README.md"] = b"new"
    assert NEWER in str(ours.find_or_download(FLOW, silent).weights)
    assert ours.is_on_disk(VAE) and [name for name, _ in fake.sent] == ["vae/model.safetensors", "toy.safetensors"]


def test_a_mirror_that_lists_only_names(fake: FakeHub, tmp_path: Path) -> None:
    fake.bare = True
    ours = hub(fake, tmp_path)
    assert ours.find_or_download(FLOW, silent).weights.read_bytes() == TOY
    files = ours.find_or_download(TEXT, silent)
    assert names(files.weights) == set(SHARDED) and ours.is_on_disk(TEXT)


# --- what can go wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", [GATED, Part(**(vars(TEXT) | {"repo": "maker/Gated", "path_variable": "GATED_MODEL_PATH"}))]
)
@pytest.mark.parametrize("listed", [True, False])
def test_a_gate(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Part, listed: bool) -> None:
    fake.listed = listed
    fake.repos["maker/Gated"] |= {f"text_encoder/{name}": content for name, content in SHARDED.items()}
    ours = hub(fake, tmp_path)
    fake.refusals["maker/Gated"] = (401, "GatedRepo", "Access to model is restricted. Please log in.")
    assert refused(ours, part) == (
        f"maker/Gated is only for those who have accepted its licence: sign in at {fake.url}/maker/Gated and accept "
        f"it, then make a token at {fake.url}/settings/tokens and set HF_TOKEN to it, or set GATED_MODEL_PATH to a "
        f"local copy."
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fake.refusals["maker/Gated"] = (403, "GatedRepo", f"You sent {TOKEN} and are not in the authorized list.")
    message = refused(ours, part)
    assert f"has no access to maker/Gated yet: accept its licence at {fake.url}/maker/Gated" in message
    fake.refusals["maker/Gated"] = (403, "", "Please enable access to public gated repositories")
    assert "fine-grained token" in refused(ours, part)
    assert f"Bearer {TOKEN}" in fake.tokens  # it was really sent, so it could have leaked


@pytest.mark.parametrize("part", [VAE, TEXT])
def test_a_bad_token(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Part) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fake.refusals["maker/Toy-4B"] = (401, "", "Invalid credentials in Authorization header")
    message = refused(hub(fake, tmp_path), part)
    assert message.startswith("The hub does not accept this machine's token: make a new one at ")
    assert "HF_TOKEN" in message


def test_no_part_of_a_token_is_in_the_chain_of_errors(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fake.refusals["maker/Gated"] = (403, "GatedRepo", "not in the authorized list")
    with pytest.raises(DownloadError) as error:
        hub(fake, tmp_path).find_or_download(GATED, silent)
    assert TOKEN not in "".join(traceback.format_exception(error.value))


def test_a_token_is_sent_to_the_hub_only_and_never_logged(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    told: list[str] = []
    hub(fake, tmp_path).find_or_download(GATED, lambda text, fraction: told.append(text))
    assert fake.tokens == {f"Bearer {TOKEN}"} and fake.cdn_tokens == {None}
    assert caplog.text and TOKEN not in caplog.text and TOKEN not in "".join(told)


def test_what_is_open_needs_no_token(fake: FakeHub, tmp_path: Path) -> None:
    assert hub(fake, tmp_path).find_or_download(VAE, silent)
    assert fake.tokens == {None}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_no_such_repository(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    part = Part(**(vars(FLOW if kind == "file" else TEXT) | {"repo": "maker/Gone"}))
    for token in ("", TOKEN):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        message = refused(hub(fake, tmp_path), part)
        assert message == (
            f"The hub has no repository maker/Gone, or hides it: look at {fake.url}/maker/Gone, or set "
            f"{part.path_variable} to a local copy."
        )


def test_no_such_file(fake: FakeHub, tmp_path: Path) -> None:
    part = Part(**(vars(FLOW) | {"path": "renamed.safetensors"}))
    assert refused(hub(fake, tmp_path), part) == (
        f"maker/Toy-4B does not hold renamed.safetensors (any more): look at {fake.url}/maker/Toy-4B, or set "
        f"TOY_MODEL_PATH to a local copy."
    )


def test_a_file_that_is_listed_but_gone(fake: FakeHub, tmp_path: Path) -> None:
    fake.vanished.add("toy.safetensors")
    assert "The hub does not hold maker/Toy-4B/toy.safetensors (any more)" in refused(hub(fake, tmp_path), FLOW)


def test_a_repository_without_the_files_that_are_needed(fake: FakeHub, tmp_path: Path) -> None:
    del fake.repos["maker/Toy-4B"]["text_encoder/model-00002-of-00002.safetensors"]
    assert "maker/Toy-4B does not hold text_encoder (any more)" in refused(hub(fake, tmp_path), TEXT)


def test_room_is_looked_for_before_the_first_byte(fake: FakeHub, tmp_path: Path) -> None:
    asked: list[Path] = []

    def free_space(folder: Path) -> int:
        asked.append(folder)
        return 502 * MB

    ours = Hub(settings(tmp_path), endpoint=fake.url, cache=tmp_path / "a" / "cache", free_space=free_space)
    assert refused(ours, FLOW) == (
        f"There is no room for maker/Toy-4B/toy.safetensors in {tmp_path}/a/cache: 3.0 MB are still to come and 500.0 "
        f"MB should stay free, but only 502.0 MB are free. Free some space, or set HF_HOME to a folder on a larger "
        f"drive, or set TOY_MODEL_PATH to a local copy."
    )
    assert fake.sent == [] and asked == [tmp_path / "a" / "cache"]
    with pytest.raises(DownloadError, match=r"no room for FLUX\.2 klein 4B in .*: 3\.0 MB are still to come"):
        ours.download(CHECKPOINT, CHECKPOINT.parts, silent)
    assert ours.find_or_download(VAE, silent)  # which fits


def test_a_cache_that_cannot_be_written(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()  # a file where the folder should be
    for part in (VAE, TEXT):
        assert f"cannot be stored in {tmp_path}/cache: allow writing there, or set HF_HOME" in refused(
            hub(fake, tmp_path), part
        )


def test_no_connection(tmp_path: Path) -> None:
    ours = Hub(settings(tmp_path), endpoint="http://127.0.0.1:9", cache=tmp_path / "cache")
    for part in (FLOW, TEXT):
        message = refused(ours, part)
        assert "http://127.0.0.1:9 cannot be reached" in message
        assert message.endswith(f"or set {part.path_variable} to a local copy.")


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a hub that takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_never_answers(mute: str, tmp_path: Path) -> None:
    ours = Hub(settings(tmp_path), endpoint=mute, cache=tmp_path / "cache", timeout=0.5)
    for part in (FLOW, TEXT):
        assert f"{mute} cannot be reached" in refused(ours, part)


def test_waiting_for_the_hub_can_be_stopped(mute: str, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    told: list[tuple[str, float | None]] = []

    def give_up(text: str, fraction: float | None) -> None:
        told.append((text, fraction))
        if len(told) > 1:
            raise Enough

    with pytest.raises(Enough):
        Hub(settings(tmp_path), endpoint=mute, cache=tmp_path / "cache", timeout=30).find_or_download(FLOW, give_up)
    assert told == [("Downloading Toy-4B", None)] * 2


def test_a_hub_in_trouble(fake: FakeHub, tmp_path: Path) -> None:
    fake.refusals["maker/Toy-4B"] = (503, "", "over capacity")
    for part in (FLOW, TEXT):
        assert "trouble at the moment (HTTP 503): try again later, or set" in refused(hub(fake, tmp_path), part)


# --- local copies and what ships with the studio ------------------------------------------------------------------


def test_a_local_file_or_folder_comes_before_the_hub(fake: FakeHub, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(b"mine")
    for path in (own, tmp_path):
        ours = hub(fake, tmp_path, TOY_MODEL_PATH=path)
        assert ours.is_on_disk(FLOW)
        assert ours.find_or_download(FLOW, silent) == PartFiles(weights=path, tokenizer=None)
    assert fake.asked == []


def test_a_local_copy_that_is_not_there(fake: FakeHub, tmp_path: Path) -> None:
    ours = hub(fake, tmp_path, TOY_MODEL_PATH=tmp_path / "gone.safetensors", TEXT_MODEL_PATH=tmp_path / "gone")
    assert not ours.is_on_disk(FLOW) and not ours.is_on_disk(TEXT)
    with pytest.raises(WeightsError) as error:
        ours.find_or_download(FLOW, silent)
    assert str(error.value) == (
        f"TOY_MODEL_PATH points to {tmp_path}/gone.safetensors, where there is nothing: set it to a .safetensors file "
        f"or to the folder that holds it, or unset it."
    )
    with pytest.raises(WeightsError, match=r"TEXT_MODEL_PATH points to .*/gone, where there is no folder"):
        ours.find_or_download(TEXT, silent)
    assert fake.asked == []  # and it is not fetched from the hub behind the user's back


def fill(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).touch()
    return folder


WEIGHTS, WORDS = ("config.json", "model.safetensors"), ("tokenizer.json", "tokenizer_config.json")


def test_the_places_of_a_local_text_encoder_and_its_tokenizer(fake: FakeHub, tmp_path: Path) -> None:
    together = fill(tmp_path / "a", *WEIGHTS, *WORDS)
    beside, beside_words = fill(tmp_path / "b" / "text_encoder", *WEIGHTS), fill(tmp_path / "b" / "tokenizer", *WORDS)
    fill(tmp_path / "b", "model_index.json", "toy-transformer.safetensors")  # a whole repository
    inside, inside_words = fill(tmp_path / "c", *WEIGHTS), fill(tmp_path / "c" / "tokenizer", *WORDS)
    for given, weights, tokenizer in (
        (together, together, together),
        (beside, beside, beside_words),
        (tmp_path / "b", beside, beside_words),
        (inside, inside, inside_words),
    ):
        ours = hub(fake, tmp_path, TEXT_MODEL_PATH=given)
        assert ours.is_on_disk(TEXT)
        assert ours.find_or_download(TEXT, silent) == PartFiles(weights=weights, tokenizer=tokenizer)
    assert fake.asked == []


def test_a_local_text_encoder_that_lacks_something(fake: FakeHub, tmp_path: Path) -> None:
    for folder, said in (
        (fill(tmp_path / "a", *WORDS), "no config.json with .safetensors files beside it, nor in text_encoder/"),
        (fill(tmp_path / "c", "toy-transformer.safetensors", *WORDS), "no config.json with .safetensors files"),
        (fill(tmp_path / "b", *WEIGHTS), "which has no tokenizer: put its tokenizer.json"),
    ):
        ours = hub(fake, tmp_path, TEXT_MODEL_PATH=folder)
        assert not ours.is_on_disk(TEXT)
        with pytest.raises(WeightsError) as error:
            ours.find_or_download(TEXT, silent)
        assert said in str(error.value) and f"TEXT_MODEL_PATH points to {folder}" in str(error.value)


def test_what_ships_with_the_studio(fake: FakeHub, tmp_path: Path) -> None:
    part = Part(kind="text", repo=None, path="toy/text", tokenizer=(None, "toy/words"), size=1)
    ours = hub(fake, tmp_path)
    assert not ours.is_on_disk(part)
    with pytest.raises(WeightsError, match="ships with the studio: install the studio again"):
        ours.find_or_download(part, silent)
    weights, words = fill(tmp_path / "assets" / "toy" / "text"), fill(tmp_path / "assets" / "toy" / "words")
    assert ours.is_on_disk(part)
    assert ours.find_or_download(part, silent) == PartFiles(weights=weights, tokenizer=words)


def test_a_file_of_the_users_folder_that_is_gone(fake: FakeHub, tmp_path: Path) -> None:
    part = Part(kind="flow", repo=None, path=str(tmp_path / "mine.safetensors"), size=1)
    with pytest.raises(WeightsError, match=r"mine\.safetensors is not there any more: put it back"):
        hub(fake, tmp_path).find_or_download(part, silent)


# --- several parts, and removing them -----------------------------------------------------------------------------

ALL_OF_IT = (*CHECKPOINT.parts, TINY)
TOY_ETAG = etag("toy.safetensors", TOY)


def with_checkpoints(fake: FakeHub, tmp_path: Path, *checkpoints: Checkpoint, **overrides: Path) -> Hub:
    known = replace(settings(tmp_path, **overrides), checkpoints=(NANO, *checkpoints))
    return Hub(known, endpoint=fake.url, cache=tmp_path / "cache", timeout=60)


def blobs(tmp_path: Path) -> int:
    """Bytes of contents in the cache."""
    return sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/blobs/*"))


def test_a_whole_checkpoint_comes_and_goes(fake: FakeHub, tmp_path: Path) -> None:
    ours = with_checkpoints(fake, tmp_path, CHECKPOINT, OTHER)
    ours.download(CHECKPOINT, ALL_OF_IT, silent)
    assert all(ours.is_on_disk(part) for part in ALL_OF_IT)
    fake.asked.clear()
    ours.download(CHECKPOINT, ALL_OF_IT, silent)
    assert fake.asked == []
    assert ours.size_on_disk(FLOW) == 3 * MB and ours.size_on_disk(VAE) == 3
    before = blobs(tmp_path)
    removed = ours.remove(CHECKPOINT)
    assert removed.kept_parts == () and removed.freed_bytes == before
    assert blobs(tmp_path) == 0 and not any(ours.is_on_disk(part) or ours.size_on_disk(part) for part in ALL_OF_IT)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".locks"]  # no empty folders
    assert ours.remove(CHECKPOINT).freed_bytes == 0


def test_what_another_checkpoint_needs_is_kept_and_named(fake: FakeHub, tmp_path: Path) -> None:
    ours = with_checkpoints(fake, tmp_path, CHECKPOINT, OTHER)
    for checkpoint in (CHECKPOINT, OTHER):
        ours.download(checkpoint, (*checkpoint.parts, TINY), silent)
    removed = ours.remove(CHECKPOINT)
    assert removed.freed_bytes == 3 * MB
    assert removed.kept_parts == ((TEXT, (OTHER,)), (VAE, (OTHER,)), (TINY, (OTHER,)))
    assert not ours.is_on_disk(FLOW) and all(ours.is_on_disk(part) for part in (*OTHER.parts, TINY))
    fake.asked.clear()
    assert ours.remove(OTHER).kept_parts == () and blobs(tmp_path) == 0
    assert fake.asked == []  # never by asking the hub


def test_the_rest_of_a_broken_off_download_is_removed_too(fake: FakeHub, tmp_path: Path) -> None:
    ours = with_checkpoints(fake, tmp_path, CHECKPOINT)
    ours.find_or_download(VAE, silent)
    partial = tmp_path / "cache" / "models--maker--Toy-4B" / "blobs" / f"{TOY_ETAG}.incomplete"
    partial.write_bytes(TOY[:1000])
    assert ours.size_on_disk(FLOW) == 1000 and not ours.is_on_disk(FLOW)
    assert ours.remove(CHECKPOINT).freed_bytes == 1003
    assert not partial.exists()


def test_files_of_others_and_own_copies_are_not_removed(fake: FakeHub, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(b"mine")
    ours = with_checkpoints(fake, tmp_path, CHECKPOINT, TOY_MODEL_PATH=own)
    ours.find_or_download(VAE, silent)
    stranger = tmp_path / "cache" / "models--maker--Toy-4B" / "snapshots" / COMMIT / "other.bin"
    stranger.write_bytes(b"of another tool")
    (tmp_path / "cache" / "models--maker--Toy-4B" / "snapshots" / COMMIT / "gone").symlink_to("../../blobs/gone")
    assert ours.is_on_disk(FLOW) and ours.size_on_disk(FLOW) == 0
    assert ours.remove(CHECKPOINT).freed_bytes == 3
    assert own.read_bytes() == b"mine" and stranger.read_bytes() == b"of another tool"


def test_a_cache_that_cannot_be_sorted_out(fake: FakeHub, tmp_path: Path) -> None:
    ours = with_checkpoints(fake, tmp_path, CHECKPOINT)
    ours.find_or_download(VAE, silent)
    repo = tmp_path / "cache" / "models--maker--Toy-4B"
    (repo / "refs" / "v1").write_text("a commit that nobody has")
    with pytest.raises(WeightsError, match=r"models--maker--Toy-4B is damaged .*: delete this folder yourself"):
        ours.remove(CHECKPOINT)
    assert ours.is_on_disk(VAE)
