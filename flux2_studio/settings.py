"""How this installation is set up. The only reader of the environment and the only place that decides on paths.

| variable | meaning |
|---|---|
| FLUX2_HOME | where everything the studio writes lives (default: the platform's user data folder) |
| FLUX2_CHECKPOINT | the checkpoint chosen when a request names none |
| FLUX2_CHECKPOINTS_DIR | a folder of one's own checkpoint files, offered beside the known ones |
| FLUX2_LORAS_DIR | a folder of LoRAs, as ComfyUI's models/loras (default: loras in FLUX2_HOME) |
| FLUX2_DEVICE | auto, cuda, cuda:1, mps or cpu |
| FLUX2_DTYPE | auto, float32, bfloat16 or float16 |
| FLUX2_QUANTIZE | off, fp8 or int8: hold transformer and text encoder in 8 bits, made when they are loaded |
| FLUX2_COMPILE | auto, on or off: compile the transformer's blocks, see `models/background_compiler.py` |
| FLUX2_GRAPHS | on or off: record small runs as CUDA graphs, see `models/graph_runs.py` |
| FLUX2_MEMORY | gigabytes of the device's memory that the studio may take (default: what is free) |
| FLUX2_PREVIEW | tiny (a small decoder), linear (rough colours, no extra weights) or off |
| FLUX2_TEXT_ENCODER_URL | the address of a text encoder on another machine, see `models/remote_text.py` |
| FLUX2_TEXT_ENCODER_TOKEN | the token that it asks for |
| FLUX2_TEXT_ENCODER_FOR | the checkpoint whose text encoder it has; all that share that encoder use it (default: dev) |
| FLUX2_ENCODE_TOKEN | the token that our own `encode-server` asks for |
| FLUX2_UPSAMPLE | none, local or openrouter: who enriches prompts for new pictures when nothing is chosen |
| FLUX2_OPENROUTER_URL | the OpenAI-compatible server that enriches prompts (default: OpenRouter's) |
| FLUX2_OPENROUTER_MODEL | the model that is asked there when none is chosen |
| OPENROUTER_API_KEY | the key that it asks for |
| FLUX2_C2PA_CERTIFICATE | one's own certificate chain that signs pictures, PEM (default: a local identity, made once) |
| FLUX2_C2PA_KEY | its private key, PEM, not encrypted |
| FLUX2_WATERMARK_MESSAGE | what the invisible watermark says: 4 to 16 characters, or 0x and 8 to 32 hex digits |
| FLUX2_SAFETY | auto, on, warn or off: what the safety check does (default: auto, see `safety/policy.py`) |
| FLUX2_NSFW_MODEL_PATH | a folder with Falconsai/nsfw_image_detection, which then checks pictures |
| *_MODEL_PATH | a local copy of one part, named as in `checkpoints.py` (the official command line's names) |

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

# In a repository both folders stand beside the package, in an installed wheel inside it.
_PACKAGE = Path(__file__).resolve().parent
ASSETS = _PACKAGE / "assets" if (_PACKAGE / "assets").is_dir() else _PACKAGE.parent / "assets"
PRESETS = ASSETS.parent / "presets"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One installation's choices. Build it with `Settings.from_environment()`, or by hand in tests."""

    home: Path
    assets: Path = ASSETS
    presets: Path = PRESETS
    checkpoints: tuple[Checkpoint, ...] = CHECKPOINTS
    default_checkpoint: str = "nano"
    checkpoints_dir: Path | None = None  # whose files `models.own` adds to `checkpoints`
    loras_dir: Path | None = None  # None: `home`/loras
    path_overrides: Mapping[str, Path] = field(default_factory=dict)  # variable -> local file or folder
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    quantize: QuantizeMode = "off"
    compile: CompileMode = "auto"
    graphs: GraphsMode = "off"
    memory_limit_gb: float | None = None  # gigabytes
    preview: PreviewKind = "tiny"
    text_encoder_url: str | None = None
    text_encoder_token: str | None = field(default=None, repr=False)
    text_encoder_for: str = "dev"
    encode_token: str | None = field(default=None, repr=False)
    upsample: UpsamplingBackend = "none"
    openrouter_url: str = "https://openrouter.ai/api/v1"
    openrouter_model: str | None = None
    openrouter_key: str | None = field(default=None, repr=False)
    c2pa_certificate: Path | None = None  # None: the local identity in `identity`
    c2pa_key: Path | None = None
    watermark_message: str | None = None  # None: Black Forest Labs' published one
    safety: SafetyMode = "auto"
    nsfw_model: Path | None = None
    on_space: bool = False  # running as a Hugging Face Space

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the variables of the module's table; an empty one counts as unset.

        Raises `StudioError` for a value that is not allowed.
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
        if settings.checkpoints_dir is None:  # otherwise it may be one of that folder's
            settings.checkpoint(settings.default_checkpoint)
        return settings

    @property
    def outputs(self) -> Path:
        """The folder under which finished pictures are saved."""
        return self.home / "outputs"

    @property
    def database(self) -> Path:
        """The file in which jobs and history are kept."""
        return self.home / "studio.sqlite3"

    @property
    def trash(self) -> Path:
        """The folder where deleted pictures wait for a day: beside `outputs`, so that moving one is a rename."""
        return self.home / "trash"

    @property
    def thumbnails(self) -> Path:
        """The folder of small copies for lists, which are made again where they are missing."""
        return self.home / "thumbnails"

    @property
    def queue(self) -> Path:
        """Where waiting runs keep their references."""
        return self.home / "queue"

    @property
    def references(self) -> Path:
        """The folder where references are kept, so that pictures made from them can be made again."""
        return self.home / "references"

    @property
    def compile_cache(self) -> Path:
        """The folder where torch keeps what it compiled, from one start to the next."""
        return self.home / "compiled"

    @property
    def identity(self) -> Path:
        """The folder of the identity that signs pictures where the user has none of their own."""
        return self.home / "identity"

    def uses_remote_text_encoder(self, checkpoint: Checkpoint) -> bool:
        """Whether the prompts of `checkpoint` go to the text encoder at `text_encoder_url`.

        They do where it has the same text encoder as `text_encoder_for`: a user's own quantised file of dev, too.
        """
        if self.text_encoder_url is None:
            return False
        served = next(it for it in CHECKPOINTS if it.name == self.text_encoder_for)
        return (checkpoint.text, checkpoint.recipe) == (served.text, served.recipe)

    @property
    def loras(self) -> Path:
        """The folder where users put LoRAs."""
        return self.loras_dir or self.home / "loras"

    @property
    def wildcards(self) -> Path:
        """The folder of the lists that prompts may name."""
        return self.home / "wildcards"

    def set_environment_defaults(self) -> None:
        """Set what libraries read from the environment, where the user has not; call it before torch is imported.

        Gradio keeps uploads, and copies of what it shows, under `home`; torch what it compiles. OpenMP's threads sleep
        while they wait: spinning, they starve each other as soon as another program wants a core.
        """
        os.environ.setdefault("GRADIO_TEMP_DIR", str(self.home / "uploads"))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.compile_cache))
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def checkpoint(self, name: str | None) -> Checkpoint:
        """The checkpoint called `name`, the default one for None. Raises `RequestError` for an unknown name."""
        wanted = self.default_checkpoint if name is None else name
        for checkpoint in self.checkpoints:
            if checkpoint.name == wanted:
                return checkpoint
        known = ", ".join(checkpoint.name for checkpoint in self.checkpoints)
        raise RequestError(f"There is no checkpoint called {wanted!r}. Choose one of: {known}.")


def _url(env: Mapping[str, str], name: str) -> str | None:
    value = env.get(name)
    if not value:
        return None
    try:
        parts = urlsplit(value)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # no number as the port, half a pair of brackets
        fits = False
    # What is wrong is not repeated: it may hold a secret.
    if not fits or not re.fullmatch(r"[!-~]+", value):
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
