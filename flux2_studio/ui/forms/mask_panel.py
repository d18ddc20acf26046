"""The panel for edits of a part of a picture: mask (painted, loaded or a rectangle), outpainting, colour matching.

Mask and margins are components whose state lives in the browser and is sent with the form, so a run that starts at once
has it. The values that arrive are not trusted: they are checked here, and a mask becomes a file like any upload.
"""

from __future__ import annotations

import base64
import binascii
import io
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from flux2_studio.errors import RequestError
from flux2_studio.files.atomic import atomic_write
from flux2_studio.files.hashing import hash_bytes
from flux2_studio.images.references import LoadedReference
from flux2_studio.request import Outpaint
from flux2_studio.ui.forms import fields
from flux2_studio.ui.gradio_compat.language import i18n

MASK_PANEL_TITLE = "Mask and outpainting"
BOARD_SIDE_PIXELS = 1024  # pixels along a side of the picture to paint on
PNG_DATA_PREFIX = "data:image/png;base64,"
MAX_MASK_CHARS = 16 * 10**6  # characters of a mask; one of 4 megapixels in black and white takes a hundredth
MARGIN_SIDES = ("left", "top", "right", "bottom")

MASK_BOARD_HTML = """<div class="mask">
  <p class="said" role="status"></p>
  <div class="board"><canvas data-i18n aria-label="Paint on the picture what may change"></canvas></div>
  <div class="acts">
    <button type="button" class="paint" aria-pressed="true" data-i18n>Paint</button>
    <button type="button" class="erase" aria-pressed="false" data-i18n>Erase</button>
    <label class="brush" data-i18n>Brush <input type="range" min="1" max="50" value="12" data-i18n
      aria-label="Size of the brush"></label>
    <button type="button" class="invert" data-i18n>Invert</button>
    <button type="button" class="clear" data-i18n>Clear</button>
    <label class="load" data-i18n>Load a mask<input type="file" accept="image/*" data-i18n
      aria-label="Load a mask from a file"></label>
  </div>
  <div class="numbers rectangle">
    <label data-i18n>Left<input type="number" min="0" value="0" data-side="left"></label>
    <label data-i18n>Top<input type="number" min="0" value="0" data-side="top"></label>
    <label data-i18n>Width<input type="number" min="1" data-side="width"></label>
    <label data-i18n>Height<input type="number" min="1" data-side="height"></label>
    <button type="button" class="add" data-i18n>Add rectangle</button>
  </div>
</div>"""

# The canvas holds the mask alone, in one colour on nothing; the picture lies behind it. `seen` is the picture that it
# belongs to, `sent` the value that it stands for.
MASK_BOARD_JS = """
const find = (selector) => element.querySelector(selector);
const value = () => props.value ?? {};
const canvas = find('canvas'), board = find('.board'), said = find('.said');
const pen = canvas.getContext('2d', {willReadFrequently: true});
const COLOUR = '#e0218a';
let seen = null, sent = '', erasing = false, last = null;
const copy = (width, height) => {
  const made = Object.assign(document.createElement('canvas'), {width, height});
  made.getContext('2d').drawImage(canvas, 0, 0, width, height);
  return made;
};
const tint = () => {
  pen.globalCompositeOperation = 'source-in';
  pen.fillStyle = COLOUR;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.globalCompositeOperation = 'source-over';
};
const send = () => {
  const alpha = pen.getImageData(0, 0, canvas.width, canvas.height).data;
  let some = false;
  for (let at = 3; at < alpha.length && !some; at += 4) some = alpha[at] > 127;
  sent = '';
  if (some) {
    const mask = copy(canvas.width, canvas.height), ink = mask.getContext('2d');
    ink.globalCompositeOperation = 'source-in';
    ink.fillStyle = '#fff';
    ink.fillRect(0, 0, mask.width, mask.height);
    ink.globalCompositeOperation = 'destination-over';
    ink.fillStyle = '#000';
    ink.fillRect(0, 0, mask.width, mask.height);
    sent = mask.toDataURL('image/png');
  }
  props.value = {...value(), mask: sent};
  say(some ? studioSay('Only what is coloured may change. Every other pixel stays as it is.') : '');
};
const say = (text) => {
  const none = value().picture
    ? studioSay('Paint what may change. Without a mask all of it may.') : studioSay('Add a picture above first.');
  said.textContent = text || none;
};
const wipe = () => pen.clearRect(0, 0, canvas.width, canvas.height);
// White is what may change; dark or transparent is what stays.
const put = (image) => {
  const {width, height} = canvas;
  const read = Object.assign(document.createElement('canvas'), {width, height}).getContext('2d');
  read.drawImage(image, 0, 0, width, height);
  const pixels = read.getImageData(0, 0, width, height), data = pixels.data;
  for (let at = 0; at < data.length; at += 4) {
    const grey = (0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2]) * data[at + 3] / 255;
    data[at + 3] = grey >= 127.5 ? 255 : 0;
  }
  pen.putImageData(pixels, 0, 0);
  tint();
};
const follow = () => {
  const width = value().width || 1, height = value().height || 1, other = value().subject !== seen;
  if (!other && value().mask === sent && canvas.width === width && canvas.height === height) return;
  const before = !other && sent ? copy(width, height) : null;
  const had = sent !== '';
  canvas.width = width;
  canvas.height = height;
  board.style.backgroundImage = value().picture ? `url("${value().picture}")` : 'none';
  board.style.aspectRatio = `${width} / ${height}`;
  board.style.setProperty('--across', width / height);
  board.hidden = !value().picture;
  seen = value().subject;
  sent = '';
  find('[data-side=width]').value = Math.round(width / 2);
  find('[data-side=height]').value = Math.round(height / 2);
  if (before) {
    pen.drawImage(before, 0, 0);
    send();
  } else if (value().mask) {
    const image = new Image(), key = seen;
    sent = value().mask;
    image.onload = () => { if (key === seen) put(image); };
    image.src = value().mask;
    say(studioSay('Only what is coloured may change. Every other pixel stays as it is.'));
  } else {
    say(had && other ? studioSay('The picture is another one: its mask was cleared.') : '');
  }
};
const at = (event) => {
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
};
const stroke = (to) => {
  pen.globalCompositeOperation = erasing ? 'destination-out' : 'source-over';
  pen.strokeStyle = COLOUR;
  pen.lineCap = pen.lineJoin = 'round';
  pen.lineWidth = Math.max(1, find('.brush input').value / 100 * Math.min(canvas.width, canvas.height));
  pen.beginPath();
  pen.moveTo(...last);
  pen.lineTo(to[0] + 0.01, to[1]);
  pen.stroke();
  pen.globalCompositeOperation = 'source-over';
  last = to;
};
canvas.addEventListener('pointerdown', (event) => {
  if (!value().picture || event.button > 0) return;
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  last = at(event);
  stroke(last);
});
canvas.addEventListener('pointermove', (event) => { if (last) stroke(at(event)); });
for (const end of ['pointerup', 'pointercancel']) {
  canvas.addEventListener(end, () => { if (last) { last = null; send(); } });
}
const mode = (erases) => {
  erasing = erases;
  find('.paint').setAttribute('aria-pressed', !erases);
  find('.erase').setAttribute('aria-pressed', erases);
};
find('.paint').addEventListener('click', () => mode(false));
find('.erase').addEventListener('click', () => mode(true));
find('.clear').addEventListener('click', () => { wipe(); send(); });
find('.invert').addEventListener('click', () => {
  if (!value().picture) return;
  pen.globalCompositeOperation = 'xor';
  pen.fillStyle = COLOUR;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.globalCompositeOperation = 'source-over';
  send();
});
find('.add').addEventListener('click', () => {
  if (!value().picture) return;
  const number = (side) => Math.round(Number(find(`[data-side=${side}]`).value)) || 0;
  pen.fillStyle = COLOUR;
  pen.fillRect(number('left'), number('top'), number('width'), number('height'));
  send();
});
find('.load input').addEventListener('change', async (event) => {
  const [file] = event.target.files;
  event.target.value = '';
  if (!file || !value().picture) return;
  let image;
  try {
    image = await createImageBitmap(file);
  } catch {
    said.textContent = studioSay('{name} cannot be read as a mask: save it as PNG, or choose another.',
      {name: file.name});
    return;
  }
  const {width, height} = canvas;
  const off = Math.min(Math.abs(image.height * width / image.width - height) / Math.max(1, width / image.width),
    Math.abs(image.width * height / image.height - width) / Math.max(1, height / image.height));
  if (off > 1) {
    const [theirs, ours] = [`${image.width} x ${image.height}`, `${width} x ${height}`];
    said.textContent = studioSay('{name} has another shape ({theirs}) than the picture ({ours}): make it as large as '
      + 'the picture, or of the same aspect ratio.', {name: file.name, theirs, ours});
    return;
  }
  wipe();
  put(image);
  send();
});
follow();
watch('value', follow);
"""

MARGINS_HTML = """<div class="outpaint">
  <p class="said" data-i18n>Outpaint: the picture grows, and only what is new is drawn.</p>
  <div class="numbers">
    <label data-i18n>Left<input type="number" min="0" step="8" value="0" data-side="left"></label>
    <label data-i18n>Top<input type="number" min="0" step="8" value="0" data-side="top"></label>
    <label data-i18n>Right<input type="number" min="0" step="8" value="0" data-side="right"></label>
    <label data-i18n>Bottom<input type="number" min="0" step="8" value="0" data-side="bottom"></label>
    <label data-i18n>To the shape<select><option value="" data-i18n>Free</option>${props_shapes}</select></label>
  </div>
</div>"""

MARGINS_JS = """
const find = (selector) => element.querySelector(selector);
const SIDES = ['left', 'top', 'right', 'bottom'];
const box = (side) => find(`[data-side=${side}]`);
const shape = find('select'), said = find('.said');
let sent = '';
const tell = () => {
  const grows = SIDES.some((side) => props.value?.[side]);
  const {left = 0, top = 0, right = 0, bottom = 0, width = 0, height = 0} = props.value ?? {};
  said.textContent = grows
    ? studioSay('The picture grows to {width} x {height} pixels; what it shows now stays as it is.',
      {width: width + left + right, height: height + top + bottom})
    : studioSay('Outpaint: the picture grows, and only what is new is drawn.');
};
const send = () => {
  const value = Object.fromEntries(SIDES.map((side) => [side, Math.max(0, Math.round(Number(box(side).value)) || 0)]));
  const {width = 0, height = 0} = props.value ?? {};
  props.value = {...value, width, height};
  sent = JSON.stringify(props.value);
  tell();
  trigger('input');
};
const show = () => {
  if (JSON.stringify(props.value) !== sent) {
    for (const side of SIDES) box(side).value = props.value?.[side] ?? 0;
    shape.value = '';
    sent = JSON.stringify(props.value);
  }
  tell();
};
for (const side of SIDES) box(side).addEventListener('input', () => { shape.value = ''; send(); });
shape.addEventListener('change', () => {
  const [across, down] = shape.value.split(':').map(Number);
  const {width = 0, height = 0} = props.value ?? {};
  if (!down || !width) return;
  const wider = Math.max(0, Math.round(height * across / down) - width);
  const higher = wider ? 0 : Math.max(0, Math.round(width * down / across) - height);
  box('left').value = Math.floor(wider / 2);
  box('right').value = Math.ceil(wider / 2);
  box('top').value = Math.floor(higher / 2);
  box('bottom').value = Math.ceil(higher / 2);
  send();
});
show();
watch('value', show);
"""


@dataclass(frozen=True, kw_only=True)
class MaskSubject:
    """The picture that a form edits. width, height: of the result. subject: an id that no other picture has."""

    picture: str  # a data: URL
    width: int
    height: int
    subject: str


def build_mask_panel() -> tuple[dict[str, Any], gr.Accordion]:
    """Build the panel. Returns its fields of a request, and the accordion around them."""
    shapes = "".join(f"<option>{shape}</option>" for shape in fields.ASPECTS)
    with gr.Accordion(i18n(MASK_PANEL_TITLE), open=False, elem_classes=["edits", "extra"]) as folded:
        found = {
            "mask": gr.HTML(
                _board(None), html_template=MASK_BOARD_HTML, js_on_load=MASK_BOARD_JS, elem_classes="mask-board"
            ),
            "outpaint": gr.HTML(
                _margins(None),
                html_template=MARGINS_HTML.replace("${props_shapes}", shapes),
                js_on_load=MARGINS_JS,
                elem_classes="margins",
            ),
            "match_colours": gr.Checkbox(
                False,
                label=i18n("Match colours"),
                info=i18n("The result gets the colours of image 1 on the whole; with a mask, by what lies outside."),
                elem_classes=["mark", "match-colours"],
            ),
        }
    return found, folded


def make_mask_subject(reference: LoadedReference, size: tuple[int, int]) -> MaskSubject:
    """Make the subject from the first reference. size: (width, height) of the result."""
    small = reference.image.copy()
    small.thumbnail((BOARD_SIDE_PIXELS, BOARD_SIDE_PIXELS))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=85, method=0)
    data = file.getvalue()
    return MaskSubject(
        picture=f"data:image/webp;base64,{base64.b64encode(data).decode()}",
        width=size[0],
        height=size[1],
        subject=reference.sha256,
    )


def mask_panel_update(form_fields: Mapping[str, Any], subject: MaskSubject | None) -> dict[Any, Any]:
    """Show `subject` in the panel, if the form has one. The browser clears a mask that belongs to another subject."""
    if "mask" not in form_fields:
        return {}
    return {form_fields["mask"]: _board(subject), form_fields["outpaint"]: _margins(subject)}


def restore_mask_panel(
    form_fields: Mapping[str, Any],
    subject: MaskSubject | None,
    mask: Image.Image | None,
    outpaint: Outpaint,
    *,
    match_colours: bool,
) -> dict[Any, Any]:
    """Restore the settings of a saved picture. mask: mode L, of the subject's size."""
    if "mask" not in form_fields:
        return {}
    value = ""
    if mask is not None:
        file = io.BytesIO()
        mask.save(file, "PNG")
        value = PNG_DATA_PREFIX + base64.b64encode(file.getvalue()).decode()
    # A new id, so that the browser drops what was painted on this picture before.
    return {
        form_fields["mask"]: _board(replace(subject, subject=secrets.token_hex(8)) if subject else None, value),
        form_fields["outpaint"]: _margins(subject, outpaint),
        form_fields["match_colours"]: match_colours,
    }


def _board(subject: MaskSubject | None, mask: str = "") -> dict[str, Any]:
    return {"mask": mask, **(vars(subject) if subject else {})}


def _margins(subject: MaskSubject | None, outpaint: Outpaint | None = None) -> dict[str, int]:
    size = {"width": subject.width, "height": subject.height} if subject else {}
    return {**vars(outpaint or Outpaint()), **size}


def read_mask(value: object) -> Path | None:
    """Save a painted mask and return its file; None if there is no mask. Raises `RequestError` for invalid values."""
    painted = value.get("mask", "") if isinstance(value, dict) else value
    if painted in (None, ""):
        return None
    if not isinstance(painted, str) or not painted.startswith(PNG_DATA_PREFIX) or len(painted) > MAX_MASK_CHARS:
        raise RequestError("The mask did not arrive as it was painted: clear it and paint it again.")
    try:
        data = base64.b64decode(painted.removeprefix(PNG_DATA_PREFIX), validate=True)
    except binascii.Error as error:
        raise RequestError("The mask did not arrive as it was painted: clear it and paint it again.") from error
    # Beside the uploads, and deleted with them.
    folder = Path(get_upload_folder()) / "masks"
    target = folder / f"{hash_bytes(data)}.png"
    if target.is_file():  # Live sends the same mask with every key
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as file:
            file.write(data)
    except OSError as error:
        raise RequestError(
            f"The mask cannot be kept on this machine ({error.strerror or error}): free some space there and try again."
        ) from error
    return target


def read_outpaint(value: object) -> Outpaint:
    """The margins as a request takes them. Raises `RequestError` for what the page never sends."""
    if value is None:
        return Outpaint()
    if not isinstance(value, dict):
        raise RequestError("Outpainting takes a number of pixels for each side: type them again.")
    return Outpaint(**{side: value.get(side, 0) for side in MARGIN_SIDES})
