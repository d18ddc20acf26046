"""Presets: a part of a `Request` to start from, on a card that says what it is for.

One JSON file each, from this studio's presets/ folder or from anybody:

    {"name": ..., "group": ..., "form": "generate" | "edit" | "multi", "description": one line,
     "subject": what stands in for {subject} where the user says nothing,
     "picture": a file of examples/, or "shows": what comes out, in words,
     "request": {"prompt": "... {subject} ...", "width": ..., "height": ..., ...}}

`request` holds fields of `Request`, those in `PRESET_FIELDS`. Not the seed and the references: a preset is a recipe,
not one picture (that is what Inspect restores), and a stranger's file must name no path of this machine. And not who
enriches the prompt, nor what a finished file says of itself: where a prompt is sent and what is published stays the
user's own choice, whatever file they took in.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import PresetError, RequestError
from flux2_studio.request import LoraChoice, Request, round_side, size_for_aspect

FormName = Literal["generate", "edit", "multi"]  # for no reference, for one, for more
SUBJECT_PLACEHOLDER = "{subject}"
PRESET_FIELDS = (
    "prompt",
    "negative_prompt",
    "checkpoint",
    "width",
    "height",
    "steps",
    "guidance",
    "count",
    "loras",
    "format",
)
MAX_PRESET_BYTES = 100_000  # of a file; a prompt as long as can be, in any script, fits
MAX_JSON_DEPTH = 4  # brackets within brackets; a LoRA of a request is the deepest there is
MAX_FILES = 500  # of a folder
# Characters of each text on the card, and whether it may be left out.
CARD: Mapping[str, tuple[int, bool]] = {
    "name": (60, False),
    "group": (40, False),
    "description": (200, False),
    "subject": (300, True),
    "shows": (400, True),
}
_FILE = re.compile(r"[a-z0-9][a-z0-9-]{0,59}\.json")
_PICTURE = re.compile(r"[a-z0-9][a-z0-9-]{0,59}\.webp")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A partial request and its card.

    request: of the fields in `PRESET_FIELDS` those that it sets, as `Request.as_dict` has them. subject: an example for
    the prompt's `{subject}`. picture: an example of what comes out, where there is one. Raises `PresetError` for what
    no card and no request may hold.
    """

    name: str
    group: str
    form: FormName
    description: str
    request: Mapping[str, Any]
    subject: str = ""
    shows: str = ""
    picture: Path | None = None

    def __post_init__(self) -> None:
        for name, (most, may_be_empty) in CARD.items():
            _check_text(name, getattr(self, name), most, may_be_empty=may_be_empty)
        if self.form not in get_args(FormName):
            raise PresetError(f"form must be one of {', '.join(get_args(FormName))}, not {str(self.form)[:50]!r}.")
        _check_request(self.request)
        if self.template.count(SUBJECT_PLACEHOLDER) > 1:
            raise PresetError(f"The prompt may hold {SUBJECT_PLACEHOLDER} once: leave one of them.")
        if self.subject and SUBJECT_PLACEHOLDER not in self.template:
            raise PresetError(
                f"There is a subject, but no {SUBJECT_PLACEHOLDER} in the prompt: add it there, or leave it out."
            )
        if SUBJECT_PLACEHOLDER in self.subject:
            raise PresetError(f"The subject itself must not hold {SUBJECT_PLACEHOLDER}: write an example.")

    @property
    def template(self) -> str:
        """The prompt with its placeholder; "" where the preset leaves the prompt alone."""
        return str(self.request.get("prompt", ""))

    @property
    def takes_subject(self) -> bool:
        return SUBJECT_PLACEHOLDER in self.template

    def fill_prompt(self, subject: str) -> str | None:
        """The prompt with the user's `subject` in their place, or with the example subject; None where it has none.

        Raises `PresetError` where there are neither.
        """
        if not self.template or not self.takes_subject:
            return self.template or None
        # What a user typed may be a template itself, of a preset that they are about to save.
        said = subject.strip() if SUBJECT_PLACEHOLDER not in subject else ""
        if not (said or self.subject):
            raise PresetError(
                f"{self.name} needs a subject: write in the prompt what it should be about, and apply it again."
            )
        before, _, after = self.template.partition(SUBJECT_PLACEHOLDER)
        return f"{before}{said or self.subject}{after}"

    def extract_subject(self, prompt: str) -> str | None:
        """What the user had said where `fill_prompt` came from this preset ("" for the example); None where it did
        not."""
        if not self.takes_subject:
            return "" if self.template and prompt == self.template else None
        before, _, after = self.template.partition(SUBJECT_PLACEHOLDER)
        fits = prompt.startswith(before) and prompt.endswith(after) and len(prompt) >= len(before) + len(after)
        if not fits:
            return None
        said = prompt[len(before) : len(prompt) - len(after)]
        return "" if said == self.subject else said

    def as_dict(self) -> dict[str, Any]:
        """As its file has it, without the example picture, which stays with the studio."""
        texts = {name: getattr(self, name) for name in ("name", "group", "form", "description", "subject", "shows")}
        return {**{name: text for name, text in texts.items() if text}, "request": dict(self.request)}

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class AppliedPreset:
    """What a preset sets for one checkpoint, as fields of `Request`; `notes` say what of it that one cannot take."""

    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Presets:
    """Those of a folder by their files' names without the ending, in the order of groups and names.

    problems: a sentence about each file that is none.
    """

    by_slug: Mapping[str, Preset] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> Presets:
        """Those in `folder`, which need not exist; a file that cannot be read hides no other one."""
        found: dict[str, Preset] = {}
        problems: list[str] = []
        files = sorted(folder.glob("*.json"))
        for path in files[:MAX_FILES]:
            try:
                if not _FILE.fullmatch(path.name):
                    raise PresetError("a preset's file is named with small letters, digits and dashes: rename it.")
                preset = read_preset(path, examples=folder / "examples")
                if twin := next((slug for slug, it in found.items() if _key(it) == _key(preset)), None):
                    raise PresetError(f"{preset.name!r} is in {twin}.json already: give it another name.")
                found[path.stem] = preset
            except PresetError as error:
                problems.append(f"{_shown(path.name)}: {error}")
        if len(files) > MAX_FILES:
            problems.append(f"Only the first {MAX_FILES} of {len(files)} presets are read: move some elsewhere.")
        ordered = sorted(found.items(), key=lambda it: (it[1].group.casefold(), it[1].name.casefold()))
        return cls(by_slug=dict(ordered), problems=tuple(problems))

    def for_form(self, form: str) -> dict[str, Preset]:
        return {slug: preset for slug, preset in self.by_slug.items() if preset.form == form}

    def find(self, name: str) -> Preset:
        """The one that is called so, on its card or by its file. Raises `PresetError`."""
        wanted = name.strip().casefold()
        for slug, preset in self.by_slug.items():
            if wanted in (slug, preset.name.casefold()):
                return preset
        raise PresetError(f"There is no preset called {_shown(name)!r}: the command `presets` lists them.")


def _key(preset: Preset) -> tuple[str, str]:
    return preset.form, preset.name.casefold()


def read_preset(path: Path, *, examples: Path | None = None) -> Preset:
    """The preset in the file `path`, by whomever. examples: the folder of its picture; None where it may have none.

    Raises `PresetError` for anything that is no preset, without having read more than `MAX_PRESET_BYTES` of it.
    """
    try:
        # Whether it is a plain file is asked of what was opened, which nobody can exchange any more; a pipe must not
        # keep us waiting.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PresetError("This is no plain file: put the preset itself there.")
            data = file.read(MAX_PRESET_BYTES + 1)
    except OSError as error:
        raise PresetError(f"The file cannot be read ({error.strerror}): put a plain file there.") from error
    return parse_preset(data, examples=examples)


def parse_preset(data: bytes, *, examples: Path | None = None) -> Preset:
    """The preset that a file with `data` holds. examples: see `read_preset`. Raises `PresetError`."""
    if len(data) > MAX_PRESET_BYTES:
        raise PresetError(
            f"The file is larger than the {MAX_PRESET_BYTES:,} bytes that a preset may have: this is none."
        )
    try:
        read = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except PresetError:
        raise
    except UnicodeDecodeError as error:
        raise PresetError("The file is no UTF-8 text: save it as such.") from error
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise PresetError(f"The file is no JSON{where}: a preset is written as the README has it.") from error
    if not isinstance(read, dict):
        raise PresetError("A preset is a JSON object with a name, a group, a form, a description and a request.")
    if _depth(read) > MAX_JSON_DEPTH:
        raise PresetError(f"Brackets stand more than {MAX_JSON_DEPTH} deep: a preset has no such thing.")
    return _from_dict(read, examples)


def _from_dict(read: Mapping[str, Any], examples: Path | None) -> Preset:
    known = {"name", "group", "form", "description", "subject", "shows", "picture", "request"}
    _no_unknown(read, known, "A preset")
    for name in ("name", "group", "form", "description", "request"):
        if name not in read:
            raise PresetError(f"It has no {name}: add one.")
    picture = read.get("picture")
    if picture is not None:
        if examples is None:
            raise PresetError("Only presets that come with the studio have a picture: leave it out.")
        if not (isinstance(picture, str) and _PICTURE.fullmatch(picture)):
            raise PresetError("picture must be the name of a .webp file in examples/.")
        path = examples / picture
        if path.is_symlink() or not path.is_file():
            raise PresetError(f"There is no {picture} in examples/: draw it, or say in words what the preset shows.")
        if read.get("shows"):
            raise PresetError("It has a picture and says what it shows: leave one of them out.")
    given = {name: value for name, value in read.items() if name != "picture"}
    return Preset(**given, picture=examples / picture if examples and picture else None)


def apply_preset(preset: Preset, subject: str, checkpoint: Checkpoint, given: Collection[str] = ()) -> AppliedPreset:
    """What `preset` sets where `checkpoint` draws, with `subject` as the subject, but for the fields that are `given`.

    What that checkpoint cannot do is left to it and told: fixed steps and guidance, a negative prompt. A size beyond
    it becomes its own, in the same shape. Raises `PresetError` where there is no subject.
    """
    values = {name: value for name, value in preset.request.items() if name not in given}
    if "prompt" in values and (prompt := preset.fill_prompt(subject)) is not None:
        values["prompt"] = prompt
    if "loras" in values:
        values["loras"] = [asdict(LoraChoice(**entry)) for entry in values["loras"]]
    notes = []
    if "width" in values:
        width, height = (round_side(values[side], side) for side in ("width", "height"))
        if width * height > checkpoint.max_pixels:
            fitting = size_for_aspect(width, height, checkpoint.default_pixels)
            notes.append(
                f"{checkpoint.label} does not draw {width} x {height}: the size is {fitting[0]} x {fitting[1]}, nearly "
                f"the same shape."
            )
            width, height = fitting
        values |= {"width": width, "height": height}
    for name in ("steps", "guidance", "negative_prompt"):
        if name not in values:
            continue
        try:
            # The check that a run makes.
            Request.from_dict({"prompt": "a preset", name: values[name]}).resolve(checkpoint)
        except RequestError as error:
            notes.append(f"Left out of the preset: {name.replace('_', ' ')}. {error}")
            del values[name]
    return AppliedPreset(values=values, notes=tuple(notes))


def form_for(references: int) -> FormName:
    """The form that takes so many references."""
    form: FormName = get_args(FormName)[min(references, 2)]
    return form


def make_preset(
    name: str, form: FormName, values: Mapping[str, Any], *, description: str = "", group: str = "Yours"
) -> Preset:
    """A preset called `name` that sets `values`, of a request as it is. Raises `PresetError`."""
    held = {key: value for key, value in values.items() if key in PRESET_FIELDS and value not in (None, "")}
    held = json.loads(json.dumps(held))  # as it will be read again
    preset = Preset(
        name=name.strip(),
        group=group,
        form=form,
        description=description or f"Sets {', '.join(describe_fields(held))}.",
        request=held,
    )
    if len(preset.as_json().encode()) > MAX_PRESET_BYTES:
        raise PresetError("This is too much for a preset: shorten the prompt.")
    return preset


def describe_fields(values: Iterable[str]) -> list[str]:
    """What the fields that a preset sets are called on the page, in English."""
    names = [
        name.replace("_", " ") for name in PRESET_FIELDS if name in set(values) and name not in ("width", "height")
    ]
    if "width" in values:
        names.append("size")
    names = ["LoRAs" if name == "loras" else "pictures" if name == "count" else name for name in names]
    return names or ["nothing"]


# --- what is checked --------------------------------------------------------------------------------------------


def _check_text(name: str, text: Any, most: int, *, may_be_empty: bool) -> None:
    if not isinstance(text, str):
        raise PresetError(f"{name} must be a text.")
    if not text and may_be_empty:
        return
    if not text.strip() or text != text.strip() or not text.isprintable():
        raise PresetError(f"{name} must be one line of text, with no blanks around it.")
    if len(text) > most:
        raise PresetError(f"{name} has {len(text):,} characters: shorten it to {most} at most.")


def _check_request(fields: Any) -> None:
    """Whether a request may be made of `fields`, whatever stands for the ones that are missing."""
    if not isinstance(fields, dict):
        raise PresetError("request must be an object with fields of a request.")
    _no_unknown(fields, PRESET_FIELDS, "The request of a preset")
    if not fields:
        raise PresetError("The request is empty: let it set something.")
    if ("width" in fields) != ("height" in fields):
        raise PresetError("Set width and height together, or neither.")
    if any(value is None for value in fields.values()):
        raise PresetError("null stands for nothing here: leave the field out.")
    if isinstance(fields.get("guidance"), bool):
        raise PresetError("guidance must be a number.")
    if not isinstance(fields.get("loras", []), list):
        raise PresetError('loras must be a list of {"name": ..., "weight": ...}.')
    try:
        request = Request.from_dict({"prompt": "a preset", **fields})
        for side in ("width", "height"):
            if (pixels := getattr(request, side)) is not None:
                round_side(pixels, side)
                if pixels > 16_384:
                    raise PresetError(f"The {side} is {pixels:,} pixels: no checkpoint draws that.")
    except RequestError as error:
        raise PresetError(str(error)) from error
    if str(fields.get("prompt", "")).strip() == SUBJECT_PLACEHOLDER:
        raise PresetError(f"The prompt is nothing but {SUBJECT_PLACEHOLDER}: write what stands around it.")


def _no_unknown(read: Mapping[str, Any], known: Collection[str], what: str) -> None:
    if unknown := sorted(read.keys() - set(known)):
        raise PresetError(f"{what} has no field {_shown(unknown[0])!r}: leave it out.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise PresetError(f"{_shown(twice)!r} stands there twice: leave one of them.")
    return read


def _no_constant(name: str) -> Any:
    raise PresetError(f"{name} is no number that JSON knows: write another one.")


def _depth(value: Any) -> int:
    """How deep the brackets of `value` stand, counted no further than matters."""
    level, deep = [value], 0
    while level and deep <= MAX_JSON_DEPTH:
        inner = [it for it in level if isinstance(it, dict | list)]
        level = [it for box in inner for it in (box.values() if isinstance(box, dict) else box)]
        deep += bool(inner)
    return deep


def _shown(text: str) -> str:
    """A text of a stranger's, short and printable."""
    return "".join(it if it.isprintable() else "?" for it in text)[:60]
