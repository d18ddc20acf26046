"""Reference pictures on the page: checking files, reordering, naming and removing them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import gradio as gr

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import StudioError
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.images.references import LoadedReference, fit_size
from flux2_studio.ui.forms import fields, mask_panel
from flux2_studio.ui.forms.reference_names import names_in, rename_reference
from flux2_studio.ui.forms.tabs import Form, ReferencePanel, ReferenceTools
from flux2_studio.ui.gradio_compat.language import translate
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.stage import render

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

# State that the browser sends when a button is pressed. A copy on the server, from an earlier event, might be stale.
SELECTED = "(_, ...others) => [window.studioReferences.selected(), ...others]"
CLEARED = "(_, ...others) => [window.studioReferences.cleared('{form}'), ...others]"
TO_CLEAR = "(_, ...others) => [window.studioReferences.toClear('{form}'), ...others]"
# As above, for handlers that also need the selected or the dragged picture.
CLEARED_AND_SELECTED = """(_, heard, __, ...others) =>
  [window.studioReferences.cleared('{form}'), heard, window.studioReferences.selected(), ...others]"""
CLEARED_AND_DRAGGED = """(_, heard, __, ...others) =>
  [window.studioReferences.cleared('{form}'), heard, window.studioReferences.moved, ...others]"""


def gallery_paths(items: Sequence[tuple[str, str | None]] | None) -> tuple[Path, ...]:
    """Return the files in the value of a gallery."""
    return tuple(Path(file) for file, _ in items or ())


@dataclass(frozen=True, kw_only=True)
class ExaminedFiles:
    """The result of `examine`.

    usable: files that can be used, with `notes` about them. refused: why the others cannot. first_subject: the first
    usable picture, as the mask board shows it.
    """

    usable: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    first_subject: mask_panel.MaskSubject | None = None


def examine(offered: Sequence[Path], checkpoint: Checkpoint, max_count: int, pictures: PictureCache) -> ExaminedFiles:
    """Sort `offered` into files that can be used, at most `max_count`, and the others."""
    usable: list[Path] = []
    notes: list[str] = []
    refused: list[str] = []
    left_out: list[str] = []
    first: LoadedReference | None = None
    for path in offered:
        if len(usable) == max_count:
            left_out.append(path.name)
            continue
        try:
            loaded = pictures.load(path)
        except StudioError as error:
            refused.append(str(error))
            continue
        first = first or loaded
        usable.append(path)
        notes += loaded.notes
    if left_out:
        were = f"{_listed(left_out)} {'was' if len(left_out) == 1 else 'were'} left out"
        refused.append(f"{checkpoint.label} takes at most {max_count} pictures: {were}.")
    subject = None
    if first is not None:
        width, height = fit_size(first.image.size, checkpoint.max_pixels_per_reference(len(usable)))
        shape = fields.ratio(width, height)
        size = translate("As image 1: {width} x {height} pixels ({shape}).", width=width, height=height, shape=shape)
        if first.image.size != (width, height):
            size += " " + translate(
                "Image 1 is scaled from {width} x {height} to {across} x {down}.",
                width=first.image.width,
                height=first.image.height,
                across=width,
                down=height,
            )
        notes.insert(0, size)
        subject = mask_panel.make_mask_subject(first, (width, height))
    return ExaminedFiles(usable=tuple(usable), notes=tuple(notes), refused=tuple(refused), first_subject=subject)


def newest_usable(offered: Sequence[Path], checkpoint: Checkpoint, pictures: PictureCache) -> ExaminedFiles:
    """Examine only the last usable file of `offered`, and say why those after it cannot be used."""
    refused: tuple[str, ...] = ()
    for path in reversed(offered):
        examined = examine([path], checkpoint, 1, pictures)
        if examined.usable:
            return replace(examined, refused=refused)
        refused += examined.refused
    return ExaminedFiles(refused=refused)


def _listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c" or "a, b and 38 others"."""
    listed = [*names[:2], f"{len(names) - 2} others"] if len(names) > 3 else list(names)
    return " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)


def move_item(order: Sequence[Path], index: int | None, by: int) -> tuple[list[Path], int | None]:
    """Move the item at `index` by `by` places, at most to an end. Returns the new order and the item's new index."""
    moved = list(order)
    if index is None or index >= len(moved):
        return moved, None
    place = max(0, min(len(moved) - 1, index + by))
    moved.insert(place, moved.pop(index))
    return moved, place


def apply_drag(order: Sequence[Path], sent: str) -> list[Path] | None:
    """Move one item as the page `sent` it: "2,0" brings the third to the front. None if that is not a possible move."""
    asked = re.fullmatch(r"([0-9]{1,3}),([0-9]{1,3})", sent)
    if asked is None:
        return None
    start, end = map(int, asked.groups())
    if max(start, end) >= len(order):
        return None
    return move_item(order, start, end - start)[0]


def parse_selected_index(sent: str | None) -> int | None:
    """Parse the index of the selected picture that the page `sent`; None if none is selected."""
    return int(sent) if sent and re.fullmatch(r"[0-9]{1,3}", sent) else None


def parse_clear_count(sent: str | None) -> int:
    """Parse how often the pictures were cleared, as the page `sent` it; 0 for anything else."""
    return int(sent) if sent and re.fullmatch(r"[0-9]{1,6}", sent) else 0


def set_references(
    form: Form,
    offered: Sequence[Path],
    checkpoint: Checkpoint,
    pictures: PictureCache,
    chosen: int | None = None,
    names: Mapping[Path, str] = MappingProxyType({}),
) -> Update:
    """Put the usable files of `offered` into the form's references, with notes and problems.

    chosen: the index to select. names: the names of pictures that have one. The update includes what depends on the
    references, because a gallery does not always fire its change event for updates from the server.
    """
    assert form.reference_panel is not None
    tools = form.reference_panel.tools
    examined = (
        examine(offered, checkpoint, checkpoint.max_references, pictures)
        if tools
        else newest_usable(offered, checkpoint, pictures)
    )
    update: Update = {
        form.fields["references"]: gr.Gallery(fields.captioned_items(examined.usable, names), selected_index=chosen),
        form.reference_panel.problems: "".join(map(render.problem, examined.refused)),
        form.reference_panel.note: render.notes(examined.notes),
        **mask_panel.mask_panel_update(form.fields, examined.first_subject),
    }
    if tools is not None:
        named = examined.usable[chosen] if chosen is not None and chosen < len(examined.usable) else None
        update |= {tools.row: gr.Row(visible=bool(examined.usable)), **_naming(tools, named, names)}
    return update


def reference_outputs(form: Form) -> list[Any]:
    """Return the components that `set_references` sets."""
    assert form.reference_panel is not None
    tools = form.reference_panel.tools
    return [
        form.fields["references"],
        form.reference_panel.problems,
        form.reference_panel.note,
        form.fields["mask"],
        form.fields["outpaint"],
        *([tools.row, tools.name, tools.named] if tools else []),
    ]


def _naming(tools: ReferenceTools, selected: Path | None, names: Mapping[Path, str]) -> Update:
    """Update the name field for the picture `selected`."""
    if selected is None:
        return {tools.name: fields.reference_name_field(), tools.named: ""}
    return {tools.name: fields.reference_name_field(names.get(selected, ""), of_one=True), tools.named: str(selected)}


def wire_references(studio: Studio, checkpoint_dropdown: gr.Dropdown, form: Form, panel: ReferencePanel) -> None:
    references, tools = form.fields["references"], panel.tools

    def unless_cleared(action: Callable[..., Any]) -> Callable[..., Any]:
        """Drop events that the browser sent before a clear, even if the clear arrived first."""

        def answer(sent: str | None, heard: int, *rest: Any) -> Any:
            if parse_clear_count(sent) < heard:
                return gr.skip()
            update = action(*rest)
            # Sent after that many clears, the last of which may arrive after this event.
            return update if update == gr.skip() else update | {panel.clear_count: parse_clear_count(sent)}

        return answer

    def check(items: Any, name: str) -> Update:
        checkpoint = studio.settings.checkpoint(name)
        return set_references(form, gallery_paths(items), checkpoint, studio.pictures, names=names_in(items))

    def clear(sent: str | None, heard: int, name: str) -> Any:
        # Whatever the gallery holds now: the answer to an earlier event may just have filled it again.
        if parse_clear_count(sent) <= heard:
            return gr.skip()
        update = set_references(form, (), studio.settings.checkpoint(name), studio.pictures)
        return update | {panel.clear_count: parse_clear_count(sent)}

    def describe(items: Any, name: str) -> Update:
        checkpoint = studio.settings.checkpoint(name)
        examined = examine(gallery_paths(items), checkpoint, checkpoint.max_references, studio.pictures)
        return {
            panel.note: render.notes(examined.notes),
            **mask_panel.mask_panel_update(form.fields, examined.first_subject),
        }

    # One after the other: files that arrive during a check would be lost with its answer.
    turns: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_id": f"references of {form.name}"}
    since, outputs = [panel.client_state, panel.clear_count], [*reference_outputs(form), panel.clear_count]
    listen(
        [references.upload, references.delete],
        unless_cleared(check),
        [*since, references, checkpoint_dropdown],
        outputs,
        js=CLEARED.format(form=form.name),
        **turns,
    )
    # The gallery's own clear button fires the change event only.
    listen(
        references.change,
        clear,
        [*since, checkpoint_dropdown],
        outputs,
        js=TO_CLEAR.format(form=form.name),
        **turns,
    )
    described = [panel.note, form.fields["mask"], form.fields["outpaint"]]
    # Another checkpoint may have another cap.
    listen(checkpoint_dropdown.change, describe, [references, checkpoint_dropdown], described)
    # When the page is opened: a label with a number in it depends on the visitor's language.
    max_references = studio.settings.checkpoint(None).max_references
    if tools is not None:
        listen(None, lambda: gr.Gallery(label=fields.references_label(max_references)), None, references, queue=False)
    if tools is None:
        # A gallery with a selected picture accepts no upload.
        listen(references.select, lambda: gr.Gallery(selected_index=None), None, references, queue=False)
        return

    def call(items: Any, typed: str | None, named: str | None) -> tuple[dict[Path, str], str]:
        """Give the picture `named` the typed name. Returns all names, and the problem if it cannot have that name.

        Every button does this first, so a typed name is usable without pressing Enter.
        """
        names = names_in(items)
        path, typed = Path(named or ""), typed or ""
        if path not in gallery_paths(items) or typed == names.get(path, ""):
            return names, ""
        try:
            return rename_reference(names, path, typed), ""
        except StudioError as error:
            return names, render.problem(str(error))

    def offered(order: Sequence[Path], name: str, items: Any, *field: str | None, place: int | None = None) -> Update:
        names, problem = call(items, *field)
        update = set_references(form, order, studio.settings.checkpoint(name), studio.pictures, place, names)
        return update | {panel.problems: problem + update[panel.problems]}

    def add(new: Sequence[str], *rest: Any) -> Update:
        _, items, *_ = rest
        return offered([*gallery_paths(items), *map(Path, new)], *rest)

    def move(by: int) -> Callable[..., Update]:
        def moved(sent: str | None, *rest: Any) -> Update:
            _, items, *_ = rest
            order, place = move_item(gallery_paths(items), parse_selected_index(sent), by)
            return offered(order, *rest, place=place)

        return moved

    def remove(sent: str | None, *rest: Any) -> Update:
        _, items, *_ = rest
        gone = parse_selected_index(sent)
        return offered([path for number, path in enumerate(gallery_paths(items)) if number != gone], *rest)

    def drop(sent: str, *rest: Any) -> Any:
        _, items, *_ = rest
        order = apply_drag(gallery_paths(items), str(sent))
        return gr.skip() if order is None else offered(order, *rest)

    def choose(items: Any, typed: str | None, named: str | None, event: gr.SelectData) -> Update:
        index = int(event.index)
        names, problem = call(items, typed, named)
        update: Update = _naming(tools, gallery_paths(items)[index], names)
        if names != names_in(items):
            update[references] = gr.Gallery(fields.captioned_items(gallery_paths(items), names), selected_index=index)
        if problem:
            update[panel.problems] = problem
        return update

    def enter(sent: str | None, items: Any, typed: str | None, named: str | None) -> Update:
        names, problem = call(items, typed, named)
        if problem:
            return {panel.problems: problem}
        gallery = gr.Gallery(
            fields.captioned_items(gallery_paths(items), names), selected_index=parse_selected_index(sent)
        )
        return {references: gallery, panel.problems: "", tools.name: names.get(Path(named or ""), "")}

    called = [references, tools.name, tools.named]
    about = [tools.name, tools.named, references, panel.problems]
    listen(references.select, choose, called, about, queue=False, trigger_mode="multiple")  # the last selection counts
    entered = [references, panel.problems, tools.name]
    listen(tools.name.submit, enter, [panel.client_state, *called], entered, js=SELECTED, queue=False)
    rest = [checkpoint_dropdown, *called]
    presses: list[tuple[Any, Callable[..., Any], Any, str]] = [
        (tools.drag_button.click, drop, panel.client_state, CLEARED_AND_DRAGGED),
        (tools.add.upload, add, tools.add, CLEARED),
        (tools.earlier.click, move(-1), panel.client_state, CLEARED_AND_SELECTED),
        (tools.later.click, move(1), panel.client_state, CLEARED_AND_SELECTED),
        (tools.remove.click, remove, panel.client_state, CLEARED_AND_SELECTED),
    ]
    for pressed, action, what, js in presses:
        listen(
            pressed,
            unless_cleared(action),
            [*since, what, *rest],
            outputs,
            js=js.format(form=form.name),
            concurrency_id=turns["concurrency_id"],
        )
