"""Presets: part of a `Request` as a starting point, with a card that describes it.

Each preset is a JSON file, from this studio's presets/ folder or from anyone:

    {"name": ..., "group": ..., "form": "generate" | "edit" | "multi", "description": one line,
     "subject": the default for {subject} if the user writes nothing,
     "picture": a file of examples/, or "shows": the result in words,
     "request": {"prompt": "... {subject} ...", "width": ..., "height": ..., ...}}

`request` holds the fields of `Request` listed in `PRESET_FIELDS`. The seed and the references are not among them: a
preset is a recipe, not one picture (Inspect restores those), and a stranger's file must not name paths of this machine.
Prompt enhancement and the marks of finished files are not among them either: users decide where prompts are sent and
what is published, whatever file they import.
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

FormName = Literal["generate", "edit", "multi"]  # for no, one or several references
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
MAX_PRESET_BYTES = 100_000  # of a file; the longest possible prompt fits, in any script
MAX_JSON_DEPTH = 4  # nested brackets; the LoRAs of a request are the deepest
MAX_FILES = 500  # read from a folder
# Maximum characters of each text on the card, and whether it is optional.
CARD: Mapping[str, tuple[int, bool]] = {
    "name": (60, False),
    "group": (40, False),
    "description": (200, False),
    "subject": (300, True),
    "shows": (400, True),
}
_FILE_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,59}\.json")
_PICTURE_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,59}\.webp")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A partial request and its card.

    request: values for some of `PRESET_FIELDS`, as in `Request.as_dict`. subject: an example for the prompt's
    `{subject}`. picture: an example of the result, or None. Raises `PresetError` for an invalid card or request.
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
        for name, (max_characters, may_be_empty) in CARD.items():
            _check_text(name, getattr(self, name), max_characters, may_be_empty=may_be_empty)
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
        """The prompt with its placeholder; empty if the preset does not set the prompt."""
        return str(self.request.get("prompt", ""))

    @property
    def takes_subject(self) -> bool:
        return SUBJECT_PLACEHOLDER in self.template

    def fill_prompt(self, subject: str) -> str | None:
        """Return the prompt with `subject` inserted (if empty, the example subject); None if the preset has no prompt.

        Raises `PresetError` if there is no subject either way.
        """
        if not self.template or not self.takes_subject:
            return self.template or None
        # The subject may be a template itself, of a preset that the user is about to save.
        own_subject = subject.strip() if SUBJECT_PLACEHOLDER not in subject else ""
        if not (own_subject or self.subject):
            raise PresetError(
                f"{self.name} needs a subject: write in the prompt what it should be about, and apply it again."
            )
        before, _, after = self.template.partition(SUBJECT_PLACEHOLDER)
        return f"{before}{own_subject or self.subject}{after}"

    def extract_subject(self, prompt: str) -> str | None:
        """Return the subject that `fill_prompt` inserted into `prompt` (empty for the example); None if the prompt is
        not from this preset."""
        if not self.takes_subject:
            return "" if self.template and prompt == self.template else None
        before, _, after = self.template.partition(SUBJECT_PLACEHOLDER)
        matches = prompt.startswith(before) and prompt.endswith(after) and len(prompt) >= len(before) + len(after)
        if not matches:
            return None
        subject = prompt[len(before) : len(prompt) - len(after)]
        return "" if subject == self.subject else subject

    def as_dict(self) -> dict[str, Any]:
        """Return the file's content without the example picture, which belongs to the studio."""
        texts = {name: getattr(self, name) for name in ("name", "group", "form", "description", "subject", "shows")}
        return {**{name: text for name, text in texts.items() if text}, "request": dict(self.request)}

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class AppliedPreset:
    """The values of a preset for one checkpoint, as fields of `Request`; `notes` list what the checkpoint cannot do."""

    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Presets:
    """The presets of a folder by file name without suffix, sorted by group and name.

    problems: a sentence about each invalid file.
    """

    by_slug: Mapping[str, Preset] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> Presets:
        """Load the presets in `folder`, which need not exist; an unreadable file does not affect the others."""
        presets: dict[str, Preset] = {}
        problems: list[str] = []
        files = sorted(folder.glob("*.json"))
        for path in files[:MAX_FILES]:
            try:
                if not _FILE_NAME_PATTERN.fullmatch(path.name):
                    raise PresetError("a preset's file is named with small letters, digits and dashes: rename it.")
                preset = read_preset(path, examples=folder / "examples")
                if duplicate := next(
                    (slug for slug, it in presets.items() if _unique_key(it) == _unique_key(preset)), None
                ):
                    raise PresetError(f"{preset.name!r} is in {duplicate}.json already: give it another name.")
                presets[path.stem] = preset
            except PresetError as error:
                problems.append(f"{_printable(path.name)}: {error}")
        if len(files) > MAX_FILES:
            problems.append(f"Only the first {MAX_FILES} of {len(files)} presets are read: move some elsewhere.")
        ordered = sorted(presets.items(), key=lambda it: (it[1].group.casefold(), it[1].name.casefold()))
        return cls(by_slug=dict(ordered), problems=tuple(problems))

    def for_form(self, form: str) -> dict[str, Preset]:
        return {slug: preset for slug, preset in self.by_slug.items() if preset.form == form}

    def find(self, name: str) -> Preset:
        """Return the preset with this name or file name. Raises `PresetError`."""
        wanted = name.strip().casefold()
        for slug, preset in self.by_slug.items():
            if wanted in (slug, preset.name.casefold()):
                return preset
        raise PresetError(f"There is no preset called {_printable(name)!r}: the command `presets` lists them.")


def _unique_key(preset: Preset) -> tuple[str, str]:
    return preset.form, preset.name.casefold()


def read_preset(path: Path, *, examples: Path | None = None) -> Preset:
    """Read the preset in the untrusted file `path`. examples: the folder of its picture; None if it may have none.

    Raises `PresetError` for an invalid preset; never reads more than `MAX_PRESET_BYTES` + 1 bytes.
    """
    try:
        # Check the type of the opened file, which nobody can replace any more. O_NONBLOCK: a pipe must not block.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PresetError("This is no plain file: put the preset itself there.")
            data = file.read(MAX_PRESET_BYTES + 1)
    except OSError as error:
        raise PresetError(f"The file cannot be read ({error.strerror}): put a plain file there.") from error
    return parse_preset(data, examples=examples)


def parse_preset(data: bytes, *, examples: Path | None = None) -> Preset:
    """Parse the content of a preset file. examples: see `read_preset`. Raises `PresetError`."""
    if len(data) > MAX_PRESET_BYTES:
        raise PresetError(
            f"The file is larger than the {MAX_PRESET_BYTES:,} bytes that a preset may have: this is none."
        )
    try:
        card = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_reject_duplicate_keys, parse_constant=_reject_constant
        )
    except PresetError:
        raise
    except UnicodeDecodeError as error:
        raise PresetError("The file is no UTF-8 text: save it as such.") from error
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise PresetError(f"The file is no JSON{where}: a preset is written as the README has it.") from error
    if not isinstance(card, dict):
        raise PresetError("A preset is a JSON object with a name, a group, a form, a description and a request.")
    if _depth(card) > MAX_JSON_DEPTH:
        raise PresetError(f"Brackets stand more than {MAX_JSON_DEPTH} deep: a preset has no such thing.")
    return _from_dict(card, examples)


def _from_dict(card: Mapping[str, Any], examples: Path | None) -> Preset:
    known = {"name", "group", "form", "description", "subject", "shows", "picture", "request"}
    _reject_unknown_fields(card, known, "A preset")
    for name in ("name", "group", "form", "description", "request"):
        if name not in card:
            raise PresetError(f"It has no {name}: add one.")
    picture = card.get("picture")
    if picture is not None:
        if examples is None:
            raise PresetError("Only presets that come with the studio have a picture: leave it out.")
        if not (isinstance(picture, str) and _PICTURE_NAME_PATTERN.fullmatch(picture)):
            raise PresetError("picture must be the name of a .webp file in examples/.")
        path = examples / picture
        if path.is_symlink() or not path.is_file():
            raise PresetError(f"There is no {picture} in examples/: draw it, or say in words what the preset shows.")
        if card.get("shows"):
            raise PresetError("It has a picture and says what it shows: leave one of them out.")
    fields = {name: value for name, value in card.items() if name != "picture"}
    return Preset(**fields, picture=examples / picture if examples and picture else None)


def apply_preset(preset: Preset, subject: str, checkpoint: Checkpoint, given: Collection[str] = ()) -> AppliedPreset:
    """Return what `preset` sets for `checkpoint`, with `subject` inserted, except for the fields in `given`.

    Values that the checkpoint cannot use (fixed steps and guidance, a negative prompt) are left out with a note. A size
    above its maximum becomes its default size with the same aspect ratio. Raises `PresetError` if there is no subject.
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
            smaller = size_for_aspect(width, height, checkpoint.default_pixels)
            notes.append(
                f"{checkpoint.label} does not draw {width} x {height}: the size is {smaller[0]} x {smaller[1]}, nearly "
                f"the same shape."
            )
            width, height = smaller
        values |= {"width": width, "height": height}
    for name in ("steps", "guidance", "negative_prompt"):
        if name not in values:
            continue
        try:
            # The same check as for a run.
            Request.from_dict({"prompt": "a preset", name: values[name]}).resolve(checkpoint)
        except RequestError as error:
            notes.append(f"Left out of the preset: {name.replace('_', ' ')}. {error}")
            del values[name]
    return AppliedPreset(values=values, notes=tuple(notes))


def form_for(references: int) -> FormName:
    """Return the form for this number of references."""
    form: FormName = get_args(FormName)[min(references, 2)]
    return form


def make_preset(
    name: str, form: FormName, values: Mapping[str, Any], *, description: str = "", group: str = "Yours"
) -> Preset:
    """Return a preset called `name` with the `PRESET_FIELDS` of `values`, the fields of a request. Raises
    `PresetError`."""
    fields = {key: value for key, value in values.items() if key in PRESET_FIELDS and value not in (None, "")}
    fields = json.loads(json.dumps(fields))  # as it will be read from the file
    preset = Preset(
        name=name.strip(),
        group=group,
        form=form,
        description=description or f"Sets {', '.join(describe_fields(fields))}.",
        request=fields,
    )
    if len(preset.as_json().encode()) > MAX_PRESET_BYTES:
        raise PresetError("This is too much for a preset: shorten the prompt.")
    return preset


def describe_fields(values: Iterable[str]) -> list[str]:
    """Return the English names of preset fields, as on the page."""
    names = [
        name.replace("_", " ") for name in PRESET_FIELDS if name in set(values) and name not in ("width", "height")
    ]
    if "width" in values:
        names.append("size")
    names = ["LoRAs" if name == "loras" else "pictures" if name == "count" else name for name in names]
    return names or ["nothing"]


# --- validation -------------------------------------------------------------------------------------------------


def _check_text(name: str, text: Any, max_characters: int, *, may_be_empty: bool) -> None:
    if not isinstance(text, str):
        raise PresetError(f"{name} must be a text.")
    if not text and may_be_empty:
        return
    if not text.strip() or text != text.strip() or not text.isprintable():
        raise PresetError(f"{name} must be one line of text, with no blanks around it.")
    if len(text) > max_characters:
        raise PresetError(f"{name} has {len(text):,} characters: shorten it to {max_characters} at most.")


def _check_request(fields: Any) -> None:
    """Check that `fields` can be part of a request. Raises `PresetError`."""
    if not isinstance(fields, dict):
        raise PresetError("request must be an object with fields of a request.")
    _reject_unknown_fields(fields, PRESET_FIELDS, "The request of a preset")
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


def _reject_unknown_fields(fields: Mapping[str, Any], known: Collection[str], what: str) -> None:
    if unknown := sorted(fields.keys() - set(known)):
        raise PresetError(f"{what} has no field {_printable(unknown[0])!r}: leave it out.")


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        duplicate = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise PresetError(f"{_printable(duplicate)!r} stands there twice: leave one of them.")
    return fields


def _reject_constant(name: str) -> Any:
    raise PresetError(f"{name} is no number that JSON knows: write another one.")


def _depth(value: Any) -> int:
    """Return the nesting depth of `value`; stops counting above `MAX_JSON_DEPTH`."""
    level, deep = [value], 0
    while level and deep <= MAX_JSON_DEPTH:
        inner = [it for it in level if isinstance(it, dict | list)]
        level = [it for container in inner for it in (container.values() if isinstance(container, dict) else container)]
        deep += bool(inner)
    return deep


def _printable(text: str) -> str:
    """Return an untrusted text in a short, printable form."""
    return "".join(it if it.isprintable() else "?" for it in text)[:60]
