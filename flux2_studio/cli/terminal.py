"""What the command line's commands have in common: exit codes, and how they write to a terminal, a file or a pipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from typing import TextIO

PROGRAM = "flux2-studio"
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended
EXIT_BROKEN_PIPE = 141  # and of one whose reader went away
BAR_WIDTH = 24  # characters


class ProgressLine:
    """What a run is doing: one line that redraws itself on a terminal, plain lines elsewhere.

    grain: off a terminal, how much more (0..1) must be done before the same thing is told again; 0: every change is.
    """

    def __init__(self, stream: TextIO, min_fraction_step: float = 0.0) -> None:
        self._stream = stream
        self._grain = min_fraction_step
        self._terminal = stream.isatty()
        self._last: object = None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def show(self, text: str, fraction: float | None = None) -> None:
        """What is being done now, and how much of it (0..1) where that is known."""
        if self._terminal:
            bar = "" if fraction is None else f"{_bar(fraction)} "
            columns = shutil.get_terminal_size().columns
            self._clear()
            self._stream.write(f"{bar}{text}"[: columns - 1])
            self._stream.flush()
            return
        told: object = text
        if self._grain and fraction is not None:
            told = text.partition(":")[0], int(fraction / self._grain + 1e-6)  # 1 / 0.05 may be a little less than 20
        if told != self._last:
            print(text, file=self._stream)
        self._last = told

    def show_tail(self, text: str) -> None:
        """The end of a growing text that anybody may have written; only where the line redraws itself."""
        if self._terminal:
            self.show("".join(it if it.isprintable() else " " for it in text[-200:])[-60:])

    def note(self, text: str) -> None:
        """Something that stays to be read."""
        self._clear()
        print(f"note: {text}", file=self._stream)

    def _clear(self) -> None:
        if self._terminal:
            self._stream.write("\r\033[K")  # to the line's start, and erase it
            self._stream.flush()


def print_lines(lines: Iterable[str]) -> None:
    """Write `lines` to stdout at once, so that a reader who has gone is noticed here."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output(sys.stdout)
        raise


def discard_output(stream: TextIO) -> None:
    """Let go of what `stream` still holds: at exit it would be written once more, and fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _bar(fraction: float) -> str:
    done = round(min(max(fraction, 0.0), 1.0) * BAR_WIDTH)
    return f"[{'#' * done}{'.' * (BAR_WIDTH - done)}]"


def one_line(message: object) -> str:
    return " ".join(str(message).split())
