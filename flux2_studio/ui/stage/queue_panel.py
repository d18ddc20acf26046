"""The queue below the stage: an owner's running, waiting and interrupted runs.

The browser draws it from plain values, so that a button keeps focus while the text beside it changes; the script sets
texts as text, never as HTML. A click sends only an id and an action; the job queue checks the owner.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gradio as gr
from starlette.requests import Request as WebRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from flux2_studio.errors import StudioError
from flux2_studio.events import Preview, Status
from flux2_studio.jobs.journal import JournalEntry
from flux2_studio.jobs.queue import JobQueue, QueuePosition
from flux2_studio.jobs.tasks import Job
from flux2_studio.ui.forms.tabs import StagePanel
from flux2_studio.ui.gradio_compat.language import translate, translate_message
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.history.routes import PRIVATE_HEADERS, owner_endpoint
from flux2_studio.ui.stage import render
from flux2_studio.ui.stage.follower import Follower, TabState, form_name_for

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

ROW_PROMPT_CHARS = 90  # per prompt

# Reuses rows by id, and writes only what changed in them.
QUEUE_JS = """
const list = element.querySelector('ol'), foot = element.querySelector('.foot');
const make = (tag, className) => Object.assign(document.createElement(tag), {className});
const set = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const button = (act, id, label, title) => {
  const made = make('button', `queue-${act}`);
  Object.assign(made, {type: 'button', textContent: label, title, ariaLabel: title});
  made.addEventListener('click', () => trigger('click', {act, id}));
  return made;
};
const fill = (row, told) => {
  set(row.querySelector('.prompt-text'), told.prompt);
  row.querySelector('.prompt-text').title = told.prompt;
  set(row.querySelector('.detail'), told.detail);
  row.className = told.state;
  const acts = JSON.stringify(told.acts);
  if (row.dataset.acts === acts) return;
  const held = row.contains(document.activeElement) ? document.activeElement.className : null;
  row.dataset.acts = acts;
  const buttons = told.acts.map(([act, label, title]) => button(act, told.id, label, title));
  row.querySelector('.queue-acts').replaceChildren(...buttons);
  buttons.find((one) => one.className === held)?.focus();
};
const fresh = (id) => {
  const row = make('li', '');
  row.dataset.id = id;
  const words = make('div', 'words');
  words.append(make('span', 'prompt-text'), make('span', 'detail'));
  row.append(words, make('span', 'queue-acts'));
  return row;
};
const draw = () => {
  const {rows, clear} = props.value ?? {rows: [], clear: false};
  const there = new Map([...list.children].map((row) => [row.dataset.id, row]));
  const wanted = rows.map((told) => {
    const row = there.get(told.id) ?? fresh(told.id);
    fill(row, told);
    return row;
  });
  if (wanted.length !== list.children.length || wanted.some((row, place) => row !== list.children[place])) {
    const held = document.activeElement;
    list.replaceChildren(...wanted);
    if (element.contains(held)) held.focus();
  }
  if (clear !== Boolean(foot.firstChild)) {
    const [label, title] = [studioSay('Discard what was cut short'), studioSay('Discard them all')];
    foot.replaceChildren(...(clear ? [button('clear', '', label, title)] : []));
  }
};
draw();
watch('value', draw);

// Whether there is anything new is asked aside: each of Gradio's events has the whole page think, and most of the time
// nothing happens. Who has no cookie gets no answer, and looks now and then.
const PAUSE = 1500, SELDOM = 10000;  // milliseconds
let seen = '';
const look = async () => {
  if (!element.isConnected) { clearInterval(looking); return; }
  if (document.hidden) return;
  let state;
  try {
    const answer = await fetch(`${location.pathname.replace(/\\/?$/, '/')}queue/state`, {cache: 'no-store'});
    state = answer.ok ? await answer.text() : String(Math.floor(Date.now() / SELDOM));
  } catch {
    return;  // the line is down
  }
  if (state !== seen) { seen = state; trigger('input'); }
};
const looking = setInterval(look, PAUSE);
"""

QueueValue = dict[str, Any]


def build_queue_panel() -> gr.HTML:
    """Build the panel, to be rendered by the caller; it is hidden while empty."""
    return gr.HTML(
        {"rows": [], "clear": False},
        html_template="<ol data-i18n aria-label='Your runs'></ol><div class='foot'></div>",
        js_on_load=QUEUE_JS,
        elem_id="queue",
        render=False,
    )


def queue_value(jobs: JobQueue, label_of: Callable[[str | None], str], owner: str) -> QueueValue:
    """The panel's value for `owner`. label_of: a checkpoint's name -> its label."""
    positions = jobs.queue_positions(owner)
    waiting = [position for position in positions if position.runs_ahead or not position.job.started]
    entries = jobs.interrupted(owner)
    rows = [_queued_row(position, waiting, label_of(position.job.request.checkpoint)) for position in positions]
    rows += [_interrupted_row(entry, label_of(entry.request.checkpoint)) for entry in entries]
    return {"rows": rows, "clear": len(entries) > 1}


def queue_routes(studio: Studio, jobs: JobQueue) -> list[Route]:
    """The route by which the panel detects changes."""

    def state(owner: str, request: WebRequest, body: Any) -> Response:
        """Returns a hash of the panel of `owner`; "" if it is empty."""
        value = queue_value(jobs, _label_lookup(studio), owner)
        digest = hashlib.sha256(json.dumps(value).encode()).hexdigest() if value["rows"] else ""
        return PlainTextResponse(digest, headers=PRIVATE_HEADERS)

    return [Route("/queue/state", owner_endpoint(state))]


def _label_lookup(studio: Studio) -> Callable[[str | None], str]:
    """Returns a function from a checkpoint's name to its translated label."""

    def label_of(name: str | None) -> str:
        known = {checkpoint.name: checkpoint.label for checkpoint in studio.settings.checkpoints}
        return translate_message(known.get(name or "", name or ""))

    return label_of


def _queued_row(position: QueuePosition, waiting: list[QueuePosition], label: str) -> QueueValue:
    job = position.job
    actions = []
    if position in waiting:
        place = waiting.index(position)
        if place > 0:
            actions.append(("earlier", "▲", translate("Earlier")))
        if place < len(waiting) - 1:
            actions.append(("later", "▼", translate("Later")))
    actions.append(
        (
            "cancel",
            translate("Cancel") if position in waiting else translate("Stop"),
            translate("Take this run off the queue"),
        )
    )
    return {
        "id": job.id,
        "state": "waiting" if position in waiting else "running",
        "prompt": shorten_prompt(job.request.prompt),
        "detail": f"{_position_text(position, job)} · {label}",
        "acts": actions,
    }


def _position_text(position: QueuePosition, job: Job) -> str:
    if position.runs_ahead:
        ahead, others = position.runs_ahead, position.others_ahead
        if ahead == 1:
            return translate("1 run before it, somebody else's") if others else translate("1 run before it")
        if others == 1:
            return translate("{ahead} runs before it, 1 of them somebody else's", ahead=ahead)
        if others:
            return translate("{ahead} runs before it, {others} of them other people's", ahead=ahead, others=others)
        return translate("{ahead} runs before it", ahead=ahead)
    match job.latest_event():
        case Preview(step=step, steps=steps, seconds_left=left):
            rest = "" if left is None or left < 0.5 else f", {render.time_left(left)}"
            return translate("Step {step} of {steps}", step=step, steps=steps) + rest
        case Status(text=text):
            return translate_message(text)
        case _:
            return translate("Under way") if job.started else translate("Next")


def _interrupted_row(entry: JournalEntry, label: str) -> QueueValue:
    rerun_label = translate("Run without enhancing") if entry.needs_key else translate("Run again")
    saved = len(entry.pictures)
    if saved:
        rerun_label = translate("Run the rest")
    count = entry.request.count
    saved_text = " " + translate("{saved} of {count} pictures are saved.", saved=saved, count=count) if saved else ""
    return {
        "id": entry.id,
        "state": "interrupted",
        "prompt": shorten_prompt(entry.request.prompt),
        "detail": f"{translate_message(entry.message)}{saved_text} · {label}",
        "acts": [
            ("again", rerun_label, rerun_label),
            ("discard", translate("Discard"), translate("Take this run off the queue")),
        ],
    }


def shorten_prompt(prompt: str) -> str:
    """`prompt` on one line, truncated if it is long."""
    line = " ".join(prompt.split())
    return line if len(line) <= ROW_PROMPT_CHARS else f"{line[: ROW_PROMPT_CHARS - 1].rstrip()}…"


def wire_queue_panel(
    studio: Studio,
    jobs: JobQueue,
    panel: gr.HTML,
    follower: Follower,
    tab_state: gr.State,
    stage: StagePanel,
) -> Any:
    """Keep the panel up to date, and handle its buttons.

    Returns the event after which there may be a run to follow.
    """

    label_of = _label_lookup(studio)

    async def refresh(tab_state: TabState, request: gr.Request) -> Any:
        try:
            value = await asyncio.to_thread(queue_value, jobs, label_of, owner_of(request))
        except StudioError:  # the database cannot be read: the next run reports it, not every poll
            return gr.skip()
        if value == tab_state.queue_rows:
            return gr.skip()
        tab_state.queue_rows = value
        return value

    async def act(tab_state: TabState, request: gr.Request, event: gr.EventData) -> Update:
        data = event._data if isinstance(event._data, dict) else {}
        id_, action = str(data.get("id", "")), data.get("act")
        owner = owner_of(request)
        update: Update = {}
        try:
            if action == "cancel" and (job := jobs.get(id_, owner)) is not None:
                job.cancel()
            elif action in ("earlier", "later"):
                await asyncio.to_thread(jobs.move, id_, owner, later=action == "later")
            elif action == "again":
                job = await asyncio.to_thread(jobs.resume_interrupted, id_, owner)
                update = follower.begin(tab_state, job, form_name_for(job.request))
            elif action == "discard":
                await asyncio.to_thread(jobs.discard, id_, owner)
            elif action == "clear":
                for entry in await asyncio.to_thread(jobs.interrupted, owner):
                    await asyncio.to_thread(jobs.discard, entry.id, owner)
        except StudioError as error:
            return {stage.message: render.problem(str(error))}
        tab_state.queue_rows = await asyncio.to_thread(queue_value, jobs, label_of, owner)
        return {panel: tab_state.queue_rows, **update}

    # The page's script triggers once per change, so a trigger during an update must run after it.
    listen(panel.input, refresh, tab_state, panel, queue=False, trigger_mode="always_last")
    return listen(
        panel.click,
        act,
        tab_state,
        [panel, *stage.components],
        concurrency_limit=None,
        trigger_mode="multiple",
    )
