"""The queue below the stage: an owner's runs that go on, that wait, and that an earlier studio left undone.

It is drawn in the browser from plain values, so that a button keeps its focus while the time beside it changes; texts
are set as text there, never as HTML. Whatever a click sends is a name and a wish, and the job queue knows whose run it
is.
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

ROW_PROMPT_CHARS = 90  # characters of a prompt

# Rows are kept while they stay, by their id, and only what changed in them is written.
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
    """The panel, to be rendered where it belongs; it is hidden while it is empty."""
    return gr.HTML(
        {"rows": [], "clear": False},
        html_template="<ol data-i18n aria-label='Your runs'></ol><div class='foot'></div>",
        js_on_load=QUEUE_JS,
        elem_id="queue",
        render=False,
    )


def queue_value(jobs: JobQueue, label_of: Callable[[str | None], str], owner: str) -> QueueValue:
    """What the panel shows to `owner`. label_of: what users call a checkpoint."""
    standing = jobs.queue_positions(owner)
    waiting = [one for one in standing if one.runs_ahead or not one.job.started]
    entries = jobs.interrupted(owner)
    told = [_queued_row(one, waiting, label_of(one.job.request.checkpoint)) for one in standing]
    told += [_interrupted_row(entry, label_of(entry.request.checkpoint)) for entry in entries]
    return {"rows": told, "clear": len(entries) > 1}


def queue_routes(studio: Studio, jobs: JobQueue) -> list[Route]:
    """Where the panel asks whether it shows what there is."""

    def state(owner: str, request: WebRequest, body: Any) -> Response:
        """A word that changes with what the panel of `owner` would show; none while that is nothing."""
        now = queue_value(jobs, _label_lookup(studio), owner)
        word = hashlib.sha256(json.dumps(now).encode()).hexdigest() if now["rows"] else ""
        return PlainTextResponse(word, headers=PRIVATE_HEADERS)

    return [Route("/queue/state", owner_endpoint(state))]


def _label_lookup(studio: Studio) -> Callable[[str | None], str]:
    """What users call a checkpoint."""

    def label_of(name: str | None) -> str:
        known = {checkpoint.name: checkpoint.label for checkpoint in studio.settings.checkpoints}
        return translate_message(known.get(name or "", name or ""))

    return label_of


def _queued_row(standing: QueuePosition, waiting: list[QueuePosition], label: str) -> QueueValue:
    job = standing.job
    acts = []
    if standing in waiting:
        place = waiting.index(standing)
        if place > 0:
            acts.append(("earlier", "▲", translate("Earlier")))
        if place < len(waiting) - 1:
            acts.append(("later", "▼", translate("Later")))
    acts.append(
        (
            "cancel",
            translate("Cancel") if standing in waiting else translate("Stop"),
            translate("Take this run off the queue"),
        )
    )
    return {
        "id": job.id,
        "state": "waiting" if standing in waiting else "running",
        "prompt": shorten_prompt(job.request.prompt),
        "detail": f"{_position_text(standing, job)} · {label}",
        "acts": acts,
    }


def _position_text(standing: QueuePosition, job: Job) -> str:
    if standing.runs_ahead:
        ahead, others = standing.runs_ahead, standing.others_ahead
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
    again = translate("Run without enriching") if entry.needs_key else translate("Run again")
    saved = len(entry.pictures)
    if saved:
        again = translate("Run the rest")
    count = entry.request.count
    kept = " " + translate("{saved} of {count} pictures are saved.", saved=saved, count=count) if saved else ""
    return {
        "id": entry.id,
        "state": "interrupted",
        "prompt": shorten_prompt(entry.request.prompt),
        "detail": f"{translate_message(entry.message)}{kept} · {label}",
        "acts": [("again", again, again), ("discard", translate("Discard"), translate("Take this run off the queue"))],
    }


def shorten_prompt(prompt: str) -> str:
    """`prompt` on one line, its end left out where it is long."""
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
    """Keep the panel up to date, and do what its buttons say. Returns the event after which there may be a run to
    follow."""

    label_of = _label_lookup(studio)

    async def look(tab_state: TabState, request: gr.Request) -> Any:
        try:
            now = await asyncio.to_thread(queue_value, jobs, label_of, owner_of(request))
        except StudioError:  # the notebook cannot be read, which the next run tells: once, not at every look
            return gr.skip()
        if now == tab_state.queue_rows:
            return gr.skip()
        tab_state.queue_rows = now
        return now

    async def act(tab_state: TabState, request: gr.Request, event: gr.EventData) -> Update:
        sent = event._data if isinstance(event._data, dict) else {}
        id_, wish = str(sent.get("id", "")), sent.get("act")
        owner = owner_of(request)
        update: Update = {}
        try:
            if wish == "cancel" and (job := jobs.get(id_, owner)) is not None:
                job.cancel()
            elif wish in ("earlier", "later"):
                await asyncio.to_thread(jobs.move, id_, owner, later=wish == "later")
            elif wish == "again":
                job = await asyncio.to_thread(jobs.resume_interrupted, id_, owner)
                update = follower.begin(tab_state, job, form_name_for(job.request))
            elif wish == "discard":
                await asyncio.to_thread(jobs.discard, id_, owner)
            elif wish == "clear":
                for entry in await asyncio.to_thread(jobs.interrupted, owner):
                    await asyncio.to_thread(jobs.discard, entry.id, owner)
        except StudioError as error:
            return {stage.message: render.problem(str(error))}
        tab_state.queue_rows = await asyncio.to_thread(queue_value, jobs, label_of, owner)
        return {panel: tab_state.queue_rows, **update}

    # The page's script does not ask again for what it has seen: a look that comes while one is under way is made then.
    listen(panel.input, look, tab_state, panel, queue=False, trigger_mode="always_last")
    return listen(
        panel.click,
        act,
        tab_state,
        [panel, *stage.components],
        concurrency_limit=None,
        trigger_mode="multiple",
    )
