"""Helpers to connect event handlers consistently."""

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

TASK_POLL_SECONDS = 0.08  # seconds
Update = dict[Any, Any]  # component -> its new value

# The page's events are not a public API, and must not show Gradio's spinner over our stage.
listen = partial(gr.on, api_visibility="private", show_progress="hidden")


def stream_script_tag(assets: Path) -> str:
    """The head script that keeps event updates from being lost. Must come before every other script."""
    return f"<script>\n{(assets / 'stream.js').read_text(encoding='utf-8')}</script>"


def make_stop_handler(jobs: JobQueue) -> Callable[[str, gr.Request], Any]:
    """Make the handler of a Stop button: it cancels the given job if it is the caller's, and updates the button."""

    def stop(job: str, request: gr.Request) -> Any:
        task = jobs.get(job, owner_of(request)) or jobs.get(job, tab_owner_of(request))
        if task is None:
            return gr.Button(visible=False)
        was_finished = task.finished
        task.cancel()
        # The button of a finished job may belong to another job by now.
        return gr.skip() if was_finished else gr.Button(i18n("Stopping…"), interactive=False)

    return stop


def tab_owner_of(request: gr.Request) -> str:
    """The owner of what belongs to one tab only. Never equal to an `owner_of`, whatever session a browser sends."""
    return f"tab:{request.session_hash or ''}"


async def follow_task(
    task: Task, poll_seconds: float = TASK_POLL_SECONDS, is_wanted: Callable[[], bool] = lambda: True
) -> AsyncIterator[Event]:
    """Yield the events of `task` until its final event, or until `is_wanted` returns False.

    Polls from the event loop: a blocking follower would occupy one of Gradio's few threads for a whole run.
    """
    since = 0
    while is_wanted():
        for number, event in task.events(since, timeout=0):
            since = number + 1
            yield event
            if isinstance(event, FINAL_EVENTS):
                return
        await asyncio.sleep(poll_seconds)
