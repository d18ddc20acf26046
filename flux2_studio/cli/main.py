"""The command line: a thin shell over the same `Request` that the page builds.

Paths of pictures go to stdout, everything else to stderr. Exit codes: 0 done, 2 an error that the user can fix (one
line), 130 stopped by Ctrl-C. torch, transformers and gradio are imported only when needed, so that `--help` and a
mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, get_args

from flux2_studio import __version__
from flux2_studio.checkpoints import CHECKPOINTS
from flux2_studio.cli import inspect as cli_inspect
from flux2_studio.cli import models as cli_models
from flux2_studio.cli import presets as cli_presets
from flux2_studio.cli.terminal import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    PROGRAM,
    ProgressLine,
    discard_output,
    one_line,
)
from flux2_studio.errors import RequestError, SaveError, StudioError
from flux2_studio.events import Event, Notice, Preview, PromptEnhanced, PromptProgress, Result, Status, Stopped
from flux2_studio.files.atomic import SHARED, atomic_write
from flux2_studio.models.hub.local_checkpoints import add_local_checkpoints
from flux2_studio.request import (
    MAX_LORA_WEIGHT,
    ImageFormat,
    LoraChoice,
    Outpaint,
    Request,
    Upsampling,
    UpsamplingBackend,
)
from flux2_studio.settings import DtypeName, Settings

SUFFIX_FORMATS: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; argparse itself exits with `SystemExit`, as usual."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # like stderr: paths may contain unencodable characters
    options = build_parser().parse_args(arguments)
    try:
        try:
            return options.run(options)
        except StudioError as error:
            print(f"{PROGRAM}: {one_line(error)}", file=sys.stderr)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            print(f"{PROGRAM}: stopped", file=sys.stderr)
            return EXIT_INTERRUPTED
    except BrokenPipeError:  # e.g. `2>&1 | head`: stderr is closed too
        discard_output(sys.stderr)
        return EXIT_BROKEN_PIPE


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{PROGRAM}: {one_line(message)} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """Build the parser of every command. Each command's function is its `run` default."""
    top = Parser(prog=PROGRAM, description="Make and edit images with the FLUX.2 open models.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    machine = Parser(add_help=False)
    machine.add_argument("--dtype", choices=get_args(DtypeName), help="precision (default: what suits the device)")
    machine.add_argument("--device", metavar="D", help="auto, cuda, cuda:1, mps or cpu (default: the fastest here)")

    generate = commands.add_parser(
        "generate",
        parents=[machine],
        allow_abbrev=False,
        help="make pictures from a prompt, or edit and combine pictures",
        description="Make pictures from a prompt; with --image, edit that picture, or combine several.",
        epilog="The picture is also kept, with its settings, in the outputs folder of FLUX2_HOME.",
    )
    names = ", ".join(checkpoint.name for checkpoint in CHECKPOINTS)
    generate.add_argument("--model", metavar="NAME", help=f"one of: {names}")
    generate.add_argument("--prompt", metavar="TEXT", help="what to draw, or what to change")
    generate.add_argument(
        "--preset",
        metavar="NAME",
        help="start from a preset, as `presets` calls it, or from a file of one; --prompt is then its subject, where "
        "it takes one, and every other option counts more",
    )
    generate.add_argument(
        "--image", metavar="FILE", type=Path, action="append", default=[], help="a reference picture; repeatable"
    )
    generate.add_argument(
        "--mask", metavar="FILE", type=Path, help="white where the first --image may change; the rest stays as it is"
    )
    generate.add_argument(
        "--outpaint",
        metavar="L,T,R,B",
        type=parse_outpaint,
        default=Outpaint(),
        help="pixels by which the first --image grows to the left, top, right and bottom",
    )
    generate.add_argument(
        "--match-colours", action="store_true", help="give the result the colours of the first --image on the whole"
    )
    generate.add_argument("--width", metavar="W", type=int, help="pixels (default: as --image, or the model's)")
    generate.add_argument("--height", metavar="H", type=int, help="pixels")
    generate.add_argument("--steps", metavar="N", type=int, help="denoising steps (default: the model's)")
    generate.add_argument("--guidance", metavar="G", type=float, help="how closely to follow the prompt")
    generate.add_argument("--negative", metavar="TEXT", help="what to keep out; Base models only")
    generate.add_argument(
        "--lora",
        metavar="NAME[:WEIGHT]",
        type=parse_lora_choice,
        action="append",
        default=[],
        help=f"a LoRA as `models loras` calls it, with a weight of {-MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g} "
        "(default 1); repeatable",
    )
    generate.add_argument("--seed", metavar="S", type=int, help="same seed, same picture (default: by chance)")
    generate.add_argument("--count", metavar="N", type=int, help="pictures, of seeds S, S+1, ... (default 1)")
    generate.add_argument(
        "--upsample",
        choices=get_args(UpsamplingBackend),
        help="have a language model enhance the prompt (default: FLUX2_UPSAMPLE, or none; none with --image)",
    )
    generate.add_argument("--upsample-model", metavar="NAME", help="which one (default: the first that is offered)")
    generate.add_argument(
        "--format", choices=get_args(ImageFormat), help="of the picture (default: what --out ends in)"
    )
    for option, what in (
        ("--no-watermark", "lay no invisible watermark"),
        ("--no-sign", "add no signed content credentials (C2PA)"),
        ("--no-metadata", "write no settings into the file"),
        ("--no-check", "skip the safety check"),
    ):
        generate.add_argument(option, action="store_true", help=what)
    generate.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        required=True,
        help="picture to write: .png, .jpg or .webp; several: FILE-1.png, FILE-2.png, ...",
    )
    generate.set_defaults(run=run_generate)

    ui = commands.add_parser(
        "ui", parents=[machine], allow_abbrev=False, help="start the page", description="Start the page in a browser."
    )
    ui.add_argument("--host", metavar="ADDRESS", help="where to listen (default: 127.0.0.1, for this machine only)")
    ui.add_argument("--port", metavar="N", type=int, help="the port (default: 7860, or the next one that is free)")
    ui.add_argument("--share", action="store_true", help="make a public link through Gradio's servers")
    ui.set_defaults(run=run_ui)

    encode = commands.add_parser(
        "encode-server",
        parents=[machine],
        allow_abbrev=False,
        help="read prompts for studios on other machines",
        description="Serve the text encoder of a checkpoint, and nothing else of it, to studios on other machines.",
        epilog="They find it by FLUX2_TEXT_ENCODER_URL. FLUX2_ENCODE_TOKEN is the token that it asks for.",
    )
    encode.add_argument("--model", metavar="NAME", help="whose text encoder (default: FLUX2_CHECKPOINT, or nano)")
    encode.add_argument("--host", metavar="ADDRESS", help="where to listen (default: 127.0.0.1, for this machine only)")
    encode.add_argument("--port", metavar="N", type=int, help="the port (default: 7870)")
    encode.set_defaults(run=run_encode_server)

    cli_models.add_models_command(commands)
    cli_inspect.add_inspect_command(commands)
    cli_presets.add_presets_command(commands)
    return top


def run_ui(options: argparse.Namespace) -> int:
    """`ui`: serve the page until it is stopped."""
    settings, notes = _settings(options)
    from flux2_studio.ui.app import serve_page

    serve_page(settings, host=options.host, port=options.port, share=options.share, notes=notes)
    return 0


def run_encode_server(options: argparse.Namespace) -> int:
    """`encode-server`: serve a text encoder until it is stopped."""
    settings, _ = _settings(options)
    settings.checkpoint(options.model)  # fails for an unknown name before torch loads
    settings.set_environment_defaults()
    from flux2_studio.remote.text_server import open_server, serve_until_interrupted

    with ProgressLine(sys.stderr) as progress:
        server = open_server(settings, options.model, options.host, options.port, progress.show)
    serve_until_interrupted(server)
    return 0


def run_generate(options: argparse.Namespace) -> int:
    """`generate`: run once and copy the pictures to --out."""
    settings, _ = _settings(options)
    by = options.upsample or ("none" if options.image else settings.upsample)
    options_by_field = {
        "prompt": options.prompt,
        "negative_prompt": options.negative,
        "checkpoint": options.model,
        "width": options.width,
        "height": options.height,
        "steps": options.steps,
        "guidance": options.guidance,
        "count": options.count,
        "loras": tuple(options.lora) or None,
        "format": output_format(options.out, options.format),
    }
    given = {name: value for name, value in options_by_field.items() if value is not None}
    if options.preset is not None:
        given = cli_presets.complete_from_preset(given, options.preset, len(options.image), settings)
    if "prompt" not in given:
        raise RequestError("There is no prompt: say with --prompt what to draw, or start from a --preset that has one.")
    request = Request(
        **given,
        references=tuple(options.image),
        mask=options.mask,
        outpaint=options.outpaint,
        match_colours=options.match_colours,
        seed=options.seed,
        upsampling=Upsampling(by=by, model=options.upsample_model),
        watermark=not options.no_watermark,
        sign=not options.no_sign,
        metadata=not options.no_metadata,
    )
    targets = output_files(options.out, request.count)
    # Previews are not shown here; they would cost time and, for most checkpoints, a download.
    settings = replace(settings, preview="off", safety="off" if options.no_check else settings.safety)
    # Fails for invalid numbers before torch loads.
    resolved = request.resolve(settings.checkpoint(request.checkpoint))
    request = replace(request, seed=resolved.seed)  # chosen here, to map each picture to its target
    assert request.seed is not None
    settings.set_environment_defaults()
    from flux2_studio.images.reference_store import ReferenceStore
    from flux2_studio.stages.durations import DurationModel
    from flux2_studio.storage.database import Database
    from flux2_studio.studio import Studio

    studio = Studio(
        settings,
        reference_store=ReferenceStore(settings.references),
        durations=DurationModel(Database(settings.database)),
    )
    with stop_on_interrupt() as cancelled, ProgressLine(sys.stderr) as progress:
        outcome = show_events(studio.generate(request, cancelled), progress)
    # A stopped run has fewer pictures; withheld pictures leave gaps.
    written = [targets[seed - request.seed] for seed in outcome.seeds]
    for source, target in zip(outcome.images, written, strict=True):
        copy_file(source, target)
    print_paths(written)
    if isinstance(outcome, Stopped):
        print(f"{PROGRAM}: stopped, with {len(outcome.images)} of {request.count} done", file=sys.stderr)
        return EXIT_INTERRUPTED
    for text in outcome.provenance:
        print(text, file=sys.stderr)
    print(f"{_format_seeds(outcome.seeds)}, {outcome.seconds:.1f} s", file=sys.stderr)
    return 0


def parse_lora_choice(text: str) -> LoraChoice:
    """Parse `NAME` or `NAME:WEIGHT`. A number after the last colon is the weight, so a name that ends in one needs
    both."""
    name, colon, number = text.rpartition(":")
    try:
        choice = LoraChoice(name=name, weight=float(number)) if colon and _is_number(number) else LoraChoice(name=text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return choice


def parse_outpaint(text: str) -> Outpaint:
    """Parse `L,T,R,B`, in pixels."""
    try:
        left, top, right, bottom = map(int, text.split(","))
        return Outpaint(left=left, top=top, right=right, bottom=bottom)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no L,T,R,B: give four whole numbers of pixels, such as 0,0,256,0"
        ) from error
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def output_format(out: Path, wanted: ImageFormat | None) -> ImageFormat:
    """Return the format of --out's suffix. Raises `RequestError` if there is none, or if it is not `wanted`."""
    image_format = SUFFIX_FORMATS.get(out.suffix.lower())
    if image_format is None:
        raise RequestError(f"--out must end in .png, .jpg, .jpeg or .webp, not {out.name!r}.")
    if wanted not in (None, image_format):
        raise RequestError(f"--out {out.name!r} is not named as a picture of --format {wanted}: change one of them.")
    return image_format


def output_files(out: Path, count: int) -> tuple[Path, ...]:
    """Return the files for --out: itself, or numbered ones for several pictures.

    Raises `RequestError` if they cannot be written.
    """
    if not out.parent.is_dir():
        raise RequestError(f"There is no folder {str(out.parent)!r} for --out: create it first.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise RequestError(f"The folder {str(out.parent)!r} of --out cannot be written to: choose another one.")
    files = (out,) if count == 1 else tuple(out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(1, count + 1))
    for file in files:
        if file.is_dir():
            raise RequestError(f"--out {str(file)!r} is a folder: name a file.")
    return files


def copy_file(source: Path, target: Path) -> None:
    """Copy atomically. Raises `SaveError` with the path of the original."""
    try:
        with source.open("rb") as original, atomic_write(target, SHARED) as copy:
            shutil.copyfileobj(original, copy)
    except OSError as error:
        raise SaveError(
            f"The picture could not be copied to {target} ({error.strerror}); it is kept as {source}."
        ) from error


def print_paths(paths: Sequence[Path]) -> None:
    """Write `paths` to stdout, one per line. Raises `SaveError` if that fails."""
    try:
        for path in paths:
            print(path, flush=True)
    except OSError as error:
        discard_output(sys.stdout)
        raise SaveError(
            f"Everything is saved, to {paths[0]}{' and so on' if len(paths) > 1 else ''}, but the names could not be "
            f"printed ({error.strerror})."
        ) from error


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed. A second Ctrl-C ends the program at once."""
    pressed = threading.Event()

    def on_interrupt(*_: object) -> None:
        if pressed.is_set():
            tell(f"\n{PROGRAM}: stopped\n")
            os._exit(EXIT_INTERRUPTED)  # an exception would wait for the thread that loads weights
        pressed.set()
        tell("\nstopping after this step; Ctrl-C again stops at once\n")

    def tell(text: str) -> None:
        with suppress(OSError):
            os.write(sys.stderr.fileno(), text.encode())  # not print: the signal may have interrupted one

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def show_events(events: Iterator[Event], progress: ProgressLine) -> Result | Stopped:
    """Show a run's events as they come; return its final event."""
    for event in events:
        match event:
            case Status(text=text, fraction=fraction):
                progress.show(text, fraction)
            case Notice(text=text):
                progress.note(text)
            case PromptProgress(text=text):
                progress.show_tail(text)
            case PromptEnhanced(prompt=prompt, by=by):
                progress.note(f"Enhanced by {by}: {prompt}")
            case Preview(step=step, steps=steps, first_index=first, count=count, seconds_left=left):
                picture = f"picture {first + 1} of {count}, " if count > 1 else ""
                remaining = "" if left is None else f", {left:.0f} s left"
                progress.show(f"{picture}step {step} of {steps}{remaining}", step / steps)
            case Result() | Stopped():
                return event
    raise AssertionError("a run must end with Result or Stopped")


def _format_seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    contiguous = len(seeds) == seeds[-1] - seeds[0] + 1
    return f"seeds {seeds[0]} to {seeds[-1]}" if contiguous else f"seeds {', '.join(map(str, seeds))}"


def _settings(options: argparse.Namespace) -> tuple[Settings, list[str]]:
    """Return the environment's settings with the user's own checkpoints, overridden by --dtype and --device.

    Also returns a sentence about each invalid file in the user's checkpoint folder.
    """
    chosen = {name: value for name in ("dtype", "device") if (value := getattr(options, name, None)) is not None}
    settings, notes = add_local_checkpoints(Settings.from_environment())
    if settings.compile == "auto":  # a single run ends before compiling could speed it up
        chosen["compile"] = "off"
    return replace(settings, **chosen), notes
