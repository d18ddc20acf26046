"""From the last keystroke to a fresh picture: what a person waits for in Live mode, in a real browser.

    python -m benchmarks.live [--rounds N]

Types prompts of 30 characters at 60 ms a key into the page of a studio that it starts, with nano, and takes the time
inside the page, from the last keystroke's event to the frame in which the picture of the whole prompt stands. Beside
it the longest that a key took until the browser could draw again. Prints a line each and writes
benchmarks/results/live.json. The bar: 700 ms on two cores. Needs tests/requirements.txt, and Chromium.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from benchmarks.measuring import machine, summary, write

ROOT = Path(__file__).resolve().parent.parent
PORT = 7893
SUBJECTS = ["owl", "fox", "car", "cat", "bus", "dog", "cup", "pig", "key", "bed"]  # of three letters
PACKAGES = ("torch", "gradio", "playwright")

# `typed` is when the last key came, `slowest` the longest from a key to the next frame. The picture counts from the
# frame that shows it.
WATCH = """() => {
  window.slowest = 0;
  const area = document.querySelector('#generate .prompt textarea');
  area.addEventListener('input', (event) => {
    window.typed = event.timeStamp;
    const at = event.timeStamp;
    requestAnimationFrame(() => { window.slowest = Math.max(window.slowest, performance.now() - at); });
  });
  window.arrived = (alt) => new Promise((done) => {
    const look = () => {
      const image = document.querySelector('#preview img');
      if (image && image.alt === alt && image.complete) done(performance.now() - window.typed);
      else requestAnimationFrame(look);
    };
    look();
  });
}"""


def measure(page: Page, subject: str) -> tuple[float, float]:
    """Seconds to the picture, and of the slowest key."""
    prompt = f"a 3D {subject} on a green background"
    area = page.locator("#generate .prompt textarea")
    area.fill("")
    page.wait_for_timeout(1000)
    page.evaluate("() => { window.slowest = 0; }")
    area.press_sequentially(prompt, delay=60)
    waited = page.evaluate("alt => window.arrived(alt)", f"Live picture: {prompt}")
    return waited / 1000, page.evaluate("() => window.slowest") / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description="Time Live mode.")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("Chromium is needed: put 'chromium' or 'google-chrome' on the PATH.")
    url = f"http://127.0.0.1:{PORT}/"
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        environment = {**os.environ, "FLUX2_HOME": home, "FLUX2_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `make run` starts it
        command = [sys.executable, "app.py", "--port", str(PORT)]
        studio = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        try:
            while not answers(url):
                if studio.poll() is not None:
                    sys.exit("The studio did not start.")
                time.sleep(0.2)
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            )
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(url)
            page.locator("#generate .live input").check()
            page.evaluate(WATCH)
            for subject in SUBJECTS[:3]:
                measure(page, subject)
            found = [measure(page, SUBJECTS[number % len(SUBJECTS)]) for number in range(options.rounds)]
            browser.close()
        finally:
            studio.terminate()
            studio.wait(30)
    report: dict[str, Any] = {
        "machine": machine("cpu", PACKAGES),
        "last keystroke to picture": summary([waited for waited, _ in found]),
        "slowest key to the next frame": summary([slowest for _, slowest in found]),
    }
    for name in ("last keystroke to picture", "slowest key to the next frame"):
        print(f"{name}: " + ", ".join(f"{key} {value:g}" for key, value in report[name].items()))
    print(f"written to {write(report, 'live.json')}")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    main()
