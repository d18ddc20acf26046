"""The command line with a home folder of its own: in this process, or in a new one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from flux2_studio.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
FOX = ("--model", "nano", "--prompt", "a fox on a pink background", "--seed", "1")
DEADLINE = 300  # seconds until a new process counts as hanging


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


class Home:
    """A home folder, a hub cache and an environment for the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("FLUX2_", "HF_")) and not name.endswith("_MODEL_PATH")
        }
        self.environment |= {
            "FLUX2_HOME": str(folder / "home"),
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONIOENCODING": "utf-8",
        }

    def run(self, *arguments: str | Path, **environment: str) -> Done:
        """In this process, with this environment."""
        values = self.environment | environment
        encoding, _, errors = values["PYTHONIOENCODING"].partition(":")
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors or "strict")
        err = io.StringIO()
        with ExitStack() as stack:
            stack.enter_context(patch.dict(os.environ, values, clear=True))
            stack.enter_context(_hub_constants(values))
            stack.enter_context(redirect_stdout(out))
            stack.enter_context(redirect_stderr(err))
            try:
                code = cli.main([str(argument) for argument in arguments])
            except SystemExit as end:  # argparse's way to end
                code = int(end.code or 0)
        out.flush()
        return Done(code, out.buffer.getvalue().decode(encoding), err.getvalue())  # type: ignore[attr-defined]

    def generate(self, *arguments: str | Path) -> tuple[str, str]:
        """stdout and stderr of a `generate` that succeeds, in this process."""
        done = self.run("generate", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "flux2_studio", *map(str, arguments)]

    def spawn(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """In a new process, until it ends."""
        return subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            encoding="utf-8",
            timeout=DEADLINE,
        )

    @property
    def outputs(self) -> list[Path]:
        return sorted((self.folder / "home" / "outputs").rglob("*.png"))


def _hub_constants(environment: dict[str, str]) -> ExitStack:
    """huggingface_hub reads its variables once, when it is imported: set what it made of them."""
    from huggingface_hub import constants

    stack = ExitStack()
    values = {
        "HF_HUB_CACHE": str(Path(environment["HF_HOME"]) / "hub"),
        "HF_TOKEN_PATH": str(Path(environment["HF_HOME"]) / "token"),
        "HF_HUB_OFFLINE": environment.get("HF_HUB_OFFLINE") == "1",
    }
    if endpoint := environment.get("HF_ENDPOINT"):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        values |= {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + template}
    for name, value in values.items():
        stack.enter_context(patch.object(constants, name, value))
    return stack
