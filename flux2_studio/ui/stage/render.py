"""HTML for the events of a run. Nothing here handles events or stores anything.

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
from typing import TYPE_CHECKING

from PIL import Image

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.events import Drafted, Preview, PromptEnhanced, Queued, Result, Status
from flux2_studio.request import Request
from flux2_studio.ui.gradio_compat.language import translate, translate_message

if TYPE_CHECKING:
    from flux2_studio.stages.estimates import RunEstimate

# A comma or full stop after a URL belongs to the sentence.
URL_PATTERN = re.compile(r"(https?://[^\s,;()<>\"']*[^\s,;:.()<>\"'])")
PREVIEW_SHEET_PIXELS = 1024  # maximum side of a preview sheet; larger is not visible on the screen


def problem(text: str) -> str:
    """An error message whose URLs are links."""
    pieces = URL_PATTERN.split(translate_message(text))
    linked = [
        f'<a href="{escape(piece)}" target="_blank" rel="noopener">{escape(piece)}</a>' if number % 2 else escape(piece)
        for number, piece in enumerate(pieces)
    ]
    return f'<div class="problem" role="alert">{"".join(linked)}</div>'


def notes(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(translate_message(text))}</p>" for text in texts)


def notices(texts: Sequence[str]) -> str:
    if not texts:
        return ""
    return (
        f'<div role="status"><ul>{"".join(f"<li>{escape(translate_message(text))}</li>" for text in texts)}</ul></div>'
    )


def queued(event: Queued) -> str:
    if event.runs_ahead == 1:
        return _bar(translate("Waiting: 1 run before yours"), None)
    return _bar(translate("Waiting: {ahead} runs before yours", ahead=event.runs_ahead), None)


def status(event: Status) -> str:
    return _bar(translate_message(event.text), event.fraction)


def step(event: Preview) -> str:
    """Progress like "Step 2 of 4", with the pictures of the current batch, if not all, and the time left."""
    text = translate("Step {step} of {steps}", step=event.step, steps=event.steps)
    batch_size = max(1, len(event.images))
    if event.count > batch_size:
        last = event.first_index + batch_size
        if batch_size == 1:
            batch_text = translate("Picture {number} of {count}", number=last, count=event.count)
        else:
            batch_text = translate(
                "Pictures {first}-{last} of {count}", first=event.first_index + 1, last=last, count=event.count
            )
        text = f"{batch_text} · {text}"
    if event.seconds_left is not None and event.seconds_left >= 0.5:
        text += f" · {time_left(event.seconds_left)}"
    return _bar(text, (event.first_index + batch_size * event.step / event.steps) / event.count)


def run_estimate(estimate: RunEstimate, *, enhanced: bool) -> str:
    """What a run will take. enhanced: a prompt enhancement of unknown duration comes first."""
    size = translate("{tokens} image tokens", tokens=f"{estimate.tokens:,}")
    if ref_tokens := sum(estimate.reference_tokens):
        count, tokens = len(estimate.reference_tokens), f"{ref_tokens:,}"
        of_one = translate("{tokens} of the reference", tokens=tokens)
        size += (
            f" + {of_one if count == 1 else translate('{tokens} of {count} references', tokens=tokens, count=count)}"
        )
    steps = translate("1 step") if estimate.steps == 1 else translate("{count} steps", count=estimate.steps)
    steps += translate(", each computed for two prompts") if estimate.use_cfg else ""
    pictures = (
        translate("1 picture") if estimate.pictures == 1 else translate("{count} pictures", count=estimate.pictures)
    )
    if estimate.seconds is None:
        duration = translate("The first run will tell how long it takes.")
    else:
        duration = translate("About {duration}, as runs on this machine go.", duration=duration_text(estimate.seconds))
    preparations = [] if estimate.is_on_disk else [translate("the download")]
    preparations += [] if estimate.is_loaded else [translate("loading the checkpoint")]
    preparations += [translate("enhancing the prompt")] if enhanced else []
    if preparations:
        duration += " " + translate("Before that: {what}.", what=", ".join(preparations))
    facts = f'<p class="pace">{escape(f"{size} · {steps} · {pictures}")}<br>{escape(duration)}</p>'
    return notes([translate_message(estimate.memory_fit)] if estimate.memory_fit else []) + facts


def done(event: Result) -> str:
    took = duration_text(event.seconds)
    if len(event.images) == 1:
        return _bar(translate("1 picture in {duration}", duration=took), 1.0)
    return _bar(translate("{count} pictures in {duration}", count=len(event.images), duration=took), 1.0)


def drafted(event: Drafted) -> str:
    return _bar(translate("Live: {duration} · not saved", duration=duration_text(event.seconds)), 1.0)


def hint(text: str) -> str:
    """What the user has to do before there is something to show."""
    return _bar(text, 0.0)


def stopped(finished: int) -> str:
    if not finished:
        return _bar(translate("Stopped before a picture was finished."), 0.0)
    if finished == 1:
        return _bar(translate("Stopped. 1 finished picture was kept."), 0.0)
    return _bar(translate("Stopped. {count} finished pictures were kept.", count=finished), 0.0)


def time_left(seconds: float) -> str:
    return translate("{duration} left", duration=duration_text(seconds))


def kept_previews(count: int, step: int, steps: int) -> str:
    position = {"step": step, "steps": steps}
    if count == 1:
        text = translate("Kept an unfinished preview, after step {step} of {steps}.", **position)
    else:
        text = translate("Kept {count} unfinished previews, after step {step} of {steps}.", count=count, **position)
    return _bar(text, step / steps if steps else 0.0)


def duration_text(seconds: float) -> str:
    if seconds < 10:
        return translate("{seconds} s", seconds=f"{max(0.1, seconds):.1f}")
    if seconds < 60:
        return translate("{seconds} s", seconds=f"{seconds:.0f}")
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return translate("{minutes} min {seconds} s", minutes=minutes, seconds=rest)
    return translate("{hours} h {minutes} min", hours=minutes // 60, minutes=minutes % 60)


def _bar(text: str, fraction: float | None) -> str:
    value = "" if fraction is None else f' value="{min(1.0, max(0.0, fraction)):.3f}"'
    return f'<p role="status" aria-live="polite">{escape(text)}</p><progress max="1"{value}></progress>'


def picture(images: Mapping[int, Image.Image], count: int) -> str:
    """One <img> of all pictures of the run so far, by their index."""
    return _img(preview_sheet(images, count), translate("Preview of the picture as it forms"))


def draft(image: Image.Image, prompt: str) -> str:
    return _img(preview_sheet({0: image}, 1), translate("Live picture: {prompt}", prompt=prompt))


def _img(image: Image.Image, alt: str) -> str:
    """`image` as a data URL, so that nothing is stored."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=82, method=0)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/webp;base64,{data}">'


def columns(count: int) -> int:
    """Number of columns for `count` pictures, in previews and in the result."""
    return math.ceil(math.sqrt(count))


def preview_sheet(images: Mapping[int, Image.Image], count: int) -> Image.Image:
    """`images` in a roughly square grid for `count` pictures, scaled down to at most `PREVIEW_SHEET_PIXELS` a side."""
    first = next(iter(images.values()))  # all have the same size
    across = columns(count)
    down = math.ceil(count / across)
    gap = 0 if count == 1 else max(2, first.width // 64)
    scale = min(1.0, PREVIEW_SHEET_PIXELS / (across * first.width), PREVIEW_SHEET_PIXELS / (down * first.height))
    tile = (max(1, round(first.width * scale)), max(1, round(first.height * scale)))
    size = (across * tile[0] + (across - 1) * gap, down * tile[1] + (down - 1) * gap)
    sheet = Image.new("RGBA", size)
    for index, image in images.items():
        row, column = divmod(index, across)
        scaled = image if image.size == tile else image.resize(tile, Image.Resampling.BILINEAR)
        sheet.paste(scaled, (column * (tile[0] + gap), row * (tile[1] + gap)))
    return sheet


def settings(
    request: Request, seeds: Sequence[int], checkpoint: Checkpoint, upsampled: PromptEnhanced | None = None
) -> str:
    """The settings of a run as a table. upsampled: the prompt enhancement, if there was one."""
    rows = [
        ("Prompt", request.prompt),
        ("Original prompt", upsampled.original if upsampled else ""),
        ("Enhanced by", upsampled.by if upsampled else ""),
        ("Negative prompt", request.negative_prompt or ""),
        ("Checkpoint", translate_message(checkpoint.label)),
        ("References", ", ".join(path.name for path in request.references)),
        ("Mask", request.mask.name if request.mask else ""),
        (
            "Outpainted by",
            ", ".join(
                translate("{pixels} on the {side}", pixels=by, side=translate(side))
                for side, by in vars(request.outpaint).items()
                if by
            ),
        ),
        ("Colours", translate("matched to image 1") if request.match_colours else ""),
        ("LoRAs", ", ".join(f"{lora.name} ({lora.weight:g})" for lora in request.loras)),
        ("Size", f"{request.width} x {request.height}"),
        ("Seed" if len(seeds) == 1 else "Seeds", ", ".join(map(str, seeds))),
        ("Steps", f"{request.steps}"),
        ("Guidance", f"{request.guidance:g}"),
    ]
    body = "".join(
        f"<tr><th scope='row'>{escape(translate_message(name))}</th><td>{escape(value)}</td></tr>"
        for name, value in rows
        if value
    )
    return f"<table>{body}</table>"


def provenance(sentences: Sequence[str] | None) -> str:
    """The provenance marks of the files; "" if unknown (None)."""
    if sentences is None:
        return ""
    if not sentences:
        return '<p class="carries" data-i18n>The files say nothing of how they were made.</p>'
    return f'<ul class="carries">{"".join(f"<li>{escape(translate_message(text))}</li>" for text in sentences)}</ul>'


def settings_json(request: Request) -> str:
    """The settings as JSON. References have only their file names: server paths are private."""
    fields = request.as_dict()
    fields["references"] = [path.name for path in request.references]
    fields["mask"] = request.mask.name if request.mask else None
    return json.dumps(fields, indent=2, ensure_ascii=False)
