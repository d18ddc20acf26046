"""Fixes for Gradio's page: streamed updates and status events."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.block_function import BlockFunction
from gradio.components import Component


class StudioBlocks(gr.Blocks):
    """A page that loses no streamed update in a busy browser, and does less work in the browser.

    Between two yields Gradio sends only differences. Its script applies them on arrival to the objects of earlier
    yields, which may still be waiting to be shown (seen with 6.31). If two yields arrived together, a change that the
    second did not repeat was lost: a Stop button that never appeared, a picture that was not shown.
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
        """Encode `data`, one value per output, as differences that replace each whole value."""
        first = session_hash is None or run is None or run not in self.pending_diff_streams[session_hash]
        values = super().handle_streaming_diffs(block_fn, data, session_hash, run, final, simple_format=True)
        return values if first or final or simple_format else [[["replace", [], value]] for value in values]

    def show_status_only_at(self, component: Component) -> None:
        """Report the status of all events so far (pending, done) at `component` only.

        By default Gradio's script records it at each output of any event; whenever an event begins, yields or ends, it
        searches the whole tree for each of them (seen with 6.31): half a second of browser time per event on a page of
        this size. We show no event status at the outputs anyway.
        """
        for function in self.fns.values():
            function.show_progress_on = [component]
