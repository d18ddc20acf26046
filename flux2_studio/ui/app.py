"""Builds and serves the page. Besides ui/, only app.py knows Gradio; nothing here imports torch."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from flux2_studio.errors import StudioError
from flux2_studio.explore.running import ExplorationManager
from flux2_studio.explore.variants import Wildcards
from flux2_studio.images.references import MAX_REFERENCE_BYTES
from flux2_studio.images.thumbnails import ThumbnailCache
from flux2_studio.jobs.journal import Journal
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.models.hub.library import CheckpointLibrary
from flux2_studio.settings import Settings
from flux2_studio.storage.database import Database
from flux2_studio.storage.history import History
from flux2_studio.storage.own_presets import OwnPresets
from flux2_studio.storage.presets import Presets
from flux2_studio.ui import explore_tab, handlers, inspect_tab, models_tab
from flux2_studio.ui.forms import fields, own_preset_panel, preset_apply, preset_panel, tabs
from flux2_studio.ui.forms.examples import Examples
from flux2_studio.ui.gradio_compat import language, shortcuts, wiring
from flux2_studio.ui.gradio_compat.page import StudioBlocks
from flux2_studio.ui.gradio_compat.theme import StudioTheme
from flux2_studio.ui.gradio_compat.visitors import VisitorCookieMiddleware
from flux2_studio.ui.history import picker
from flux2_studio.ui.history import tab as history_tab
from flux2_studio.ui.history.original import OriginalLoader
from flux2_studio.ui.history.routes import HistoryRoutes
from flux2_studio.ui.stage import compare, queue_panel

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

SPACE_HOST, SPACE_PORT = "0.0.0.0", 7860  # required by Hugging Face Spaces
SECONDS_PER_HOUR = 3600
UPLOAD_RETENTION_SECONDS = 24 * SECONDS_PER_HOUR

TITLE_HTML = """<h1><span class="mark" aria-hidden="true"></span>flux2-studio</h1>
<p data-i18n>Pictures with the FLUX.2 open models, made on this machine.</p>
<div class="switches"><button id="keys" type="button" data-i18n aria-label="Keys" title="Keys (?)">?</button>
<button id="look" type="button" data-i18n aria-label="Switch between light and dark">◐</button></div>"""


def build_page(
    studio: Studio,
    jobs: JobQueue,
    library: CheckpointLibrary,
    describe_memory_needs: models_tab.DescribeMemoryNeeds = lambda _: "",
    *,
    may_change: bool = True,
    history: History | None = None,
    explorations: ExplorationManager | None = None,
) -> gr.Blocks:
    """Build the page of `studio`, without launching it. Its runs go through `jobs`.

    describe_memory_needs: a checkpoint's memory needs on this machine, as a sentence. may_change: whether checkpoints
    of `library` can be downloaded and deleted on the page. history: for the History tab; None for a page without it.
    explorations: for the Explore tab; None for new ones.
    """
    settings = studio.settings
    default = settings.checkpoint(None)
    examples = Examples.load(settings.assets / "examples")
    with StudioBlocks(
        title="flux2-studio",
        analytics_enabled=False,
        delete_cache=(SECONDS_PER_HOUR, UPLOAD_RETENTION_SECONDS),
        fill_width=True,
    ) as page:
        title = gr.HTML(
            f'{TITLE_HTML}<p id="policy" data-i18n>{escape(studio.guard.policy_description)}</p>', elem_id="title"
        )
        shortcuts.build_shortcut_help()
        picker.build_history_picker()
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=5, min_width=320, elem_id="forms"):
                with gr.Column(elem_id="choice"):
                    checkpoint_dropdown = fields.checkpoint(settings.checkpoints, default.name)
                    about = gr.HTML(
                        fields.checkpoint_summary_html(default, studio.is_on_disk(default)), elem_id="about"
                    )
                    loading = gr.HTML(elem_id="loading")
                with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as tabs_component:
                    forms = [
                        build_form(checkpoint_dropdown, default, examples, settings)
                        for build_form in (tabs.generate, tabs.edit, tabs.multi)
                    ]
                    explore = explore_tab.build_explore_tab(forms)
                    history_components = history_tab.build_history_tab() if history is not None else None
                    inspection = inspect_tab.build_inspect_tab()
                    models = models_tab.build_models_tab(library, describe_memory_needs, may_change=may_change)
            with gr.Column(scale=7, min_width=320, elem_id="stage"):
                queue = queue_panel.build_queue_panel()
                stage = tabs.build_stage(queue)
        handlers.wire_page(
            studio,
            jobs,
            examples,
            page=page,
            checkpoint_dropdown=checkpoint_dropdown,
            about=about,
            loading=loading,
            tabs=tabs_component,
            forms=forms,
            stage=stage,
            queue=queue,
        )
        explore_tab.wire_explore_tab(
            explore,
            studio,
            explorations or explorations_of(settings, jobs),
            Wildcards(settings.wildcards),
            forms,
            handlers.read_form,
        )
        presets = preset_panel.AvailablePresets(Presets.load(settings.presets), OwnPresets(Database(settings.database)))
        preset_apply.wire_presets(studio, presets, forms)
        own_preset_panel.wire_own_presets(studio, presets, forms)
        models_tab.wire_models_tab(
            models, library, describe_memory_needs, checkpoint_dropdown=checkpoint_dropdown, about=about
        )
        inspect_tab.wire_inspect_tab(
            inspection,
            studio,
            studio.signer,
            studio.messages,
            forms=forms,
            checkpoint_dropdown=checkpoint_dropdown,
            tabs=tabs_component,
            reference_store=studio.reference_store,
        )
        if history is not None and history_components is not None:
            history_tab.wire_history_tab(
                history_components,
                studio,
                history,
                forms=forms,
                checkpoint_dropdown=checkpoint_dropdown,
                tabs=tabs_component,
                reference_store=studio.reference_store,
            )
    page.show_status_only_at(title)
    for form in forms:
        page.accept_any_text(form.presets.choice, form.upsampling.local)
    return page


def serve_page(
    settings: Settings,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    notes: Sequence[str] = (),
) -> None:
    """Serve the page until interrupted, by default at http://127.0.0.1:7860 or the next free port.

    notes: a sentence about each file in the user's checkpoint folder that is not a checkpoint. Raises `StudioError` if
    the page cannot be started.
    """
    settings.set_environment_defaults()
    # These import torch, which only serving needs.
    from flux2_studio.images.reference_store import ReferenceStore
    from flux2_studio.models.hub.repositories import Hub
    from flux2_studio.models.manager import ModelManager
    from flux2_studio.stages.durations import DurationModel
    from flux2_studio.studio import Studio, make_guard

    if settings.on_space:
        host, port = host or SPACE_HOST, port or SPACE_PORT
    host = host or "127.0.0.1"
    _check_host(host)
    if port is not None and not 1 <= port <= 65535:
        raise StudioError(f"There is no port {port}: choose one from 1 to 65535.")
    hub = Hub(settings)  # shared by runs and the Models tab, so that they share downloads
    guests = for_guests(settings, share)
    exposed = guests or not _is_loopback(host)
    database = Database(settings.database)
    studio = Studio(
        settings,
        ModelManager(settings, hub),
        guard=make_guard(settings, shared=exposed),
        # Pictures contain the hashes of their references, so anybody with a shared picture could request these here.
        reference_store=None if exposed else ReferenceStore(settings.references),
        durations=DurationModel(database),
    )
    thumbnails = ThumbnailCache(settings.thumbnails)
    history = History(database, settings.outputs, settings.trash, on_delete=thumbnails.delete)
    jobs = JobQueue(studio, Journal(database, settings.queue), history)
    explorations = explorations_of(settings, jobs)
    catalogue = language.TranslationCatalogue.load(settings.assets / "languages")
    page = build_page(
        studio,
        jobs,
        CheckpointLibrary(settings, hub, notes),
        studio.describe_memory_needs,
        may_change=not guests,
        history=history,
        explorations=explorations,
    )
    if Path(get_upload_folder()) == settings.home / "uploads":
        forget_uploads(settings.home / "uploads")
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=StudioTheme(),
            css_paths=[settings.assets / "style.css", settings.assets / "history.css"],
            head=wiring.stream_script_tag(settings.assets)
            + language.language_script_tag(settings.assets)
            + shortcuts.shortcut_script_tags(settings.assets)
            + compare.compare_script_tag(settings.assets)
            + history_tab.history_script_tag(settings.assets)
            + picker.picker_script_tag(settings.assets),
            allowed_paths=[
                str(settings.outputs),
                str(settings.assets / "examples"),
                *([] if exposed else [str(settings.references)]),
            ],
            max_file_size=MAX_REFERENCE_BYTES,
            i18n=catalogue,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            quiet=True,
            prevent_thread_lock=True,
            app_kwargs={
                "middleware": [Middleware(VisitorCookieMiddleware)],
                "routes": [
                    *HistoryRoutes(
                        history,
                        thumbnails,
                        studio.reference_store,
                        OriginalLoader(history, studio.reference_store, settings.checkpoint, studio.pictures),
                    ).routes(),
                    *queue_panel.queue_routes(studio, jobs),
                ],
            },
        )
    except OSError as error:
        ports = f"Port {port}" if port else "Every port from 7860 on"
        raise StudioError(f"{ports} at {host} cannot be used: choose another with --port.") from error
    # Like Ctrl+C: Gradio then deletes its files. Set before the URL is printed, after which the process may be ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jobs.restore_waiting()  # only now, so that a failed start changes nothing
    explorations.resume_interrupted()
    try:
        sys.stdout.write(f"flux2-studio is open at {url}\n")
        sys.stdout.flush()
        page.block_thread()
    except KeyboardInterrupt:  # block_thread handles it itself; this covers the time before
        page.close()


def explorations_of(settings: Settings, jobs: JobQueue) -> ExplorationManager:
    return ExplorationManager(jobs, settings.home / "explorations", settings.outputs / "explore")


def for_guests(settings: Settings, share: bool) -> bool:
    """Whether strangers may use the page: on a Space, or through a public link. They may neither fill nor empty the
    disk.

    The owner of such a link has no more rights through it: Gradio's tunnel ends on this machine, so all requests look
    alike.
    """
    return settings.on_space or share


def forget_uploads(folder: Path) -> None:
    """Delete files in `folder` that are older than a day: those left by a killed server.

    Gradio deletes only the uploads of its own process.
    """
    oldest = time.time() - UPLOAD_RETENTION_SECONDS
    for path in sorted(folder.rglob("*"), reverse=True):  # folders after their contents
        with suppress(OSError):  # keep what cannot be deleted, and folders that are not empty
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif path.lstat().st_mtime < oldest:
                path.unlink()


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`, one of its own addresses or names."""
    address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0][4][0]
    return ip_address(str(address).partition("%")[0]).is_loopback


def _check_host(host: str) -> None:
    """Raise `StudioError` unless this machine has the address `host`; Gradio would try every port there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise StudioError(
            f"{host} is not an address of this machine: choose 127.0.0.1, 0.0.0.0 or one of its own with --host."
        ) from error
