"""What a user asks for. The page, the command line and every other caller build a `Request`."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, Literal, get_args

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import RequestError

SIZE_MULTIPLE = 16  # pixels along one side of a latent token
MIN_SIDE = 64
MAX_COUNT = 16
MAX_SEED = 2**32 - 1
MAX_PROMPT = 20_000  # characters; far beyond what any text encoder reads
MAX_LORAS = 16
MAX_LORA_WEIGHT = 4.0  # absolute value; with more, LoRAs give only noise
MAX_MARGIN = 8192  # pixels that outpainting may add to one side; checkpoints draw less
MAX_NAME = 250  # characters of the name of a LoRA or of a language model

ImageFormat = Literal["png", "jpeg", "webp"]
UpsamplingBackend = Literal["none", "local", "openrouter"]
# Sampling settings of language models, as in the OpenAI API. Temperature 0 is greedy; top_p is nucleus sampling.
SAMPLING_LIMITS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.01, 1.0),
    "max_tokens": (16, 8192),
}


@dataclass(frozen=True, kw_only=True)
class LoraChoice:
    """A LoRA, named as `models.loras` lists it, and its weight: 1 is its full effect, 0 none.

    Raises `RequestError` for a weight out of range or an invalid name.
    """

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and is_lora_name(self.name)):
            raise RequestError(f"{str(self.name)[:MAX_NAME]!r} is no LoRA's name: choose one of the list.")
        is_number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not (is_number and abs(self.weight) <= MAX_LORA_WEIGHT):
            raise RequestError(
                f"The weight of the LoRA {self.name} must be a number from {-MAX_LORA_WEIGHT:g} to "
                f"{MAX_LORA_WEIGHT:g}, not {self.weight!r}."
            )


def is_lora_name(name: str) -> bool:
    """Return whether `name` is a plain relative path with / between folders, without empty, . or .. parts."""
    plain = name.isprintable() and name == name.strip() and "\\" not in name
    return 0 < len(name) <= MAX_NAME and plain and not {"", ".", ".."} & set(name.split("/"))


@dataclass(frozen=True, kw_only=True)
class Upsampling:
    """Which language model enhances the prompt first: none, one on this machine, or one behind OpenRouter or another
    OpenAI-compatible server.

    model: a `LocalWriter`'s name, or the server's name for it. None uses the default for this field and for each of the
    sampling settings. Raises `RequestError` for values that no model accepts.
    """

    by: UpsamplingBackend = "none"
    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.by not in get_args(UpsamplingBackend):
            raise RequestError(
                f"Upsample with one of {', '.join(get_args(UpsamplingBackend))}, not {str(self.by)[:50]!r}."
            )
        if self.model is not None and not (
            isinstance(self.model, str) and 0 < len(self.model.strip()) <= MAX_NAME and self.model.isprintable()
        ):
            raise RequestError("Choose a language model or type its name, or generate without enhancing.")
        for name, (low, high) in SAMPLING_LIMITS.items():
            value = getattr(self, name)
            is_number = isinstance(value, int if name == "max_tokens" else int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and low <= value <= high):
                raise RequestError(f"Set the language model's {name} to a number from {low:g} to {high:g}.")


@dataclass(frozen=True, kw_only=True)
class Outpaint:
    """How many pixels a picture grows by on each side. Raises `RequestError` for anything but 0 to `MAX_MARGIN`."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def __post_init__(self) -> None:
        for side, pixels in vars(self).items():
            is_integer = isinstance(pixels, int) and not isinstance(pixels, bool)
            if not (is_integer and 0 <= pixels <= MAX_MARGIN):
                raise RequestError(
                    f"To outpaint, give the pixels on the {side} as a whole number from 0 to {MAX_MARGIN}, not "
                    f"{str(pixels)[:50]!r}."
                )

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def grown(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (width, height) of a picture of `size` after growing."""
        return size[0] + self.left + self.right, size[1] + self.top + self.bottom

    def shrunk(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size that grows to `size`; a side is 0 or less if there is no such size."""
        return size[0] - self.left - self.right, size[1] - self.top - self.bottom


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run: `count` pictures of `prompt`, each from `references` (none: text to image; one: an edit; more:
    combined).

    None means that the checkpoint, the first reference or chance decides; `resolve` returns a request with no None left
    except `mask`. Picture i is drawn with seed + i. The pictures are saved as `format`, with an invisible watermark
    (`watermark`), with the settings that made them (`metadata`) and signed (`sign`). The signed credentials contain the
    prompt only with `sign_prompt`. Raises `RequestError` for what no checkpoint can do.

    mask: a picture that is white where the first reference may change; every other pixel keeps its value. outpaint: the
    first reference grows, and only the new margin and the white part of the mask are drawn. match_colours: the result
    gets the colour statistics of the first reference.
    """

    prompt: str
    negative_prompt: str | None = None
    checkpoint: str | None = None
    references: tuple[Path, ...] = ()
    mask: Path | None = None
    outpaint: Outpaint = Outpaint()
    match_colours: bool = False
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    count: int = 1
    loras: tuple[LoraChoice, ...] = ()
    upsampling: Upsampling = Upsampling()
    format: ImageFormat = "png"
    watermark: bool = True
    metadata: bool = True
    sign: bool = True
    sign_prompt: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise RequestError("Write a prompt first: say what the picture should show or how it should change.")
        if not isinstance(self.negative_prompt, str | None) or not isinstance(self.checkpoint, str | None):
            raise RequestError("The negative prompt and the checkpoint's name must be texts.")
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt or "")):
            if len(text) > MAX_PROMPT:
                raise RequestError(f"The {name} has {len(text):,} characters; shorten it to {MAX_PROMPT:,} at most.")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise RequestError(f"The {name} holds broken characters (lone surrogates): type or paste it again.")
        for name in ("width", "height", "steps", "seed", "count"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise RequestError(f"{name} must be a whole number, not {value!r}.")
        is_number = isinstance(self.guidance, int | float) and not isinstance(self.guidance, bool)
        if self.guidance is not None and not (is_number and abs(self.guidance) < 1e6):
            raise RequestError(f"guidance must be a number, not {self.guidance!r}.")
        if not 1 <= self.count <= MAX_COUNT:
            raise RequestError(f"Choose between 1 and {MAX_COUNT} pictures a run, not {self.count}.")
        last_seed = MAX_SEED - self.count + 1  # the seed of every picture must itself be a valid request seed
        if self.seed is not None and not 0 <= self.seed <= last_seed:
            raise RequestError(f"Choose a seed between 0 and {last_seed}, not {self.seed}.")
        if self.format not in get_args(ImageFormat):
            raise RequestError(f"Save as one of {', '.join(get_args(ImageFormat))}, not {str(self.format)[:50]!r}.")
        if not isinstance(self.mask, Path | None) or not isinstance(self.outpaint, Outpaint):
            raise RequestError("The mask must be a picture's file, and outpaint a number of pixels for each side.")
        for name in ("match_colours", "watermark", "metadata", "sign", "sign_prompt"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, not {str(getattr(self, name))[:50]!r}.")
        if len(self.loras) > MAX_LORAS:
            raise RequestError(f"Choose at most {MAX_LORAS} LoRAs, not {len(self.loras)}.")
        names = [choice.name for choice in self.loras]
        for name in names:
            if names.count(name) > 1:
                raise RequestError(f"The LoRA {name} is chosen twice: keep one of them, with the weight that you want.")

    def resolve(self, checkpoint: Checkpoint, reference_sizes: Sequence[tuple[int, int]] = ()) -> Request:
        """Return this request with every None decided; resolving a resolved request changes nothing.

        reference_sizes: (width, height) in pixels of each reference after scaling to the checkpoint's cap. Without a
        width and a height the picture gets exactly the size of the first one, grown by `outpaint`. That size is also
        kept exactly if it is requested; any other is rounded to the nearest multiple of 16. Raises `RequestError` for
        what `checkpoint` cannot do, also if steps or guidance differ from values that distillation fixed.
        """
        if not self.references and (self.mask or self.outpaint or self.match_colours):
            raise RequestError(
                "A mask, outpainting and matched colours need a picture to edit: add one, or do without them."
            )
        if len(self.references) > checkpoint.max_references:
            raise RequestError(
                f"{checkpoint.label} takes at most {checkpoint.max_references} references, not "
                f"{len(self.references)}: remove some."
            )
        width, height = self._size(checkpoint, reference_sizes)
        padded_width, padded_height = padded_size(width, height)
        if padded_width * padded_height > checkpoint.max_pixels:
            raise RequestError(
                f"{width} x {height} is too large for {checkpoint.label}: it goes up to "
                f"{checkpoint.max_pixels / 1e6:.1f} megapixels (for example "
                f"{math.isqrt(checkpoint.max_pixels)} x {math.isqrt(checkpoint.max_pixels)})."
            )
        if self.negative_prompt and not checkpoint.supports_negative_prompt:
            raise RequestError(
                f"{checkpoint.label} does not use a negative prompt: leave it empty, or choose a Base checkpoint."
            )
        steps = _in_range(checkpoint, "steps", self.steps, 1, checkpoint.max_steps, fixed=checkpoint.steps_fixed)
        guidance = _in_range(
            checkpoint, "guidance", self.guidance, 1.0, checkpoint.max_guidance, fixed=checkpoint.guidance_fixed
        )
        return replace(
            self,
            checkpoint=checkpoint.name,
            negative_prompt=self.negative_prompt or "",
            width=width,
            height=height,
            steps=int(steps),
            guidance=float(guidance),
            seed=secrets.randbelow(MAX_SEED - MAX_COUNT) if self.seed is None else self.seed,
        )

    def _size(self, checkpoint: Checkpoint, reference_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        if not reference_sizes:
            default = size_for_aspect(1, 1, checkpoint.default_pixels)
        else:
            default = self.outpaint.grown(reference_sizes[0])
        size = default[0] if self.width is None else self.width, default[1] if self.height is None else self.height
        if reference_sizes and size == default:
            return size
        if reference_sizes and (self.mask or self.outpaint):
            raise RequestError(
                f"With a mask or outpainting the picture keeps its scale, which gives {default[0]} x {default[1]}, not "
                f"{size[0]} x {size[1]}: leave width and height to the picture, on the page by the shape As image 1."
            )
        return round_side(size[0], "width"), round_side(size[1], "height")

    @property
    def padded_size(self) -> tuple[int, int]:
        """The (width, height) that the engine draws; the picture is its upper left part. Needs a resolved request."""
        assert self.width and self.height, "resolve the request first"
        return padded_size(self.width, self.height)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each picture. Needs a resolved request."""
        assert self.seed is not None, "resolve the request first"
        return tuple(self.seed + i for i in range(self.count))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; paths become strings."""
        fields = dict(vars(self))
        fields["mask"] = str(self.mask) if self.mask else None
        fields["outpaint"] = asdict(self.outpaint)
        fields["references"] = [str(path) for path in self.references]
        fields["loras"] = [asdict(choice) for choice in self.loras]
        fields["upsampling"] = asdict(self.upsampling)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Request:
        """Return the request in `fields`, from `as_dict` or written by hand. Raises `RequestError` if it is invalid."""
        values = dict(fields)
        unknown = values.keys() - {field.name for field in fields_of(cls)}
        if unknown:
            raise RequestError(f"A request has no field {min(map(str, unknown))[:MAX_NAME]!r}: leave it out.")
        try:
            values["references"] = tuple(Path(path) for path in values.get("references", ()))
            values["mask"] = Path(values["mask"]) if values.get("mask") else None
            values["outpaint"] = Outpaint(**values.get("outpaint", {}))
            values["loras"] = tuple(LoraChoice(**entry) for entry in values.get("loras", ()))
            values["upsampling"] = Upsampling(**values.get("upsampling", {}))
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise RequestError(
                "That is no request: it needs a prompt, a list of file names as references, a file name as mask, "
                '{"left": ..., ...} as outpaint, a list of {"name": ..., "weight": ...} as LoRAs, and {"by": ...} as '
                "upsampling."
            ) from error


def round_side(pixels: int, name: str) -> int:
    """Round `pixels` to the nearest multiple of 16. Raises `RequestError` below 64."""
    if pixels < MIN_SIDE:
        raise RequestError(f"The {name} must be at least {MIN_SIDE} pixels, not {pixels}.")
    return max(MIN_SIDE, (pixels + SIZE_MULTIPLE // 2) // SIZE_MULTIPLE * SIZE_MULTIPLE)


def padded_size(width: int, height: int) -> tuple[int, int]:
    """Round both sides up to multiples of 16: the size that the engine draws for such a picture."""
    return -(-width // SIZE_MULTIPLE) * SIZE_MULTIPLE, -(-height // SIZE_MULTIPLE) * SIZE_MULTIPLE


def size_for_aspect(across: float, down: float, pixels: int) -> tuple[int, int]:
    """Return the (width, height) in multiples of 16 with aspect ratio across:down and an area near `pixels`."""
    height = math.sqrt(pixels * down / across)
    width = height * across / down
    width, height = (max(MIN_SIDE, round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE) for side in (width, height))
    return width, height


def describe_changes(asked: Request, resolved: Request) -> tuple[str, ...]:
    """Return sentences for the user about what resolving changed; () if nothing."""
    notes = []
    for name in ("width", "height"):
        before, after = getattr(asked, name), getattr(resolved, name)
        if before is not None and before != after:
            notes.append(
                f"The {name} was rounded from {before} to {after}: FLUX.2 draws in multiples of {SIZE_MULTIPLE}."
            )
    return tuple(notes)


def _in_range(checkpoint: Checkpoint, name: str, value: float | None, low: float, high: float, *, fixed: bool) -> float:
    """Return `value`, or the checkpoint's default for None. Raises `RequestError` outside low..high, or if it differs
    from a fixed default."""
    default: float = getattr(checkpoint, name)
    if value is None:
        return default
    if fixed and value != default:
        raise RequestError(
            f"{checkpoint.label} always runs with {name} {default:g}: leave {name} as it is, or choose another "
            f"checkpoint to change it."
        )
    if not low <= value <= high:
        raise RequestError(f"{checkpoint.label} takes {name} from {low:g} to {high:g}, not {value:g}.")
    return value
