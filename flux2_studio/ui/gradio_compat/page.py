"""Fixes for Gradio's page: streamed updates, status events, and dropdowns whose choices change."""

from __future__ import annotations

import copy
from typing import Any

import gradio as gr
from gradio.block_function import BlockFunction
from gradio.components import Component
from gradio.state_holder import SessionState


class StudioBlocks(gr.Blocks):
    """A page that loses no streamed update in a busy browser, and does less work in the browser.

    Between two yields Gradio sends only differences. Its script applies them on arrival to the objects of earlier
    yields, which may still be waiting to be shown (seen with 6.31). If two yields arrived together, a change that the
    second did not repeat was lost: a Stop button that never appeared, a picture that was not shown.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._changing_dropdowns: set[int] = set()

    def accept_any_text(self, *dropdowns: gr.Dropdown) -> None:
        """Pass every text that a browser sends for `dropdowns` to the handlers, which must check it themselves.

        Gradio refuses a value that is not among the choices that the server sent last (seen with 6.31). The browser may
        not have received them yet, or still show those of a studio that was restarted: then every event that sends the
        form fails with an error about a list of choices.
        """
        self._changing_dropdowns.update(dropdown._id for dropdown in dropdowns)

    async def preprocess_data(
        self, block_fn: BlockFunction, inputs: list[Any], state: SessionState | None, explicit_call: bool = False
    ) -> list[Any]:
        """Convert the values that a browser sent. Adds those of changing dropdowns to the session's choices first."""
        state = state or SessionState(self)
        for block, value in zip(block_fn.inputs, inputs, strict=False):  # too few are refused by Gradio
            if block._id in self._changing_dropdowns and isinstance(value, str):
                known: Any = state[block._id] if block._id in state else block  # noqa: SIM401 - it has no `get`
                if value not in [choice for _, choice in known.choices]:
                    own = copy.copy(known)
                    own.choices = [*known.choices, (value, value)]
                    state[block._id] = own
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)

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
