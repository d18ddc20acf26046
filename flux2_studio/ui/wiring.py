"""How the page's events are connected, the same way everywhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

Update = dict[Any, Any]  # components to what becomes of them

# The page's events are not an API: none is listed, and none shows Gradio's own spinner over our stage.
listen = partial(gr.on, api_visibility="private", show_progress="hidden")
