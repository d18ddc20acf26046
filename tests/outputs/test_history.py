"""The history: what is remembered of each picture, found again, and neither lost nor told to anybody else."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from flux2_studio.checkpoints import CHECKPOINTS
from flux2_studio.errors import RequestError, SaveError
from flux2_studio.events import Saved
from flux2_studio.images.thumbnails import THUMBNAIL_PIXELS, ThumbnailCache, read_saved
from flux2_studio.provenance.metadata import encode_picture
from flux2_studio.record import Record
from flux2_studio.request import Request
from flux2_studio.storage.database import Database
from flux2_studio.storage.history import MAX_PICTURES_PER_CALL, TRASH_SECONDS, History, HistorySearch

ME, YOU = "browser:me", "user:you"


class Clock:
    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


class Studio:
    """A home with a history, and pictures made on demand."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.clock = Clock()
        self.forgotten: list[str] = []
        self.history = self.opened()

    def opened(self) -> History:
        return History(
            Database(self.home / "studio.sqlite3"),
            self.home / "outputs",
            self.home / "trash",
            on_delete=self.forgotten.append,
            now=self.clock,
        )

    def saved(self, prompt: str = "a fox", *, seed: int = 1, references: tuple[str, ...] = (), **more: object) -> Saved:
        name = more.pop("checkpoint", "nano")
        checkpoint = next(it for it in CHECKPOINTS if it.name == name)
        request = Request(prompt=prompt, width=64, height=64, seed=seed).resolve(checkpoint)
        record = replace(Record(request=request, label=checkpoint.label, references=references), **more)  # type: ignore[arg-type]
        path = self.home / "outputs" / "2026-01-02" / f"{len(list(self.home.rglob('*.png')))}-{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_picture(Image.new("RGB", (64, 64), (seed % 255, 0, 0)), "png", record).data)
        return Saved(index=0, image=path, seed=seed, record=record)

    def add(self, *arguments: object, owner: str = ME, **more: object) -> str:
        return self.history.add(owner, "job", self.saved(*arguments, **more))  # type: ignore[arg-type]

    def found(self, words: str = "", owner: str = ME, **more: object) -> list[str]:
        return [it.id for it in self.history.page(owner, HistorySearch(words=words, **more)).entries]  # type: ignore[arg-type]


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_all_of_a_record_comes_back_even_where_the_file_says_nothing(studio: Studio) -> None:
    saved = studio.saved("a <b>fox</b>", seed=7, original_prompt="fox", upsampled_by="Qwen", versions={"torch": "2"})
    record = replace(saved.record, request=replace(saved.record.request, metadata=False))
    id_ = studio.history.add(ME, "job", replace(saved, record=record))
    details = studio.opened().details(ME, id_)  # another process, as it were
    assert details is not None and details.record == record
    entry = details.entry
    assert (entry.prompt, entry.seed, entry.width, entry.checkpoint) == ("a <b>fox</b>", 7, 64, "nano")
    assert not entry.favourite and not entry.missing and entry.suffix == ".png"
    assert studio.history.find_file(ME, id_) == saved.image


def test_an_id_cannot_be_guessed_and_is_nobody_elses(studio: Studio) -> None:
    id_ = studio.add()
    assert len(id_) == 32 and studio.add() != id_
    history = studio.history
    for other in (YOU, "", "browser:m", f"{ME} "):
        assert studio.found(owner=other) == []
        assert history.details(other, id_) is None and history.find_file(other, id_) is None
        assert history.find(other, [id_]) == [] and history.find_with_file(other, id_) is None
        assert (history.overview(other).total, history.overview(other).checkpoints) == (0, ())
        assert history.set_favourite(other, [id_], True) == 0
        assert history.delete(other, [id_]) == [] and history.restore(other, [id_]) == []
        assert history.empty_trash(other) == 0
    for guess in (id_.upper(), f"{id_} ", id_[:-1], "%" * 32, "../../../etc/passwd", "' OR 1=1 --", "\0"):
        assert history.find_file(ME, guess) is None
    assert history.find_file(ME, id_) is not None and not history.find(ME, [id_])[0].favourite


@pytest.mark.parametrize(
    "prompt, found, not_found",
    [
        ("A red Fox at dawn", ["fox", "FOX red", "dawn a", "ed f", ""], ["fox cat", "foxes"]),
        ("STRASSE und Ärger", ["straße", "ärger", "ÄRGER Strasse"], ["arger"]),
        ("ΣΊΣΥΦΟΣ", ["σίσυφος", "Σίσυφοσ"], ["σισυφοι"]),
        ("一只狐狸在雪地里", ["狐狸", "雪地 狐狸"], ["猫"]),
        ("Лиса в снегу", ["лиса", "СНЕГУ"], ["волк"]),
        ("café", ["cafe\u0301", "CAFÉ"], ["tea"]),
        ("100% of a_b", ["100%", "a_b", "%"], ["1%0", "aXb", "a__b", "%%"]),
        ('it\'s "quoted" \\ back', ["it's", '"quoted"', "\\"], ["its"]),
    ],
)
def test_a_search_finds_all_words_anywhere(studio: Studio, prompt: str, found: list[str], not_found: list[str]) -> None:
    id_ = studio.add(prompt)
    assert [words for words in found if studio.found(words) != [id_]] == []
    assert [words for words in not_found if studio.found(words)] == []


def test_a_prompt_is_found_by_what_was_written_before_it_was_enhanced(studio: Studio) -> None:
    id_ = studio.add("A lavish portrait", original_prompt="meine Katze")
    assert studio.found("katze") == [id_] and studio.found("katze lavish") == [id_]


def test_filters_narrow_down_and_are_counted(studio: Studio) -> None:
    first = studio.add("a fox", seed=1)
    second = studio.add("a fox", seed=2, checkpoint="nano-base")
    third = studio.add("an owl", seed=3)
    history = studio.history
    history.set_favourite(ME, [first, third], True)
    assert studio.found() == [third, second, first]
    assert studio.found(checkpoint="nano-base") == [second]
    assert studio.found(favourites=True) == [third, first]
    assert studio.found("fox", favourites=True) == [first]
    created = history.find(ME, [second])[0].created
    assert studio.found(since=created) == [third, second] and studio.found(until=created) == [first]
    opening = history.overview(ME, HistorySearch(words="owl"), limit=1)
    assert (opening.found, opening.total, opening.page.next_cursor) == (1, 3, None)
    assert [name for name, _ in opening.checkpoints] == ["nano", "nano-base"]
    assert history.overview(ME, limit=2).page == history.page(ME, limit=2)
    assert history.set_favourite(ME, [first], False) == 1 and studio.found(favourites=True) == [third]


def test_pages_hold_every_picture_once_while_new_ones_come_in(studio: Studio) -> None:
    made = [studio.add(seed=seed) for seed in range(1, 8)]
    page = studio.history.page(ME, limit=3)
    seen = [it.id for it in page.entries]
    studio.add("new")
    studio.history.delete(ME, [seen[-1]])  # the one that the cursor names
    studio.history.empty_trash(ME)
    while page.next_cursor:
        page = studio.history.page(ME, before=page.next_cursor, limit=3)
        seen += [it.id for it in page.entries]
    assert seen == made[::-1]
    for wrong in ("", "x", "1.", "1.zz", f"-1.{made[0]}", "1' OR '1.0", f"{'9' * 40}.{made[0]}"):
        with pytest.raises(RequestError):
            studio.history.page(ME, before=wrong)
    assert len(studio.history.page(ME, limit=10**9).entries) <= MAX_PICTURES_PER_CALL


def test_lineage_goes_both_ways_and_stays_with_its_owner(studio: Studio) -> None:
    source = studio.saved("a fox", seed=5)
    parent = studio.history.add(ME, "job", source)
    hash_ = sha256(source.image)
    child = studio.add("blue", references=(hash_, "ab" * 32))
    foreign = studio.add("blue", references=(hash_,), owner=YOU)
    details = studio.history.details(ME, child)
    assert details is not None
    first, second = details.made_from
    assert first.entry is not None and first.entry.id == parent
    assert second.entry is None and second.sha256 == "ab" * 32
    made = studio.history.details(ME, parent)
    assert made is not None and [it.id for it in made.made_into] == [child]
    theirs = studio.history.details(YOU, foreign)
    assert theirs is not None and theirs.made_from[0].entry is None
    assert studio.history.find_file_by_hash(ME, hash_) == source.image
    assert studio.history.find_file_by_hash(YOU, hash_) is None
    source.image.write_bytes(b"another")
    assert studio.history.find_file_by_hash(ME, hash_) is None


def test_undo_brings_a_picture_back_exactly(studio: Studio) -> None:
    kept, id_ = studio.add(seed=1), studio.add(seed=2)
    history = studio.history
    history.set_favourite(ME, [id_], True)
    before, path = history.details(ME, id_), history.find_file(ME, id_)
    assert path is not None
    data = path.read_bytes()
    assert history.delete(ME, [id_, id_, "nonsense"]) == [id_]
    assert studio.found() == [kept] and history.details(ME, id_) is None and history.find_file(ME, id_) is None
    assert not path.exists() and studio.forgotten == [id_] and history.overview(ME).trashed_ids == (id_,)
    assert studio.opened().restore(ME, [id_]) == [id_]
    assert history.details(ME, id_) == before and path.read_bytes() == data
    assert history.restore(ME, [id_]) == []


def test_deleted_pictures_are_really_removed_after_a_day_or_when_the_trash_is_emptied(studio: Studio) -> None:
    ids = [studio.add(seed=seed) for seed in range(1, 4)]
    theirs = studio.add(owner=YOU)
    history = studio.history
    history.delete(ME, ids[:2])
    history.delete(YOU, [theirs])
    assert history.empty_trash(ME) == 2 and history.restore(ME, ids) == []
    assert history.overview(YOU).trashed_ids == (theirs,) and len(list((studio.home / "trash").iterdir())) == 1
    assert history.purge() == 0
    history.delete(ME, ids[2:])
    studio.clock.seconds += TRASH_SECONDS - 2
    assert history.purge() == 1 and history.restore(YOU, [theirs]) == []
    assert history.restore(ME, ids[2:]) == ids[2:]
    assert len(list(studio.home.rglob("*.png"))) == 1


def test_a_file_that_cannot_be_removed_keeps_nothing_else(studio: Studio) -> None:
    stuck, other = studio.add(seed=1), studio.add(seed=2)
    studio.history.delete(ME, [stuck, other])
    file = studio.home / "trash" / f"{stuck}.png"
    file.unlink()
    file.mkdir()  # what no unlinking removes
    studio.clock.seconds += TRASH_SECONDS
    assert studio.history.purge() == 1 and studio.history.overview(ME).trashed_ids == (stuck,)
    with pytest.raises(SaveError, match="1 of the deleted pictures cannot be removed"):
        studio.history.empty_trash(ME)
    file.rmdir()
    assert studio.history.empty_trash(ME) == 1


def test_a_process_that_dies_between_row_and_file_loses_nothing(studio: Studio) -> None:
    id_ = studio.add()
    path = studio.history.find_file(ME, id_)
    assert path is not None
    trashed = studio.home / "trash" / f"{id_}.png"
    trashed.parent.mkdir()
    path.rename(trashed)  # as after an undo that got no further than the row
    assert studio.history.find_file(ME, id_) == trashed and not studio.history.find(ME, [id_])[0].missing
    studio.history.delete(ME, [id_])
    trashed.rename(path)  # as after a deletion that got no further than the row
    assert studio.history.restore(ME, [id_]) == [id_] and studio.history.find_file(ME, id_) == path


def test_a_lost_file_is_a_mark_and_no_error(studio: Studio) -> None:
    id_ = studio.add()
    path = studio.history.find_file(ME, id_)
    assert path is not None
    path.unlink()
    (entry,) = studio.history.page(ME).entries
    assert entry.missing and studio.history.find_file(ME, id_) is None
    details = studio.history.details(ME, id_)
    assert details is not None and details.record is not None
    assert studio.history.delete(ME, [id_]) == [id_] and studio.history.restore(ME, [id_]) == [id_]
    assert studio.history.delete(ME, [id_]) == [id_] and studio.history.empty_trash(ME) == 1


def test_a_record_of_a_later_version_is_shown_without(studio: Studio) -> None:
    id_ = studio.add()
    with sqlite3.connect(studio.home / "studio.sqlite3") as connection:
        connection.execute('UPDATE history_records SET record = \'{"request": {}, "checkpoint": {}, "new": 1}\'')
    connection.close()
    details = studio.history.details(ME, id_)
    assert details is not None and details.record is None and details.entry.prompt == "a fox"


def test_what_is_not_in_the_folder_of_pictures_is_refused_with_words(studio: Studio, tmp_path: Path) -> None:
    saved = studio.saved()
    elsewhere = tmp_path / "elsewhere.png"
    elsewhere.write_bytes(saved.image.read_bytes())
    for image in (elsewhere, saved.image.with_name("gone.png")):
        with pytest.raises(SaveError, match="not in the folder of pictures"):
            studio.history.add(ME, "job", replace(saved, image=image))
    assert studio.found() == []


def test_many_threads_add_at_once(studio: Studio) -> None:
    saved = [studio.saved(seed=seed) for seed in range(1, 9)]
    threads = [threading.Thread(target=studio.opened().add, args=(ME, "job", it)) for it in saved]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(studio.found()) == 8


# --- thumbnails -------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (1600, 800), "teal").save(path)
    return path


def test_a_thumbnail_is_made_once(tmp_path: Path, large: Path) -> None:
    thumbnails = ThumbnailCache(tmp_path / "thumbnails")
    asked: list[Path] = []

    def picture() -> Image.Image:
        asked.append(large)
        return read_saved(large)

    path = thumbnails.get_or_create("ab12", picture)
    assert thumbnails.get_or_create("ab12", picture) == path and len(asked) == 1
    with Image.open(path) as small:
        assert (small.format, small.size) == ("WEBP", (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS // 2))
    thumbnails.delete("ab12")
    thumbnails.delete("ab12")
    assert not path.exists() and thumbnails.get_or_create("ab12", picture).exists() and len(asked) == 2


def test_threads_that_ask_at_once_all_get_a_whole_thumbnail(tmp_path: Path, large: Path) -> None:
    thumbnails = ThumbnailCache(tmp_path / "thumbnails")
    start = threading.Barrier(4)
    sizes: list[tuple[int, int]] = []

    def ask() -> None:
        start.wait()
        with Image.open(thumbnails.get_or_create("ab12", lambda: read_saved(large))) as small:
            small.load()
            sizes.append(small.size)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [(THUMBNAIL_PIXELS, THUMBNAIL_PIXELS // 2)] * 4
    assert [it.name for it in (tmp_path / "thumbnails").rglob("*") if it.is_file()] == ["ab12.webp"]


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"<svg/>"), lambda path: path.write_bytes(b"")])
def test_a_broken_file_gives_no_thumbnail_and_leaves_nothing(
    tmp_path: Path, large: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(large)
    with pytest.raises((OSError, ValueError)):
        ThumbnailCache(tmp_path / "thumbnails").get_or_create("ab12", lambda: read_saved(large))
    assert not list((tmp_path / "thumbnails").rglob("*.*"))
