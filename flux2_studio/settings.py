"""The settings of this installation. The only reader of the environment and the only place that decides on paths.

| variable | meaning |
|---|---|
| FLUX2_HOME | the folder for everything that the studio writes (default: the platform's user data folder) |
| FLUX2_CHECKPOINT | the default checkpoint |
| FLUX2_CHECKPOINTS_DIR | a folder of the user's own checkpoint files, offered in addition to the known ones |
| FLUX2_LORAS_DIR | a folder of LoRAs, for example ComfyUI's models/loras (default: loras in FLUX2_HOME) |
| FLUX2_DEVICE | auto, cuda, cuda:1, mps or cpu |
| FLUX2_DTYPE | auto, float32, bfloat16 or float16 |
| FLUX2_QUANTIZE | off, fp8 or int8: quantise transformer and text encoder to 8 bits when they are loaded |
| FLUX2_COMPILE | auto, on or off: compile the transformer's blocks, see `models/background_compiler.py` |
| FLUX2_GRAPHS | on or off: capture small runs as CUDA graphs, see `models/cuda_graphs.py` |
| FLUX2_MEMORY | gigabytes of device memory that the studio may use (default: all free memory) |
| FLUX2_PREVIEW | tiny (a small decoder), linear (rough colours, no extra weights) or off |
| FLUX2_TEXT_ENCODER_URL | the address of a text encoder on another machine, see `models/remote_text.py` |
| FLUX2_TEXT_ENCODER_TOKEN | the token for that text encoder |
| FLUX2_TEXT_ENCODER_FOR | the checkpoint whose text encoder it serves; all that share it use it (default: dev) |
| FLUX2_ENCODE_TOKEN | the token that clients must send to this studio's `encode-server` |
| FLUX2_UPSAMPLE | none, local or openrouter: the default backend of prompt enhancement |
| FLUX2_OPENROUTER_URL | the OpenAI-compatible server for prompt enhancement (default: OpenRouter's) |
| FLUX2_OPENROUTER_MODEL | the default model on that server |
| OPENROUTER_API_KEY | the API key for that server |
| FLUX2_C2PA_CERTIFICATE | the user's own certificate chain that signs pictures, PEM (default: a local identity) |
| FLUX2_C2PA_KEY | the private key of that certificate, PEM, not encrypted |
| FLUX2_WATERMARK_MESSAGE | the message of the invisible watermark: 4 to 16 characters, or 0x and 8 to 32 hex digits |
| FLUX2_SAFETY | auto, on, warn or off: the mode of the safety check (default: auto, see `safety/policy.py`) |
| FLUX2_NSFW_MODEL_PATH | a folder with Falconsai/nsfw_image_detection, to check pictures with it |
| *_MODEL_PATH | a local copy of one part; `checkpoints.py` lists the names (same as the official command line's) |

The hub's own variables (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT) are read by huggingface_hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

import platformdirs

from flux2_studio.checkpoints import CHECKPOINTS, Checkpoint
from flux2_studio.errors import RequestError, StudioError
from flux2_studio.request import UpsamplingBackend

DeviceName = str
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
QuantizeMode = Literal["off", "fp8", "int8"]
CompileMode = Literal["auto", "on", "off"]
GraphsMode = Literal["on", "off"]
PreviewKind = Literal["tiny", "linear", "off"]
SafetyMode = Literal["auto", "on", "warn", "off"]

# Both folders are next to the package in the repository, and inside it in an installed wheel.
_PACKAGE = Path(__file__).resolve().parent
ASSETS = _PACKAGE / "assets" if (_PACKAGE / "assets").is_dir() else _PACKAGE.parent / "assets"
PRESETS = ASSETS.parent / "presets"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one installation. Build it with `Settings.from_environment()`, or directly in tests."""

    home: Path
    assets: Path = ASSETS
    presets: Path = PRESETS
    checkpoints: tuple[Checkpoint, ...] = CHECKPOINTS
    default_checkpoint: str = "nano"
    checkpoints_dir: Path | None = None  # `add_local_checkpoints` adds its files to `checkpoints`
    loras_dir: Path | None = None  # None: `home`/loras
    path_overrides: Mapping[str, Path] = field(default_factory=dict)  # variable -> local file or folder
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    quantize: QuantizeMode = "off"
    compile: CompileMode = "auto"
    graphs: GraphsMode = "off"
    memory_limit_gb: float | None = None  # None: all free memory
    preview: PreviewKind = "tiny"
    text_encoder_url: str | None = None
    text_encoder_token: str | None = field(default=None, repr=False)
    text_encoder_for: str = "dev"
    encode_token: str | None = field(default=None, repr=False)
    upsample: UpsamplingBackend = "none"
    openrouter_url: str = "https://openrouter.ai/api/v1"
    openrouter_model: str | None = None
    openrouter_key: str | None = field(default=None, repr=False)
    c2pa_certificate: Path | None = None  # None: the local identity in the folder `identity`
    c2pa_key: Path | None = None
    watermark_message: str | None = None  # None: Black Forest Labs' published message
    safety: SafetyMode = "auto"
    nsfw_model: Path | None = None
    on_space: bool = False  # running as a Hugging Face Space

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Reads the variables listed in the module docstring. An empty variable counts as unset.

        Raises `StudioError` for an invalid value.
        """
        env = os.environ if environ is None else environ
        variables = {
            part.path_variable
            for checkpoint in CHECKPOINTS
            for part in (*checkpoint.parts, checkpoint.tiny_autoencoder)
            if part.path_variable
        }
        home = _path(env, "FLUX2_HOME")
        overrides = {name: path for name in sorted(variables) if (path := _path(env, name))}
        settings = cls(
            home=home or Path(platformdirs.user_data_dir("flux2-studio", appauthor=False)),
            default_checkpoint=env.get("FLUX2_CHECKPOINT") or cls.default_checkpoint,
            checkpoints_dir=_path(env, "FLUX2_CHECKPOINTS_DIR"),
            loras_dir=_path(env, "FLUX2_LORAS_DIR"),
            path_overrides=overrides,
            device=env.get("FLUX2_DEVICE") or cls.device,
            dtype=_choice(env, "FLUX2_DTYPE", cls.dtype, get_args(DtypeName)),  # type: ignore[arg-type]
            quantize=_choice(env, "FLUX2_QUANTIZE", cls.quantize, get_args(QuantizeMode)),  # type: ignore[arg-type]
            compile=_choice(env, "FLUX2_COMPILE", cls.compile, get_args(CompileMode)),  # type: ignore[arg-type]
            graphs=_choice(env, "FLUX2_GRAPHS", cls.graphs, get_args(GraphsMode)),  # type: ignore[arg-type]
            memory_limit_gb=_gigabytes(env, "FLUX2_MEMORY"),
            preview=_choice(env, "FLUX2_PREVIEW", cls.preview, get_args(PreviewKind)),  # type: ignore[arg-type]
            text_encoder_url=_url(env, "FLUX2_TEXT_ENCODER_URL"),
            text_encoder_token=_token(env, "FLUX2_TEXT_ENCODER_TOKEN"),
            text_encoder_for=_choice(
                env, "FLUX2_TEXT_ENCODER_FOR", cls.text_encoder_for, tuple(it.name for it in CHECKPOINTS)
            ),
            encode_token=_token(env, "FLUX2_ENCODE_TOKEN"),
            upsample=_choice(env, "FLUX2_UPSAMPLE", cls.upsample, get_args(UpsamplingBackend)),  # type: ignore[arg-type]
            openrouter_url=_url(env, "FLUX2_OPENROUTER_URL") or cls.openrouter_url,
            openrouter_model=env.get("FLUX2_OPENROUTER_MODEL") or None,
            openrouter_key=_token(env, "OPENROUTER_API_KEY"),
            c2pa_certificate=_path(env, "FLUX2_C2PA_CERTIFICATE"),
            c2pa_key=_path(env, "FLUX2_C2PA_KEY"),
            watermark_message=env.get("FLUX2_WATERMARK_MESSAGE") or None,
            safety=_choice(env, "FLUX2_SAFETY", cls.safety, get_args(SafetyMode)),  # type: ignore[arg-type]
            nsfw_model=_path(env, "FLUX2_NSFW_MODEL_PATH"),
            on_space="SPACE_ID" in env,
        )
        if settings.checkpoints_dir is None:  # otherwise the name may belong to a file of that folder
            settings.checkpoint(settings.default_checkpoint)
        return settings

    @property
    def outputs(self) -> Path:
        """The folder for finished pictures."""
        return self.home / "outputs"

    @property
    def database(self) -> Path:
        """The database file of jobs and history."""
        return self.home / "studio.sqlite3"

    @property
    def trash(self) -> Path:
        """The folder that keeps deleted pictures for a day. Next to `outputs`, so that moving a picture is a rename."""
        return self.home / "trash"

    @property
    def thumbnails(self) -> Path:
        """The folder of thumbnails. Missing ones are recreated."""
        return self.home / "thumbnails"

    @property
    def queue(self) -> Path:
        """The folder for the references of queued runs."""
        return self.home / "queue"

    @property
    def references(self) -> Path:
        """The folder of the reference store, which keeps references so that pictures can be reproduced."""
        return self.home / "references"

    @property
    def compile_cache(self) -> Path:
        """The folder of torch's compile cache."""
        return self.home / "compiled"

    @property
    def identity(self) -> Path:
        """The folder of the local identity, which signs pictures if the user has configured no certificate."""
        return self.home / "identity"

    def uses_remote_text_encoder(self, checkpoint: Checkpoint) -> bool:
        """Whether the text encoder at `text_encoder_url` encodes the prompts of `checkpoint`.

        True if `checkpoint` has the same text encoder as `text_encoder_for`. That includes a user's own file, such as
        a quantised dev.
        """
        if self.text_encoder_url is None:
            return False
        served = next(it for it in CHECKPOINTS if it.name == self.text_encoder_for)
        return (checkpoint.text, checkpoint.recipe) == (served.text, served.recipe)

    @property
    def loras(self) -> Path:
        """The folder of the user's LoRAs."""
        return self.loras_dir or self.home / "loras"

    @property
    def wildcards(self) -> Path:
        """The folder of the wildcard lists."""
        return self.home / "wildcards"

    def set_environment_defaults(self) -> None:
        """Sets environment variables that libraries read, unless the user has set them. Call before importing torch.

        Gradio's uploads and copies and torch's compile cache go below `home`. OpenMP threads sleep while they wait:
        spinning threads starve each other as soon as another program needs a core.
        """
        os.environ.setdefault("GRADIO_TEMP_DIR", str(self.home / "uploads"))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.compile_cache))
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def checkpoint(self, name: str | None) -> Checkpoint:
        """Returns the checkpoint `name`, or the default one for None. Raises `RequestError` for an unknown name."""
        wanted_name = self.default_checkpoint if name is None else name
        for checkpoint in self.checkpoints:
            if checkpoint.name == wanted_name:
                return checkpoint
        known = ", ".join(checkpoint.name for checkpoint in self.checkpoints)
        raise RequestError(f"There is no checkpoint called {wanted_name!r}. Choose one of: {known}.")


def _url(env: Mapping[str, str], name: str) -> str | None:
    value = env.get(name)
    if not value:
        return None
    try:
        parts = urlsplit(value)
        is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is not a number, or a bracket is unbalanced
        is_valid = False
    # The message does not repeat the value: it may contain a secret.
    if not is_valid or not re.fullmatch(r"[!-~]+", value):
        raise StudioError(f"{name} is not an address: write it as http://encoder.example:7870/ or with https.")
    if "@" in parts.netloc:
        raise StudioError(f"{name} holds a name or password: write the address alone, and use a token.")
    return value


def _token(env: Mapping[str, str], name: str) -> str | None:
    value = env.get(name, "").strip()
    if value and not re.fullmatch(r"[!-~]+", value):
        raise StudioError(f"{name} holds blanks or other characters that no token has: copy it again.")
    return value or None


def _path(env: Mapping[str, str], name: str) -> Path | None:
    value = env.get(name)
    try:
        return Path(value).expanduser() if value else None
    except RuntimeError as error:
        raise StudioError(
            f"{name} is {value!r}, in a home folder that is not known: write the path in full."
        ) from error


def _gigabytes(env: Mapping[str, str], name: str) -> float | None:
    value = env.get(name)
    if not value:
        return None
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise StudioError(f"{name} is {value!r}; set it to a number of gigabytes, such as 7.5.")
    return number


def _choice(env: Mapping[str, str], name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = env.get(name) or default
    if value not in allowed:
        raise StudioError(f"{name} is {value!r}; set it to one of: {', '.join(allowed)}.")
    return value
