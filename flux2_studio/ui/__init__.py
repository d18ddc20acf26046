"""The page in the browser. With app.py the only place that knows Gradio; it never touches torch."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

import gradio as gr

from flux2_studio.errors import StudioError
from flux2_studio.jobs import JobQueue
from flux2_studio.references import MAX_BYTES
from flux2_studio.settings import Settings
from flux2_studio.ui import fields, handlers, tabs
from flux2_studio.ui.examples import Examples
from flux2_studio.ui.theme import StudioTheme

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

SPACE_HOST, SPACE_PORT = "0.0.0.0", 7860  # where a Hugging Face Space looks for its app
HOUR = 3600  # seconds

TITLE = """<h1><span class="mark" aria-hidden="true"></span>flux2-studio</h1>
<p>Pictures with the FLUX.2 open models, made on this machine.</p>
<button id="look" type="button" aria-label="Switch between light and dark">◐</button>"""

# Ctrl+Enter runs the visible form, a pasted picture goes to the visible form's references, ◐ switches the look.
SCRIPT = """<script>
addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
  const form = event.target.closest('.sheet');
  const run = form && form.querySelector('button.run');
  if (run && !run.disabled) { event.preventDefault(); event.target.blur(); run.click(); }
});
addEventListener('paste', (event) => {
  const pictures = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith('image/'));
  const inputs = [...document.querySelectorAll('.sheet .references input[type=file]')];
  const input = inputs.find((one) => one.closest('.references').offsetParent);
  if (!pictures.length || !input) return;
  event.preventDefault();
  const carrier = new DataTransfer();
  pictures.forEach((file) => carrier.items.add(file));
  input.files = carrier.files;
  input.dispatchEvent(new Event('change', {bubbles: true}));
});
addEventListener('click', (event) => {
  if (event.target.closest('#look')) document.body.classList.toggle('dark');
});
</script>"""


def build(studio: Studio, jobs: JobQueue) -> gr.Blocks:
    """The page of `studio`, whose runs go through `jobs`; not launched yet."""
    settings = studio.settings
    default = settings.checkpoint(None)
    examples = Examples.load(settings.assets / "examples")
    with gr.Blocks(
        title="flux2-studio", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR), fill_width=True
    ) as page:
        gr.HTML(TITLE, elem_id="title")
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=5, min_width=320, elem_id="forms"):
                with gr.Column(elem_id="choice"):
                    chosen = fields.checkpoint(settings.checkpoints, default.name)
                    about = gr.HTML(fields.about(default, studio.on_disk(default)), elem_id="about")
                with gr.Tabs(elem_id="tabs") as tabbed:
                    forms = [layout(chosen, default, examples) for layout in (tabs.generate, tabs.edit, tabs.multi)]
            with gr.Column(scale=7, min_width=320, elem_id="stage"):
                stage = tabs.stage()
        handlers.wire(studio, jobs, examples, chosen=chosen, about=about, tabs=tabbed, forms=forms, stage=stage)
    return page


def serve(settings: Settings, host: str | None = None, port: int | None = None, share: bool = False) -> None:
    """Show the page until it is interrupted, at http://127.0.0.1:7860 or the next free port unless told otherwise.

    Raises `StudioError` where the page cannot be started.
    """
    settings.prepare_process()
    from flux2_studio.studio import Studio  # loads torch, which only a started page needs

    if settings.on_space:
        host, port = host or SPACE_HOST, port or SPACE_PORT
    host = host or "127.0.0.1"
    _check_host(host)
    if port is not None and not 1 <= port <= 65535:
        raise StudioError(f"There is no port {port}: choose one from 1 to 65535.")
    studio = Studio(settings)
    jobs = JobQueue(studio)
    page = build(studio, jobs)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=StudioTheme(),
            css_paths=[settings.assets / "style.css"],
            head=SCRIPT,
            allowed_paths=[str(settings.outputs), str(settings.assets / "examples")],
            max_file_size=MAX_BYTES,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        where = f"Port {port}" if port else "Every port from 7860 on"
        raise StudioError(f"{where} at {host} cannot be used: choose another with --port.") from error
    sys.stdout.write(f"flux2-studio is open at {url}\n")
    sys.stdout.flush()
    page.block_thread()


def _check_host(host: str) -> None:
    """Whether this machine has that address at all; Gradio would try every port there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise StudioError(
            f"{host} is not an address of this machine: choose 127.0.0.1, 0.0.0.0 or one of its own with --host."
        ) from error
