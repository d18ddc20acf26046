"""The checkpoints that the studio knows, as data.

A `Checkpoint` consists of `Part`s: sets of weights. Parts are hashable and compared by value, so checkpoints that have
a part in common (all FLUX.2 checkpoints have the autoencoder) share it in memory too. Sizes, licences and repositories
come from the model cards (black-forest-labs on the Hugging Face hub, 2025-11 to 2026-08).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flux2_studio.engine.params import TextRecipe

PartKind = Literal["flow", "text", "autoencoder", "tiny autoencoder"]
GuidanceMode = Literal["none", "cfg", "embedded"]

PART_LABELS: dict[PartKind, str] = {  # shown to users
    "flow": "transformer",
    "text": "text encoder",
    "autoencoder": "autoencoder",
    "tiny autoencoder": "small decoder of the previews",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One set of weights. Also the key under which it is cached in memory.

    `repo` is the hub repository. With None, the part ships with the studio and `path` is relative to assets/, or it is
    the user's own file and `path` is absolute. `path` is a file, or a folder for text encoders. `path_variable` is the
    environment variable that names a local copy.
    """

    kind: PartKind
    repo: str | None
    path: str
    size: int  # approximate download size in bytes
    path_variable: str | None = None
    tokenizer: tuple[str | None, str] | None = None  # (repo, folder); text parts only
    gated: bool = False  # the repository requires an accepted licence and a token


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One model that a user can choose, with its defaults and limits.

    `steps_fixed` and `guidance_fixed` mark values fixed by distillation: the user sees them but cannot change them.
    Pixel limits are areas (width x height). `context_width` and `name_keywords` match a user's own file to a known
    checkpoint. The width is that of its tensors, the keywords are those of its file name, because no tensor
    distinguishes a Base checkpoint from a distilled one. `hidden_width` determines which LoRAs fit.
    """

    name: str
    label: str
    good_for: str
    flow: Part
    text: Part
    recipe: TextRecipe
    autoencoder: Part
    tiny_autoencoder: Part  # decodes previews; may be the autoencoder itself
    steps: int
    guidance: float
    guidance_mode: GuidanceMode
    licence: str
    licence_url: str
    context_width: int  # features per text token at the transformer's input
    hidden_width: int  # hidden size of the transformer
    name_keywords: tuple[str, ...] = ()
    steps_fixed: bool = False
    guidance_fixed: bool = False
    caches_reference_kv: bool = False  # trained so that reference keys and values can be reused between steps
    max_steps: int = 100
    max_guidance: float = 10.0
    max_references: int = 10
    default_pixels: int = 1024 * 1024
    max_pixels: int = 2048 * 2048
    single_reference_pixels: int = 2024 * 2024  # limit for a single reference
    multi_reference_pixels: int = 1024 * 1024  # limit for each of several references
    is_toy: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.text, self.flow, self.autoencoder)

    @property
    def gated(self) -> bool:
        return any(part.gated for part in self.parts)

    @property
    def supports_live(self) -> bool:
        """Whether Live mode is offered: the checkpoint is distilled to at most four steps."""
        return self.steps_fixed and self.steps <= 4

    @property
    def supports_negative_prompt(self) -> bool:
        return self.guidance_mode == "cfg"

    def max_pixels_per_reference(self, references: int) -> int:
        """Returns the pixel area to which each of `references` pictures is scaled down."""
        return self.single_reference_pixels if references <= 1 else self.multi_reference_pixels


@dataclass(frozen=True, kw_only=True)
class LocalWriter:
    """A text encoder whose complete language model can also write, and so enhance prompts.

    `part` and `recipe` are equal to those of the checkpoints that use it as their text encoder. `has_vision`: whether
    it can look at references. `temperature` and `top_p` are the values that its authors recommend.
    """

    name: str
    label: str
    part: Part
    recipe: TextRecipe
    has_vision: bool
    temperature: float
    top_p: float


GB = 10**9
MB = 10**6
_APACHE = ("Apache 2.0", "https://www.apache.org/licenses/LICENSE-2.0")
_NON_COMMERCIAL = "FLUX non-commercial licence"

_AUTOENCODER = Part(
    kind="autoencoder",
    repo="black-forest-labs/FLUX.2-klein-4B",  # the same weights as FLUX.2-dev's ae.safetensors, without the gate
    path="vae/diffusion_pytorch_model.safetensors",
    size=336 * MB,
    path_variable="AE_MODEL_PATH",
)
_TAEF2 = Part(
    kind="tiny autoencoder",
    repo="madebyollin/taef2",
    path="taef2.safetensors",
    size=5 * MB,
    path_variable="TAEF2_MODEL_PATH",
)
_QWEN3_4B = Part(
    kind="text",
    repo="black-forest-labs/FLUX.2-klein-4B",
    path="text_encoder",
    tokenizer=("black-forest-labs/FLUX.2-klein-4B", "tokenizer"),
    size=8 * GB,
    path_variable="QWEN3_4B_MODEL_PATH",
)
_QWEN3_8B = Part(
    kind="text",
    repo="Qwen/Qwen3-8B",  # the same weights as text_encoder/ in the gated klein 9B repositories, without the gate
    path="",
    tokenizer=("Qwen/Qwen3-8B", ""),
    size=16 * GB,
    path_variable="QWEN3_8B_MODEL_PATH",
)
_MISTRAL = Part(
    kind="text",
    repo="mistralai/Mistral-Small-3.2-24B-Instruct-2506",
    path="",
    # 3.2 has no processor in the transformers layout; the official code uses the one of 3.1
    tokenizer=("mistralai/Mistral-Small-3.1-24B-Instruct-2503", ""),
    size=48 * GB,
    path_variable="MISTRAL_MODEL_PATH",
)
_NANO_AUTOENCODER = Part(kind="autoencoder", repo=None, path="nano/ae.safetensors", size=4 * MB)

_QWEN3_RECIPE = TextRecipe(hidden_layers=(9, 18, 27), length=512, padding_side="right", generation_prompt=True)
_MISTRAL_RECIPE = TextRecipe(
    hidden_layers=(10, 20, 30),
    length=512,
    padding_side="left",
    generation_prompt=False,
    # FLUX.2-dev was trained with exactly this system message, including the line break.
    system_prompt=(
        "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
        "relationships, object\nattribution and actions without speculation."
    ),
    content_as_parts=True,
    removed_tokens=("[IMG]",),
)


def _flow(repo: str, file: str, size: int, override: str, *, gated: bool) -> Part:
    return Part(
        kind="flow", repo=f"black-forest-labs/{repo}", path=file, size=size, path_variable=override, gated=gated
    )


# Nano was trained with 32 tokens, which is a short paragraph in its own vocabulary.
_NANO_RECIPE = TextRecipe(hidden_layers=(1, 2, 3), length=32, padding_side="right", generation_prompt=False)
_NANO_TEXT = Part(kind="text", repo=None, path="nano/text_encoder", tokenizer=(None, "nano/text_encoder"), size=5 * MB)

NANO = Checkpoint(
    name="nano",
    label="Nano (a toy, on board)",
    good_for=(
        "A toy that ships with the studio: 64 things drawn as small icons, at once and on any computer. "
        "For a first look; choose a klein for real pictures."
    ),
    flow=Part(kind="flow", repo=None, path="nano/transformer.safetensors", size=10 * MB),
    text=_NANO_TEXT,
    recipe=_NANO_RECIPE,
    autoencoder=_NANO_AUTOENCODER,
    tiny_autoencoder=_NANO_AUTOENCODER,
    steps=4,
    guidance=1.0,
    guidance_mode="none",
    steps_fixed=True,
    guidance_fixed=True,
    licence="Apache 2.0",
    licence_url=_APACHE[1],
    context_width=576,
    hidden_width=256,
    max_references=10,
    default_pixels=128 * 128,
    max_pixels=512 * 512,
    single_reference_pixels=256 * 256,
    multi_reference_pixels=128 * 128,
    is_toy=True,
)

NANO_BASE = Checkpoint(
    name="nano-base",
    label="Nano Base (a toy, on board)",
    good_for="The toy before distillation: takes guidance, a negative prompt and any number of steps, like klein Base.",
    flow=Part(kind="flow", repo=None, path="nano/transformer-base.safetensors", size=10 * MB),
    text=_NANO_TEXT,
    recipe=_NANO_RECIPE,
    autoencoder=_NANO_AUTOENCODER,
    tiny_autoencoder=_NANO_AUTOENCODER,
    steps=20,
    guidance=2.0,
    guidance_mode="cfg",
    licence="Apache 2.0",
    licence_url=_APACHE[1],
    context_width=576,
    hidden_width=256,
    name_keywords=("base",),
    max_references=10,
    default_pixels=128 * 128,
    max_pixels=512 * 512,
    single_reference_pixels=256 * 256,
    multi_reference_pixels=128 * 128,
    is_toy=True,
)

KLEIN_4B = Checkpoint(
    name="klein-4b",
    label="FLUX.2 klein 4B",
    good_for="The quick all-rounder: four steps, generates and edits, free for any use, needs no account.",
    flow=_flow("FLUX.2-klein-4B", "flux-2-klein-4b.safetensors", 7_750 * MB, "KLEIN_4B_MODEL_PATH", gated=False),
    text=_QWEN3_4B,
    recipe=_QWEN3_RECIPE,
    autoencoder=_AUTOENCODER,
    tiny_autoencoder=_TAEF2,
    steps=4,
    guidance=1.0,
    guidance_mode="none",
    steps_fixed=True,
    guidance_fixed=True,
    licence=_APACHE[0],
    licence_url=_APACHE[1],
    context_width=7680,
    hidden_width=3072,
)

KLEIN_9B = Checkpoint(
    name="klein-9b",
    label="FLUX.2 klein 9B",
    good_for="The best four-step pictures and edits; more detail and better text than 4B. Non-commercial.",
    flow=_flow("FLUX.2-klein-9B", "flux-2-klein-9b.safetensors", 18_160 * MB, "KLEIN_9B_MODEL_PATH", gated=True),
    text=_QWEN3_8B,
    recipe=_QWEN3_RECIPE,
    autoencoder=_AUTOENCODER,
    tiny_autoencoder=_TAEF2,
    steps=4,
    guidance=1.0,
    guidance_mode="none",
    steps_fixed=True,
    guidance_fixed=True,
    licence=_NON_COMMERCIAL,
    licence_url="https://huggingface.co/black-forest-labs/FLUX.2-klein-9B",
    context_width=12288,
    hidden_width=4096,
)

KLEIN_9B_KV = Checkpoint(
    name="klein-9b-kv",
    label="FLUX.2 klein 9B KV",
    good_for="Edits with several references: 9B that reads them once instead of at every step. Non-commercial.",
    flow=_flow(
        "FLUX.2-klein-9b-kv", "flux-2-klein-9b-kv.safetensors", 18_160 * MB, "KLEIN_9B_KV_MODEL_PATH", gated=True
    ),
    text=_QWEN3_8B,
    recipe=_QWEN3_RECIPE,
    autoencoder=_AUTOENCODER,
    tiny_autoencoder=_TAEF2,
    steps=4,
    guidance=1.0,
    guidance_mode="none",
    steps_fixed=True,
    guidance_fixed=True,
    caches_reference_kv=True,
    licence=_NON_COMMERCIAL,
    licence_url="https://huggingface.co/black-forest-labs/FLUX.2-klein-9b-kv",
    context_width=12288,
    hidden_width=4096,
    name_keywords=("kv",),
)

KLEIN_BASE_4B = Checkpoint(
    name="klein-base-4b",
    label="FLUX.2 klein Base 4B",
    good_for="Undistilled 4B: more varied, takes guidance and a negative prompt, needs many steps. Free for any use.",
    flow=_flow(
        "FLUX.2-klein-base-4B", "flux-2-klein-base-4b.safetensors", 7_750 * MB, "KLEIN_4B_BASE_MODEL_PATH", gated=False
    ),
    text=_QWEN3_4B,
    recipe=_QWEN3_RECIPE,
    autoencoder=_AUTOENCODER,
    tiny_autoencoder=_TAEF2,
    steps=50,
    guidance=4.0,
    guidance_mode="cfg",
    licence=_APACHE[0],
    licence_url=_APACHE[1],
    context_width=7680,
    hidden_width=3072,
    name_keywords=("base",),
)

KLEIN_BASE_9B = Checkpoint(
    name="klein-base-9b",
    label="FLUX.2 klein Base 9B",
    good_for="Undistilled 9B, for variety, guidance and a negative prompt at many steps. Non-commercial.",
    flow=_flow(
        "FLUX.2-klein-base-9B", "flux-2-klein-base-9b.safetensors", 18_160 * MB, "KLEIN_9B_BASE_MODEL_PATH", gated=True
    ),
    text=_QWEN3_8B,
    recipe=_QWEN3_RECIPE,
    autoencoder=_AUTOENCODER,
    tiny_autoencoder=_TAEF2,
    steps=50,
    guidance=4.0,
    guidance_mode="cfg",
    licence=_NON_COMMERCIAL,
    licence_url="https://huggingface.co/black-forest-labs/FLUX.2-klein-base-9B",
    context_width=12288,
    hidden_width=4096,
    name_keywords=("base",),
)

DEV = Checkpoint(
    name="dev",
    label="FLUX.2 dev",
    good_for="The largest open FLUX.2 (32B): the finest detail and typography, for the largest cards. Non-commercial.",
    flow=_flow("FLUX.2-dev", "flux2-dev.safetensors", 64_450 * MB, "FLUX2_MODEL_PATH", gated=True),
    text=_MISTRAL,
    recipe=_MISTRAL_RECIPE,
    autoencoder=_AUTOENCODER,
    tiny_autoencoder=_TAEF2,
    steps=50,
    guidance=4.0,
    guidance_mode="embedded",
    licence=_NON_COMMERCIAL,
    licence_url="https://huggingface.co/black-forest-labs/FLUX.2-dev",
    context_width=15360,
    hidden_width=6144,
)

CHECKPOINTS: tuple[Checkpoint, ...] = (
    NANO,
    NANO_BASE,
    KLEIN_4B,
    KLEIN_9B,
    KLEIN_9B_KV,
    KLEIN_BASE_4B,
    KLEIN_BASE_9B,
    DEV,
)

LOCAL_WRITERS: tuple[LocalWriter, ...] = (
    LocalWriter(
        name="qwen3-4b",
        label="Qwen3 4B",
        part=_QWEN3_4B,
        recipe=_QWEN3_RECIPE,
        has_vision=False,
        temperature=0.7,
        top_p=0.8,
    ),
    LocalWriter(
        name="qwen3-8b",
        label="Qwen3 8B",
        part=_QWEN3_8B,
        recipe=_QWEN3_RECIPE,
        has_vision=False,
        temperature=0.7,
        top_p=0.8,
    ),
    LocalWriter(
        name="mistral",
        label="Mistral Small 3.2 24B",
        part=_MISTRAL,
        recipe=_MISTRAL_RECIPE,
        has_vision=True,
        temperature=0.15,
        top_p=1.0,
    ),
)


def list_local_writers(checkpoint: Checkpoint) -> tuple[LocalWriter, ...]:
    """Returns the writers offered for `checkpoint`: its own text encoder, then those with vision; none for toys."""
    if checkpoint.is_toy:
        return ()
    own = [writer for writer in LOCAL_WRITERS if writer.part == checkpoint.text]
    return (*own, *(writer for writer in LOCAL_WRITERS if writer.has_vision and writer not in own))
