"""What the history takes with thousands of pictures in it: seconds until a page is there, and for a search.

    python -m benchmarks.history [--pictures N] [--runs N]

Prints a line each, and writes benchmarks/results/history.json. Through the same HTTP routes that the page asks, on this
machine. The bars with 5,000 pictures: opening under 1 s, a search under 200 ms.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.routes import App
from PIL import Image
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from benchmarks.measuring import Arm, interleave, machine, summary, write
from flux2_studio.checkpoints import KLEIN_4B, KLEIN_9B, KLEIN_BASE_4B
from flux2_studio.events import Saved
from flux2_studio.images.thumbnails import ThumbnailCache, read_saved
from flux2_studio.provenance.metadata import encode_picture
from flux2_studio.record import Record
from flux2_studio.request import Request
from flux2_studio.storage.database import Database
from flux2_studio.storage.history import History
from flux2_studio.ui.gradio_compat.visitors import VISITOR_COOKIE, VisitorCookieMiddleware
from flux2_studio.ui.history.routes import HistoryRoutes

SIDE = 1024  # pixels of each picture
PACKAGES = ("gradio", "starlette", "pillow", "numpy")
KLEINS = (KLEIN_4B, KLEIN_9B, KLEIN_BASE_4B)
TOKEN = "b" * 43  # of the browser that asks
WORDS = ["lighthouse", "cliff", "dusk", "mist", "fox", "portrait", "snow", "Straße", "Ärger", "harbour"]
WORDS += ["glass", "copper", "forest", "river", "lantern", "狐狸", "лиса", "owl", "velvet", "storm", "marble", "garden"]


def fill(history: History, outputs: Path, pictures: int) -> list[str]:
    """As many pictures as asked, with prompts of 60 words each; their ids. The first file is a picture as it would be,
    all others are one small one."""
    chance = random.Random(0)
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE // 8, SIDE // 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    outputs.mkdir(parents=True)
    small = outputs / "small.png"
    ids = []
    for number in range(pictures):
        checkpoint = KLEINS[number % len(KLEINS)]
        prompt = " ".join(chance.choices(WORDS, k=60)) + (" needle" if number == pictures // 2 else "")
        request = Request(prompt=prompt, width=SIDE, height=SIDE, seed=number).resolve(checkpoint)
        record = Record(request=request, label=checkpoint.label, versions={"torch": "2"}, computed={"device": "cpu"})
        path = outputs / f"{number}.png"
        if number == 0:
            path.write_bytes(encode_picture(image, "png", record).data)
            small.write_bytes(encode_picture(image.resize((64, 64)), "png", record).data)
        else:
            path.hardlink_to(small)
        ids.append(history.add(f"browser:{TOKEN}", "job", Saved(index=0, image=path, seed=number, record=record)))
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the history.")
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        thumbnails = ThumbnailCache(home / "thumbnails")
        database = Database(home / "studio.sqlite3")
        history = History(database, home / "outputs", home / "trash")
        with (
            database.read_transaction()
        ):  # while somebody reads, not each picture has to reach the disk: it fills faster
            ids = fill(history, home / "outputs", options.pictures)
        with gr.Blocks() as page:
            gr.HTML()
        routes = HistoryRoutes(history, thumbnails, None).routes()
        app = App.create_app(page, app_kwargs={"middleware": [Middleware(VisitorCookieMiddleware)], "routes": routes})
        client = TestClient(app, cookies={VISITOR_COOKIE: TOKEN})
        picture = history.find_file(f"browser:{TOKEN}", ids[0])
        assert picture is not None

        def get(**query: str) -> Arm:
            return Arm(run=lambda: client.get("/history/page", params=query).raise_for_status().content)

        middle = history.find(f"browser:{TOKEN}", [ids[len(ids) // 2]])[0].cursor
        arms = {
            "opening": get(),
            "a search that finds one": get(words="needle"),
            "a search that finds many": get(words="fox STRASSE 狐狸"),
            "a search that finds none": get(words="nothing such"),
            "a search with every filter": get(words="owl", checkpoint=KLEINS[0].name, since="1", favourites="1"),
            "a page from the middle": get(before=middle),
            "one picture with its settings": Arm(run=lambda: client.get(f"/history/entry/{ids[0]}").raise_for_status()),
            "a thumbnail": Arm(run=lambda: client.get(f"/history/thumbnail/{ids[0]}").raise_for_status()),
            "making one thumbnail": Arm(
                run=lambda: thumbnails.get_or_create("ab", lambda: read_saved(picture)),
                prepare=lambda: thumbnails.delete("ab"),
            ),
        }
        report: dict[str, Any] = {
            "machine": machine("cpu", PACKAGES),
            "pictures": options.pictures,
            "megabytes": round((home / "studio.sqlite3").stat().st_size / 1e6, 1),
            "seconds": {},
        }
        for name, seconds in interleave(arms, options.runs, 2).items():
            told = report["seconds"][name] = summary(seconds)
            print(f"{name}: " + ", ".join(f"{key} {1000 * told[key]:.1f} ms" for key in ("median", "p10", "p90")))
    print(write(report, "history.json"))


if __name__ == "__main__":
    main()
