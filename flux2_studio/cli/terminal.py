"""Shared by the commands: exit codes, and output to a terminal, a file or a pipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from typing import TextIO

PROGRAM = "flux2-studio"
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as shells report SIGINT
EXIT_BROKEN_PIPE = 141  # as shells report SIGPIPE
BAR_WIDTH = 24  # characters


class ProgressLine:
    """Progress of a run: one line that redraws itself on a terminal, plain lines elsewhere.

    min_fraction_step: off a terminal, print the same activity again only after that much more progress (0..1); 0 prints
    every change.
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
        """Show the current activity, and its progress (0..1) if known."""
        if self._terminal:
            bar = "" if fraction is None else f"{_bar(fraction)} "
            columns = shutil.get_terminal_size().columns
            self._clear()
            self._stream.write(f"{bar}{text}"[: columns - 1])
            self._stream.flush()
            return
        shown: object = text
        if self._grain and fraction is not None:
            # 1e-6: a quotient such as 1 / 0.05 may be slightly below 20.
            shown = text.partition(":")[0], int(fraction / self._grain + 1e-6)
        if shown != self._last:
            print(text, file=self._stream)
        self._last = shown

    def show_tail(self, text: str) -> None:
        """Show the end of a growing, untrusted text; only on a terminal."""
        if self._terminal:
            self.show("".join(it if it.isprintable() else " " for it in text[-200:])[-60:])

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._clear()
        print(f"note: {text}", file=self._stream)

    def _clear(self) -> None:
        if self._terminal:
            self._stream.write("\r\033[K")  # return to the line's start and erase the line
            self._stream.flush()


def print_lines(lines: Iterable[str]) -> None:
    """Write `lines` to stdout and flush, so that a closed pipe raises here."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output(sys.stdout)
        raise


def discard_output(stream: TextIO) -> None:
    """Redirect `stream` to os.devnull, because Python would write its buffer again at exit, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _bar(fraction: float) -> str:
    done = round(min(max(fraction, 0.0), 1.0) * BAR_WIDTH)
    return f"[{'#' * done}{'.' * (BAR_WIDTH - done)}]"


def one_line(message: object) -> str:
    return " ".join(str(message).split())
