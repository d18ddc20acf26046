"""How the page's events are connected, the same way everywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from flux2_studio.events import FINAL_EVENTS, Event
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.jobs.tasks import Task
from flux2_studio.ui.gradio_compat.language import i18n
from flux2_studio.ui.gradio_compat.visitors import owner_of

TASK_POLL_SECONDS = 0.08  # seconds between two looks at a task
Update = dict[Any, Any]  # components to what becomes of them

# The page's events are not an API: none is listed, and none shows Gradio's own spinner over our stage.
listen = partial(gr.on, api_visibility="private", show_progress="hidden")


def stream_script_tag(assets: Path) -> str:
    """What the page's head needs so that no answer to an event is lost; before any other script."""
    return f"<script>\n{(assets / 'stream.js').read_text(encoding='utf-8')}</script>"


def make_stop_handler(jobs: JobQueue) -> Callable[[str, gr.Request], Any]:
    """A handler for a Stop button: it ends the job of that id, if it is the caller's, and says so on the button."""

    def stop(job: str, request: gr.Request) -> Any:
        running = jobs.get(job, owner_of(request)) or jobs.get(job, tab_owner_of(request))
        if running is None:
            return gr.Button(visible=False)
        over = running.finished
        running.cancel()
        # The button of one that is over may be another's by now.
        return gr.skip() if over else gr.Button(i18n("Stopping…"), interactive=False)

    return stop


def tab_owner_of(request: gr.Request) -> str:
    """Whose is what stays a tab's own. It is no `owner_of` anybody, whatever a browser sends as its session."""
    return f"tab:{request.session_hash or ''}"


async def follow_task(
    task: Task, poll_seconds: float = TASK_POLL_SECONDS, is_wanted: Callable[[], bool] = lambda: True
) -> AsyncIterator[Event]:
    """The events of `task` until its last one, or until they are not `is_wanted` any more.

    It polls from the event loop: a blocked follower would hold one of Gradio's few threads for as long as a run takes.
    """
    since = 0
    while is_wanted():
        for number, event in task.events(since, timeout=0):
            since = number + 1
            yield event
            if isinstance(event, FINAL_EVENTS):
                return
        await asyncio.sleep(poll_seconds)
