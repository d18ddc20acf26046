"""Verdicts in figures: rates with their intervals, the goals, the table for a reader, the model card's section."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
NORMAL_95 = 1.959964  # quantile of the normal distribution for a two-sided 95 %


def interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, which unlike the textbook's is right for few samples and near 0 and 1."""
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} of {n} is no share")
    share, z2 = hits / n, NORMAL_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = NORMAL_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def tally(verdicts: Sequence[Mapping[str, bool]], references: int | None) -> dict[str, Any]:
    """What is told of one kind: n, and each check's rate with its interval. references: how many it takes, or None."""
    rates = {}
    for name in verdicts[0]:
        hits = sum(verdict[name] for verdict in verdicts)
        low, high = interval(hits, len(verdicts))
        rates[name] = {"rate": round(hits / len(verdicts), 4), "interval": [round(low, 4), round(high, 4)]}
    return {"n": len(verdicts), "references": references, "rates": rates}


def mean_rate(judged: Mapping[str, Any], references: int) -> float | None:
    """The mean rate of "all" over the kinds with so many references, each counting the same; None if there is none."""
    values = [row["rates"]["all"]["rate"] for row in judged.values() if row["references"] == references]
    return sum(values) / len(values) if values else None


def goals(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, what was measured (None: not measured this time), and whether it was reached."""
    nano = report["models"].get("nano")
    judged = nano["kinds"] if nano else {}
    single = judged["single"]["rates"] if "single" in judged else {}

    def alone(check: str) -> float | None:
        return single[check]["rate"] if single else None

    paired = report["paired"]
    gap = 100 * (paired["nano-base"] - paired["nano"]) if paired else None
    slowest = max(nano["seconds"].values()) if nano else None
    rows: list[tuple[str, float | None, float, str]] = [
        ("subject among the first five", alone("subject"), 0.90, "at least"),
        ("style", alone("style"), 0.95, "at least"),
        ("background colour", alone("background"), 0.95, "at least"),
        ("edits: all checks of their kind, mean of the kinds taught", mean_rate(judged, 1), 0.90, "at least"),
        ("two references: all checks of their kind, mean of the kinds taught", mean_rate(judged, 2), 0.85, "at least"),
        ("points that 20 guided steps are better than 4", gap, 5.0, "at most"),
        ("seconds an image, warm (the slowest case)", slowest, 3.0, "at most"),
        ("pixels along a side", report["side"], 128, "at least"),
    ]
    return [
        {
            "goal": goal,
            "bound": f"{sense} {wanted:g}",
            "measured": None if measured is None else round(measured, 4),
            "reached": None if measured is None else measured >= wanted if sense == "at least" else measured <= wanted,
        }
        for goal, measured, wanted, sense in rows
    ]


def figures(report: Mapping[str, Any]) -> str:
    """The report as Markdown, for the model card and for the terminal."""
    machine, held_out = report["machine"], report["classifier"]["held out"]
    classes = report["classifier"]["classes"]
    trusted = ", ".join(f"{percent(row['top-5'])} ({style})" for style, row in held_out.items())
    styles = ", ".join(f"{percent(row['style'])} ({style})" for style, row in held_out.items() if "style" in row)
    counts = {name: sum(row["n"] for row in model["kinds"].values()) for name, model in report["models"].items()}
    drew = ", ".join(f"{name} drew {count} pictures" for name, count in counts.items())
    lines = [
        f"Measured on {machine['date']} by `python -m tools.nano.evaluate` ({machine['system']}, {machine['device']}, "
        f"{machine['cores']} cores, torch {machine['torch']}), on fresh samples of fixed seeds. Subjects and styles "
        f"are judged by a small classifier of {classes} subjects, trained on the real drawings only. On drawings "
        f"rendered anew (other places and backgrounds) its first five guesses hold the subject in {trusted} of cases; "
        f"the last is a redrawn copy of 3d that it was not trained on. It names the style in {styles}, so no figure "
        'for styles can be expected to be higher than what the true pictures reach at the end. "subject" means '
        "among those five; for drawings that the classifier does not know, and for turned ones, it means that the "
        "picture is nearer to its truth than to 19 other drawings in its place. In brackets: 95 % intervals.",
        "",
        f"{drew}; the two are compared on the pictures that both drew.",
        "",
        "| goal | wanted | measured | reached |",
        "|---|---|---|---|",
    ]
    for goal in report["goals"]:
        reached = {True: "yes", False: "**no**", None: "not measured"}[goal["reached"]]
        measured = "" if goal["measured"] is None else f"{goal['measured']:.3g}"
        lines.append(f"| {goal['goal']} | {goal['bound']} | {measured} | {reached} |")
    for name, model in report["models"].items():
        lines += [
            "",
            f"**{name}**, {model['steps']} steps, guidance {model['guidance']:g}:",
            "",
            *_table(model["kinds"]),
        ]
        if model["other wordings"]:
            lines += ["", "In other wordings than the usual one:", "", *_table({"any": model["other wordings"]})]
        seconds = ", ".join(f"{case} {value:.2f}" for case, value in model["seconds"].items())
        lines += [
            "",
            f"Seconds an image, warm, {machine['torch threads']} threads, by the engine alone (a prompt seen before, "
            f"no previews, nothing saved): {seconds}.",
        ]
    lines += ["", "**The judges themselves**, given other pictures than a model's (all checks of a kind together):", ""]
    columns = list(report["judges"])
    lines += [f"| kind | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for kind in report["judges"][columns[0]]:
        rows = [report["judges"][column].get(kind) for column in columns]
        values = ["" if row is None else percent(row["rates"]["all"]["rate"]) for row in rows]
        lines.append(f"| {kind} | {' | '.join(values)} |")
    psnr = ", ".join(f"{value:.1f} dB on {what}" for what, value in report["autoencoder PSNR"].items())
    return "\n".join([*lines, "", f"Autoencoder, there and back: {psnr}."])


def _table(judged: Mapping[str, Any]) -> list[str]:
    lines = ["| kind | n | everything asked | of which |", "|---|---|---|---|"]
    for kind, row in judged.items():
        whole = row["rates"]["all"]
        low, high = (percent(value) for value in whole["interval"])
        parts = ", ".join(f"{name} {percent(it['rate'])}" for name, it in row["rates"].items() if name != "all")
        lines.append(f"| {kind} | {row['n']} | {percent(whole['rate'])} ({low} to {high}) | {parts} |")
    return lines


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def write_figures(card: Path, text: str) -> None:
    """Replace what stands between the markers of the model card. Raises ValueError where they are not there once."""
    content = card.read_text("utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(END) < content.index(BEGIN):
        raise ValueError(f"{card} must hold {BEGIN} and, after it, {END}, each once")
    head, rest = content.split(BEGIN)
    tail = rest.split(END)[1]
    card.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
