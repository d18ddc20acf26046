"""`flux2-studio models`: list, download, remove and locate the checkpoints on this machine.

huggingface_hub is imported only when a command needs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from flux2_studio.checkpoints import PART_LABELS, Checkpoint
from flux2_studio.cli.terminal import EXIT_INTERRUPTED, PROGRAM, ProgressLine, one_line, print_lines
from flux2_studio.errors import WeightsError
from flux2_studio.models.hub.local_checkpoints import add_local_checkpoints
from flux2_studio.models.loras import LoraLibrary
from flux2_studio.settings import Settings

if TYPE_CHECKING:
    from flux2_studio.models.hub.repositories import Hub


def add_models_command(commands: argparse._SubParsersAction) -> None:
    """Add the `models` command and its subcommands to the parser, each with its function as its `run` default."""
    models = commands.add_parser(
        "models",
        allow_abbrev=False,
        help="list, download and remove checkpoints",
        description="See which checkpoints are on this machine, download them, and remove them.",
    )
    actions = models.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run, text in (
        ("list", run_models_list, "every checkpoint: its size, its licence, and whether it is on this machine"),
        ("download", run_models_download, "fetch a checkpoint, going on where an earlier download broke off"),
        ("remove", run_models_remove, "delete what was downloaded of a checkpoint and no other one here needs"),
        ("loras", run_models_loras, "your LoRAs: what each is, and which checkpoints it is for"),
        ("path", run_models_path, "print where a checkpoint's files are"),
    ):
        action = actions.add_parser(name, allow_abbrev=False, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name not in ("list", "loras"):
            action.add_argument("name", metavar="NAME", help="the checkpoint, as `models list` calls it")
        action.set_defaults(run=run)


def run_models_list(options: argparse.Namespace) -> int:
    """`models list`: print a few lines about every checkpoint to stdout."""
    settings, notes = add_local_checkpoints(Settings.from_environment())
    from flux2_studio.models.hub.repositories import Hub

    hub = Hub(settings)
    print_lines(
        line
        for checkpoint in settings.checkpoints
        for line in describe_checkpoint(checkpoint, settings.checkpoints, hub)
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def run_models_download(options: argparse.Namespace) -> int:
    """`models download NAME`: download, with progress on stderr; Ctrl-C pauses."""
    settings, _ = add_local_checkpoints(Settings.from_environment())
    checkpoint = settings.checkpoint(options.name)
    from flux2_studio.models.hub.repositories import Hub

    preview = (checkpoint.tiny_autoencoder,) if settings.preview == "tiny" else ()
    try:
        with ProgressLine(sys.stderr, min_fraction_step=0.05) as progress:
            Hub(settings).download(checkpoint, (*checkpoint.parts, *preview), progress.show)
    except KeyboardInterrupt:
        resume_command = f"{PROGRAM} models download {checkpoint.name}"
        print(
            f"{PROGRAM}: paused; what has arrived is kept, and `{resume_command}` goes on from there", file=sys.stderr
        )
        return EXIT_INTERRUPTED
    print(f"{checkpoint.label} is on this machine", file=sys.stderr)
    return 0


def run_models_remove(options: argparse.Namespace) -> int:
    """`models remove NAME`: delete, and report on stderr what was freed and what was kept."""
    settings, _ = add_local_checkpoints(Settings.from_environment())
    checkpoint = settings.checkpoint(options.name)
    from flux2_studio.models.hub.hub_errors import format_size
    from flux2_studio.models.hub.repositories import Hub

    removed = Hub(settings).remove(checkpoint)
    for part, others in removed.kept_parts:
        print(f"kept the {PART_LABELS[part.kind]}: {_names(others)} on this machine needs it", file=sys.stderr)
    if removed.freed_bytes:
        print(f"{format_size(removed.freed_bytes)} freed", file=sys.stderr)
    else:
        print(f"there is nothing to remove of {checkpoint.name} alone", file=sys.stderr)
    return 0


def run_models_loras(options: argparse.Namespace) -> int:
    """`models loras`: print each LoRA's name, a tab and its kind to stdout; invalid files to stderr."""
    settings, _ = add_local_checkpoints(Settings.from_environment())
    loras = LoraLibrary(settings)
    entries, problems = loras.scan()
    print_lines(f"{entry.name}\t{entry.kind} for {entry.family}" for entry in entries)
    for problem in problems:
        print(f"note: {one_line(problem)}", file=sys.stderr)
    if not entries:
        print(f"{PROGRAM}: no LoRAs yet; put their .safetensors files into {loras.folder}", file=sys.stderr)
    return 0


def run_models_path(options: argparse.Namespace) -> int:
    """`models path NAME`: print each part's kind, a tab and its path to stdout. Raises `WeightsError` if one is
    missing."""
    settings, _ = add_local_checkpoints(Settings.from_environment())
    checkpoint = settings.checkpoint(options.name)
    from flux2_studio.models.hub.repositories import Hub

    hub = Hub(settings)
    files_by_kind = {part.kind: hub.find(part) for part in checkpoint.parts}
    lines = []
    for kind, files in files_by_kind.items():
        if files:
            lines.append(f"{PART_LABELS[kind]}\t{files.weights}")
            lines += [f"tokenizer\t{files.tokenizer}"] if files.tokenizer else []
    print_lines(lines)
    if missing := [f"the {PART_LABELS[kind]}" for kind, files in files_by_kind.items() if files is None]:
        *others, last = missing
        raise WeightsError(
            f"Of {checkpoint.label}, {', '.join(others) + ' and ' if others else ''}{last} must be downloaded first: "
            f"`{PROGRAM} models download {checkpoint.name}`."
        )
    return 0


def describe_checkpoint(checkpoint: Checkpoint, checkpoints: Sequence[Checkpoint], hub: Hub) -> Iterator[str]:
    """Yield the lines of `models list` about `checkpoint`."""
    yield f"{checkpoint.name}: {checkpoint.label}"
    yield f"  {describe_disk_state(checkpoint, hub)}"
    gate = f"gated: accept it at {checkpoint.licence_url}, then set HF_TOKEN" if checkpoint.gated else "not gated"
    yield f"  {checkpoint.licence}, {gate}"
    if shared := describe_sharing(checkpoint, checkpoints):
        yield f"  shares {shared}"


def describe_disk_state(checkpoint: Checkpoint, hub: Hub) -> str:
    """Return whether `checkpoint` is on this machine, and how much is still to download."""
    from flux2_studio.models.hub.hub_errors import format_size

    try:
        missing = [part for part in checkpoint.parts if hub.find(part) is None]
    except WeightsError as error:
        return f"cannot be used: {one_line(error)}"
    bytes_on_disk = sum(hub.size_on_disk(part) for part in checkpoint.parts)
    bytes_to_download = sum(max(part.size - hub.size_on_disk(part), 0) for part in missing)
    if missing:
        state = f"partly on disk ({format_size(bytes_on_disk)})" if bytes_on_disk else "not on disk"
        return f"{state}, {format_size(bytes_to_download)} to download"
    return (
        f"on disk, {format_size(bytes_on_disk)} downloaded"
        if bytes_on_disk
        else "on board"
        if checkpoint.is_toy
        else "on disk"
    )


def describe_sharing(checkpoint: Checkpoint, checkpoints: Sequence[Checkpoint]) -> str:
    """Return the parts that `checkpoint` shares with others, such as 'the text encoder with a, b; the autoencoder with
    b'."""
    shared = {
        PART_LABELS[part.kind]: [other for other in checkpoints if other != checkpoint and part in other.parts]
        for part in checkpoint.parts
    }
    return "; ".join(f"the {kind} with {_names(others)}" for kind, others in shared.items() if others)


def _names(checkpoints: Iterable[Checkpoint]) -> str:
    return ", ".join(checkpoint.name for checkpoint in checkpoints)
