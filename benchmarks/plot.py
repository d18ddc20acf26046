"""Draws what `benchmarks.core` measured: time against size and against references, with the floor below.

    make plot [ARGS="benchmarks/results/core-klein-4b-cuda.json"]

Each report becomes a figure beside it, core-SIZE-DEVICE.svg: ours, theirs and the floor, a panel for each thing that
was timed at several sizes, or with several numbers of references. Sides and times are on logarithmic axes, where a
power law is a straight line; references are counted on even ones, from zero. SVG is written as text: lines and words
need no library.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.decoder_arms import DECODING
from benchmarks.measuring import RESULTS
from benchmarks.transformer_arms import EVALUATION, PICTURE, STEPS, Case

FLOOR = "floor"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c510a", "#000000")
WIDTH, HEIGHT = 420, 340  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 34, 50  # around its axes
HEAD, LINE = 56, 20  # above the legend; of one line in it
COLUMNS = 2
NAMED = 210  # pixels of one name in the legend

Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """lines: (x, seconds) by name. power: whether both axes are logarithmic; else both are even and begin at zero."""

    title: str
    along: str
    lines: Mapping[str, Points]
    power: bool


@dataclass(frozen=True)
class Axis:
    """Values to pixels."""

    values: tuple[float, float]
    pixels: tuple[float, float]
    power: bool

    def __call__(self, value: float) -> float:
        (low, high), (start, stop) = self.values, self.pixels
        if self.power:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return start + (stop - start) * (value - low) / (high - low)


def panels(report: Mapping[str, Any]) -> list[Panel]:
    """What there is to draw in a report of `benchmarks.core`."""
    cases = {Case.named(name): figures for name, figures in report.get("cases", {}).items()}
    plain = {case.side: figures for case, figures in cases.items() if not case.references}
    found = []
    for what, evaluations, title in ((EVALUATION, 1, "One evaluation"), (PICTURE, STEPS, f"{STEPS} steps")):

        def arms(figures: Mapping[str, Any], what: str = what, evaluations: int = evaluations) -> dict[str, float]:
            return _arms(figures, what, evaluations * figures["floor of an evaluation"])

        lines = _lines({side: arms(figures) for side, figures in plain.items()})
        found.append(Panel(title=f"{title}, no references", along="pixels of a side", lines=lines, power=True))
        for side in sorted({case.side for case in cases if case.references}):
            counts = {case.references: figures for case, figures in cases.items() if case.side == side}
            lines = _lines({count: arms(figures) for count, figures in counts.items()})
            found.append(Panel(title=f"{title}, {side} x {side}", along="references", lines=lines, power=False))
    sides = {Case.named(name).side: figures for name, figures in report.get("decoder", {}).items()}
    lines = _lines({side: _arms(figures, DECODING, figures["floor"]) for side, figures in sides.items()})
    found.append(Panel(title="Decoding", along="pixels of a side", lines=lines, power=True))
    return [panel for panel in found if panel.lines]


def _arms(figures: Mapping[str, Any], what: str, floor: float) -> dict[str, float]:
    """Median seconds by arm, and the floor's; nothing where `what` was not timed."""
    found = {name: arm["median"] for name, arm in figures["seconds"].get(what, {}).items()}
    return {**found, FLOOR: floor} if found else {}


def _lines(points: Mapping[int, Mapping[str, float]]) -> dict[str, Points]:
    lines: dict[str, Points] = {}
    for x in sorted(points):
        for name, seconds in points[x].items():
            lines.setdefault(name, []).append((x, seconds))
    return lines


# --- SVG ---


def figure(report: Mapping[str, Any]) -> str:
    """All panels of `report`, under what it was measured on."""
    drawn = panels(report)
    names = list(dict.fromkeys(name for panel in drawn for name in panel.lines if name != FLOOR))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    columns = min(COLUMNS, len(drawn))
    width = max(columns, 1) * WIDTH
    each_row = width // NAMED
    top = HEAD + LINE * math.ceil((len(names) + 1) / each_row)
    height = top + HEIGHT * math.ceil(len(drawn) / COLUMNS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(20, 26, "{size}, {} + {} blocks".format(*report["blocks"], **report), size=17),
        _text(20, 44, _machine(report["machine"]), size=11),
    ]
    for number, name in enumerate([*names, FLOOR]):
        x, y = 20 + NAMED * (number % each_row), HEAD + LINE * (number // each_row) + 8
        parts += [_path([(x, y), (x + 24, y)], name, colours), _text(x + 30, y + 4, name)]
    for number, panel in enumerate(drawn):
        parts += _panel(panel, WIDTH * (number % COLUMNS), top + HEIGHT * (number // COLUMNS), colours)
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, left: float, top: float, colours: Mapping[str, str]) -> list[str]:
    xs = sorted({x for points in panel.lines.values() for x, _ in points})
    ys = [y for points in panel.lines.values() for _, y in points]
    wide, high = (left + LEFT, left + WIDTH - RIGHT), (top + HEIGHT - BOTTOM, top + TOP)
    across = Axis((xs[0] / 1.3, xs[-1] * 1.3) if panel.power else (-0.15, xs[-1] + 0.15), wide, panel.power)
    up = Axis((min(ys) / 1.3, max(ys) * 1.3) if panel.power else (0.0, max(ys) * 1.1), high, panel.power)
    parts = [
        _text((wide[0] + wide[1]) / 2, top + 20, panel.title, anchor="middle", size=14),
        _text((wide[0] + wide[1]) / 2, high[0] + 38, panel.along, anchor="middle"),
    ]
    for value in _ticks(*up.values, power=panel.power):
        parts.append(f'<path d="M{wide[0]:.1f} {up(value):.1f}H{wide[1]:.1f}" stroke="#ddd"/>')
        parts.append(_text(wide[0] - 8, up(value) + 4, _seconds(value), anchor="end"))
    for value in xs:
        parts.append(f'<path d="M{across(value):.1f} {high[0]:.1f}v5" stroke="#222"/>')
        parts.append(_text(across(value), high[0] + 19, f"{value:g}", anchor="middle"))
    parts.append(f'<path d="M{wide[0]:.1f} {high[1]:.1f}V{high[0]:.1f}H{wide[1]:.1f}" fill="none" stroke="#222"/>')
    for name, points in panel.lines.items():
        places = [(across(x), up(y)) for x, y in points]
        parts.append(_path(places, name, colours))
        if name != FLOOR or len(places) == 1:
            colour = colours.get(name, "#777")
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
    return parts


def _ticks(low: float, high: float, *, power: bool) -> list[float]:
    """Round numbers between `low` and `high`: some of 1, 2 and 5 times powers of ten, or multiples of one of them."""
    steps = [digit * 10.0**decade for decade in range(-7, 5) for digit in (1, 2, 5)]
    if power:
        return [step for step in steps if low <= step <= high]
    step = next(step for step in steps if (high - low) / step <= 6)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _seconds(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _path(places: Iterable[tuple[float, float]], name: str, colours: Mapping[str, str]) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    look = 'stroke="#777" stroke-dasharray="5 4"' if name == FLOOR else f'stroke="{colours[name]}"'
    return f'<polyline points="{points}" fill="none" stroke-width="2" {look}/>'


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'


def _machine(told: Mapping[str, Any]) -> str:
    where = told.get("gpu") or f"{told['system']}, {told['torch threads']} threads"
    packages = ", ".join(f"{name} {told[name]}" for name in ("torch", "diffusers") if told.get(name))
    return f"{where}; {packages}; {told['date']}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.plot", description="Draw what benchmarks.core measured.")
    parser.add_argument("files", type=Path, nargs="*", help="its reports (default: all in benchmarks/results)")
    for file in parser.parse_args(arguments).files or sorted(RESULTS.glob("core-*.json")):
        report = json.loads(file.read_text("utf-8"))
        if not panels(report):
            print(f"{file}: nothing to draw")
            continue
        drawn = file.with_suffix(".svg")
        drawn.write_text(figure(report), encoding="utf-8")
        print(f"written to {drawn}")


if __name__ == "__main__":
    main()
