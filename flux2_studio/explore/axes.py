"""Axes of a grid: a field of `Request`, and its values as users type them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import RequestError
from flux2_studio.explore.variants import MAX_CELLS, Wildcards, expand_prompt
from flux2_studio.request import MAX_SEED, LoraChoice, Request

LORA_PREFIX = "lora:"  # followed by a LoRA's name: its weight varies
# Field -> (name for users, example of its values).
AXIS_FIELDS: Mapping[str, tuple[str, str]] = {
    "seed": ("Seed", "1, 2, 3 or 1..8"),
    "prompt": ("Prompt", "A prompt a line; {a|b} and __lists__ count"),
    "words": ("Prompt words", "Words of the prompt, then what takes their place: red, green, blue"),
    "negative_prompt": ("Negative prompt", "One a line"),
    "steps": ("Steps", "4, 8 or 10..50 by 10"),
    "guidance": ("Guidance", "1.5, 4 or 1..5 by 0.5"),
    "size": ("Size", "1024x1024, 1360x768"),
    "checkpoint": ("Checkpoint", "Their names, as klein-4b, dev"),
}
_RANGE = re.compile(r"(-?[\d.]+)\s*\.\.\s*(-?[\d.]+?)(?:\s*(?:by|step)\s*([\d.]+))?")


@dataclass(frozen=True, kw_only=True)
class AxisValue:
    """One value: its label on the sheet, and a function that sets it in a request."""

    label: str
    apply: Callable[[Request], Request]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One side of a grid; `title` is the field's name for users."""

    title: str
    values: tuple[AxisValue, ...]


# A side along which nothing varies.
UNVARIED_AXIS = Axis(title="", values=(AxisValue(label="", apply=lambda request: request),))


def read_axis(field: str, text: str, checkpoints: Sequence[Checkpoint], wildcards: Wildcards) -> Axis:
    """Return the axis over `field` (of `AXIS_FIELDS`, or "lora:NAME") with the values in `text`, or raise
    `RequestError`."""
    title = AXIS_FIELDS[field][0] if field in AXIS_FIELDS else field.removeprefix(LORA_PREFIX)
    if not text.strip():
        raise RequestError(f"{title}: write its values, or choose Nothing.")
    values = tuple(_parse_values(field, text, checkpoints, wildcards))
    labels = [value.label for value in values]
    if duplicate := next((label for label in labels if labels.count(label) > 1), None):
        raise RequestError(f"{title}: {duplicate!r} is there twice; leave one of them.")
    if len(values) > MAX_CELLS:
        raise RequestError(f"{title}: {len(values)} values are too many; {MAX_CELLS} pictures at most are made.")
    return Axis(title=title, values=values)


def prompt_axis(texts: Sequence[str]) -> Axis:
    """Return an axis of complete prompts."""
    return Axis(title="Prompt", values=tuple(AxisValue(label=text, apply=_setter(prompt=text)) for text in texts))


def _parse_values(field: str, text: str, checkpoints: Sequence[Checkpoint], wildcards: Wildcards) -> list[AxisValue]:
    if field == "prompt":
        prompts = [prompt for line in _non_blank_lines(text) for prompt in expand_prompt(line, wildcards)]
        return list(prompt_axis(prompts).values)
    if field == "negative_prompt":
        return [AxisValue(label=line, apply=_setter(negative_prompt=line)) for line in _non_blank_lines(text)]
    if field == "words":
        return _word_values([part.strip() for part in text.split(",")])
    if field == "checkpoint":
        known = {it.name: it for it in checkpoints} | {it.label: it for it in checkpoints}
        values = []
        for name in (part.strip() for part in re.split(r"[,\n]", text) if part.strip()):
            if name not in known:
                raise RequestError(f"There is no checkpoint called {name[:100]!r}. Choose of: {', '.join(known)}.")
            # None: every checkpoint uses its own defaults.
            apply = _setter(checkpoint=known[name].name, steps=None, guidance=None)
            values.append(AxisValue(label=known[name].label, apply=apply))
        return values
    if field == "size":
        return [_parse_size(part) for part in re.split(r"[,\n;]", text) if part.strip()]
    if field.startswith(LORA_PREFIX):
        return [_lora_weight_value(field.removeprefix(LORA_PREFIX), number) for number in _parse_numbers(field, text)]
    if field == "guidance":
        return [
            AxisValue(label=f"{number:g}", apply=_setter(guidance=number)) for number in _parse_numbers(field, text)
        ]
    if field in ("seed", "steps"):
        numbers = _parse_numbers(field, text)
        if any(number != int(number) or not 0 <= number <= MAX_SEED for number in numbers):
            raise RequestError(f"{AXIS_FIELDS[field][0]}: write whole numbers from 0 on.")
        return [AxisValue(label=f"{int(number)}", apply=_setter(**{field: int(number)})) for number in numbers]
    raise RequestError(f"{field[:100]!r} cannot vary: choose one of the list.")


def _setter(**changes: object) -> Callable[[Request], Request]:
    return lambda request: replace(request, **changes)  # type: ignore[arg-type]


def _non_blank_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _word_values(parts: Sequence[str]) -> list[AxisValue]:
    if len(parts) < 2 or not parts[0]:
        raise RequestError("Prompt words: write at least two, the first of which the prompt has.")
    first = parts[0]

    def swap(new: str) -> Callable[[Request], Request]:
        def apply(request: Request) -> Request:
            if first not in request.prompt:
                raise RequestError(f"The prompt has no {first!r} that could be replaced: write it there first.")
            return replace(request, prompt=request.prompt.replace(first, new))

        return apply

    return [AxisValue(label=new or "(nothing)", apply=swap(new)) for new in parts]


def _parse_size(text: str) -> AxisValue:
    match = re.fullmatch(r"\s*(\d{2,5})\s*[x\u00d7*]\s*(\d{2,5})\s*", text)
    if match is None:
        raise RequestError(f"Size: {text.strip()[:50]!r} is none; write it as 1024x768.")
    width, height = map(int, match.groups())
    return AxisValue(label=f"{width} x {height}", apply=_setter(width=width, height=height))


def _lora_weight_value(name: str, weight: float) -> AxisValue:
    def apply(request: Request) -> Request:
        others = tuple(choice for choice in request.loras if choice.name != name)
        # Keep its position, because the order of LoRAs may matter.
        position = next((i for i, choice in enumerate(request.loras) if choice.name == name), len(others))
        chosen = LoraChoice(name=name, weight=weight)
        return replace(request, loras=(*others[:position], chosen, *others[position:]))

    return AxisValue(label=f"{weight:g}", apply=apply)


def _parse_numbers(field: str, text: str) -> list[float]:
    """Parse a list of numbers and ranges such as `1, 2, 5..9 by 2`. Raises `RequestError`."""
    title = AXIS_FIELDS[field][0] if field in AXIS_FIELDS else field.removeprefix(LORA_PREFIX)
    numbers: list[float] = []
    for part in (part.strip() for part in re.split(r"[,\n;]", text) if part.strip()):
        try:
            if match := _RANGE.fullmatch(part):
                first, last, step = float(match[1]), float(match[2]), float(match[3] or 1)
                if step <= 0 or not math.isfinite((last - first) / step):
                    raise ValueError
                count = int(abs(last - first) / step + 1e-9) + 1
                if count > MAX_CELLS:
                    raise RequestError(f"{title}: {part!r} are {count} values, and {MAX_CELLS} is the most.")
                sign = 1 if last >= first else -1
                numbers += [round(first + sign * step * i, 6) for i in range(count)]
            else:
                number = float(part)
                if not math.isfinite(number):
                    raise ValueError
                numbers.append(number)
        except ValueError as error:
            raise RequestError(f"{title}: {part[:50]!r} is no number; write it as 1, 2, 5 or 1..9 by 2.") from error
    return numbers
