"""Gradio's page, with what it sends while a handler yields mended."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.block_function import BlockFunction
from gradio.components import Component


class StudioBlocks(gr.Blocks):
    """A page that loses no update, however busy the browser is, and keeps it less busy.

    Between two yields Gradio sends differences only. Its script applies them as they come in, to the very objects of
    the yields before, which may still wait to be shown (seen with 6.31). So what one yield says and the next one does
    not say again was lost where the two came together: a Stop button that never appeared, a picture that was not shown.
    """

    def handle_streaming_diffs(
        self,
        block_fn: BlockFunction,
        data: list[Any],
        session_hash: str | None,
        run: str | None,
        final: bool,
        simple_format: bool = False,
    ) -> list[Any]:
        """`data`, one value for each output, as the differences that replace the whole of each."""
        first = session_hash is None or run is None or run not in self.pending_diff_streams[session_hash]
        whole = super().handle_streaming_diffs(block_fn, data, session_hash, run, final, simple_format=True)
        return whole if first or final or simple_format else [[["replace", [], value]] for value in whole]

    def show_status_only_at(self, component: Component) -> None:
        """Have the state of every event so far (pending, done) noted at `component` alone.

        Gradio's script notes it at each output that any event has had, and goes through all of these whenever any
        event begins, yields or ends, looking for each in the whole tree (seen with 6.31): on a page of this size half
        a second of the browser's time for one event. We show no state of events there anyway.
        """
        for function in self.fns.values():
            function.show_progress_on = [component]
