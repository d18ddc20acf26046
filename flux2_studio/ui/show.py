"""A run's events in words and pictures: HTML for the page, with nothing that listens and nothing that is stored.

Every text that may come from a user or a file is escaped here.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.events import Preview, Queued, Result, Status, Upsampled
from flux2_studio.request import Request

ADDRESS = re.compile(r"(https?://[^\s,;()<>\"']*[^\s,;:.()<>\"'])")  # a comma or full stop behind it is the sentence's
SHEET = 1024  # pixels along a side of the contact sheet; a preview need not be larger than the screen shows it


def problem(text: str) -> str:
    """A sentence that says what is wrong; the pages that it names can be opened."""
    pieces = ADDRESS.split(text)
    linked = [
        f'<a href="{escape(piece)}" target="_blank" rel="noopener">{escape(piece)}</a>' if number % 2 else escape(piece)
        for number, piece in enumerate(pieces)
    ]
    return f'<div class="problem" role="alert">{"".join(linked)}</div>'


def notes(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def notices(texts: Sequence[str]) -> str:
    if not texts:
        return ""
    return f'<div role="status"><ul>{"".join(f"<li>{escape(text)}</li>" for text in texts)}</ul></div>'


def queued(event: Queued) -> str:
    runs = "1 run" if event.ahead == 1 else f"{event.ahead} runs"
    return _bar(f"Waiting: {runs} before yours", None)


def status(event: Status) -> str:
    return _bar(event.text, event.fraction)


def step(event: Preview) -> str:
    """ "Step 2 of 4", with the pictures it belongs to where a run goes in batches, and the time left."""
    text = f"Step {event.step} of {event.steps}"
    drawn = max(1, len(event.images))
    if event.count > drawn:
        last = event.first + drawn
        which = f"Picture {last}" if drawn == 1 else f"Pictures {event.first + 1}-{last}"
        text = f"{which} of {event.count} · {text}"
    if event.seconds_left is not None and event.seconds_left >= 0.5:
        text += f" · {duration(event.seconds_left)} left"
    return _bar(text, (event.first + drawn * event.step / event.steps) / event.count)


def done(event: Result) -> str:
    pictures = "1 picture" if len(event.images) == 1 else f"{len(event.images)} pictures"
    return _bar(f"{pictures} in {duration(event.seconds)}", 1.0)


def stopped(finished: int) -> str:
    if not finished:
        return _bar("Stopped before a picture was finished.", 0.0)
    pictures = "1 finished picture was" if finished == 1 else f"{finished} finished pictures were"
    return _bar(f"Stopped. {pictures} kept.", 0.0)


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{max(0.1, seconds):.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _bar(text: str, fraction: float | None) -> str:
    value = "" if fraction is None else f' value="{min(1.0, max(0.0, fraction)):.3f}"'
    return f'<p role="status" aria-live="polite">{escape(text)}</p><progress max="1"{value}></progress>'


def picture(images: Mapping[int, Image.Image], count: int) -> str:
    """One <img> of all pictures of the run so far, by their index; carried in the page, so nothing is stored."""
    sheet = contact_sheet(images, count)
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=82, method=0)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="Preview of the picture as it forms" src="data:image/webp;base64,{data}">'


def columns(count: int) -> int:
    """How many of `count` pictures stand side by side, in the previews as in the result."""
    return math.ceil(math.sqrt(count))


def contact_sheet(images: Mapping[int, Image.Image], count: int) -> Image.Image:
    """`images` in a square-ish grid with room for `count`, each scaled down so that the sheet fits SHEET."""
    first = next(iter(images.values()))  # all are of one size
    across = columns(count)
    down = math.ceil(count / across)
    gap = 0 if count == 1 else max(2, first.width // 64)
    scale = min(1.0, SHEET / (across * first.width), SHEET / (down * first.height))
    tile = (max(1, round(first.width * scale)), max(1, round(first.height * scale)))
    size = (across * tile[0] + (across - 1) * gap, down * tile[1] + (down - 1) * gap)
    sheet = Image.new("RGBA", size)
    for index, image in images.items():
        row, column = divmod(index, across)
        drawn = image if image.size == tile else image.resize(tile, Image.Resampling.BILINEAR)
        sheet.paste(drawn, (column * (tile[0] + gap), row * (tile[1] + gap)))
    return sheet


def settings(request: Request, seeds: Sequence[int], checkpoint: Checkpoint, upsampled: Upsampled | None = None) -> str:
    """What was run, as a table. upsampled: how the prompt came about, where a language model wrote it."""
    rows = [
        ("Prompt", request.prompt),
        ("Original prompt", upsampled.original if upsampled else ""),
        ("Enriched by", upsampled.by if upsampled else ""),
        ("Negative prompt", request.negative_prompt or ""),
        ("Checkpoint", checkpoint.label),
        ("References", ", ".join(path.name for path in request.references)),
        ("Mask", request.mask.name if request.mask else ""),
        ("Outpainted by", ", ".join(f"{by} on the {side}" for side, by in vars(request.outpaint).items() if by)),
        ("Colours", "matched to image 1" if request.match_colours else ""),
        ("LoRAs", ", ".join(f"{lora.name} ({lora.weight:g})" for lora in request.loras)),
        ("Size", f"{request.width} x {request.height}"),
        ("Seed" if len(seeds) == 1 else "Seeds", ", ".join(map(str, seeds))),
        ("Steps", f"{request.steps}"),
        ("Guidance", f"{request.guidance:g}"),
    ]
    body = "".join(f"<tr><th scope='row'>{name}</th><td>{escape(value)}</td></tr>" for name, value in rows if value)
    return f"<table>{body}</table>"


def provenance(sentences: Sequence[str] | None) -> str:
    """What a picture carries, so that others can tell where it comes from; "" where that was not told."""
    if sentences is None:
        return ""
    if not sentences:
        return '<p class="carries">The files say nothing of how they were made.</p>'
    return f'<ul class="carries">{"".join(f"<li>{escape(text)}</li>" for text in sentences)}</ul>'


def settings_json(request: Request) -> str:
    """The same as JSON, with references by name: where the server keeps them is nobody's business."""
    fields = request.as_dict()
    fields["references"] = [path.name for path in request.references]
    fields["mask"] = request.mask.name if request.mask else None
    return json.dumps(fields, indent=2, ensure_ascii=False)
