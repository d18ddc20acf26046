"""What must start quickly imports nothing heavy: one new process imports it all, and says who imported what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "gradio", "huggingface_hub", "openai", "onnxruntime", "cv2", "imwatermark")
# In this order: what is imported once is there for all that follow, so the strictest come first.
# Behind a module: what it must not import either.
LIGHT = {
    "provenance.c2pa.credentials": ("c2pa", "cryptography", "PIL"),
    "provenance.watermark": (),
    "errors": (),
    "events": (),
    "request": (),
    "checkpoints": (),
    "settings": (),
    "jobs.queue": (),
    "jobs.tasks": (),
    "images.references": (),
    "storage.presets": (),
    "storage.own_presets": (),
    "safety.guard": (),
    "prompting.openai_server": (),
    "cli.main": (),
}
HELP = (
    ["--help"],
    ["generate", "--help"],
    ["ui", "--help"],
    ["encode-server", "--help"],
    ["models", "--help"],
    ["models", "path", "--help"],
    ["--version"],
)
PROGRAM = """
import importlib, io, json, sys
from contextlib import redirect_stdout

heavy, light, helps = json.loads(sys.argv[1])
found = []
step, unwanted = "", ()


class Watch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in unwanted:
            frame, importer = sys._getframe(), "python"
            while frame and importer == "python":
                importer = next((it for it in (frame.f_code.co_filename,) if "/flux2_studio/" in it), "python")
                line, frame = frame.f_lineno, frame.f_back
            found.append(f"{step}: {name}, by {importer}:{line}")
        return None


sys.meta_path.insert(0, Watch)
for step, more in light.items():
    unwanted = (*heavy, *more)
    importlib.import_module(f"flux2_studio.{step}")
unwanted = heavy
from flux2_studio.cli.main import main

for arguments in helps:
    step = " ".join(arguments)
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            main(arguments)
    except SystemExit as end:
        if end.code != 0 or not said.getvalue():
            found.append(f"{step}: ended with {end.code}")
    else:
        found.append(f"{step}: did not exit")
print(json.dumps(found))
"""


def run(light: dict[str, tuple[str, ...]], helps: tuple[list[str], ...] = ()) -> list[str]:
    """A line for each heavy import: at which step, what, and by which file and line of ours."""
    asked = json.dumps([HEAVY, light, helps])
    done = subprocess.run([sys.executable, "-c", PROGRAM, asked], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


def test_light_modules_and_help_import_nothing_heavy() -> None:
    assert run(LIGHT, HELP) == []


def test_a_heavy_import_is_reported_with_its_importer() -> None:
    (found,) = run({"provenance.watermark": ("numpy",)})
    assert found.startswith("provenance.watermark: numpy, by ") and "/flux2_studio/provenance/watermark.py:" in found
