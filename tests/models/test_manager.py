"""Sessions: what is loaded for a request, what stays for the next one, and how parts are computed and held."""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux2_studio.checkpoints import DEV, GB, KLEIN_4B, KLEIN_BASE_4B, NANO, Checkpoint, Part
from flux2_studio.engine.runtime.processor import has_bfloat16
from flux2_studio.engine.vae.preview import AutoencoderPreview, LinearPreview, TinyPreview
from flux2_studio.engine.weights.loading import open_autoencoder, open_transformer
from flux2_studio.engine.weights.quantize import QuantizedLinear
from flux2_studio.errors import DeviceError, OutOfMemory, WeightsError
from flux2_studio.models.checkpoint_files import check_parts_match
from flux2_studio.models.hub.repositories import Hub, PartFiles, ProgressCallback
from flux2_studio.models.manager import ModelManager
from flux2_studio.models.memory.choices import choose_device, choose_dtype, choose_storage
from flux2_studio.models.memory.plan import DENOISING_STAGE, PROMPT_STAGE, STAGE_ORDER, RequestShape
from flux2_studio.models.session import Session
from flux2_studio.settings import Settings
from tests.tiny import Toys

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = RequestShape(width=64, height=64)


def silent(text: str, fraction: float | None) -> None:
    pass


def manager(settings: Settings, **fields: Any) -> ModelManager:
    return ModelManager(settings, Hub(settings), **fields)


def opened(models: ModelManager, checkpoint: Checkpoint, workload: RequestShape = SMALL) -> Session:
    return models.open(checkpoint, workload, silent)


def ran(models: ModelManager, checkpoint: Checkpoint) -> list[str]:
    """What is told while every stage of a run is gone through, of parts being loaded."""
    told: list[str] = []

    def progress(text: str, fraction: float | None) -> None:
        if fraction is None:  # what is told again, with how much of it is done, is one load
            told.append(text)

    session = models.open(checkpoint, SMALL, progress)
    session.encode_prompts([f"a prompt not seen before: {len(gc.get_objects())}"], progress)
    session.prepare_transformer(progress)
    session.decode(torch.zeros(1, 128, 4, 4), progress)
    return [text.rpartition(": ")[2] for text in told if text.startswith("Loading")]


ALL = ["text encoder", "transformer", "preview decoder", "autoencoder"]


def test_a_swap_moves_what_differs_and_both_stay_where_there_is_room(toys: Toys, tmp_path: Path) -> None:
    models = manager(toys.settings(tmp_path, ["klein-4b", "klein-base-4b", "dev"]))
    assert ran(models, KLEIN_4B) == ALL
    first = opened(models, KLEIN_4B).prepare_transformer(silent).transformer
    assert ran(models, KLEIN_BASE_4B) == ["transformer"], "the text encoder is the same, too"
    assert ran(models, DEV) == ["text encoder", "transformer"]
    assert [ran(models, it) for it in (KLEIN_4B, KLEIN_BASE_4B, DEV)] == [[], [], []]
    assert opened(models, KLEIN_4B).prepare_transformer(silent).transformer is first


def test_the_one_before_leaves_where_there_is_no_room(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b", "dev"])
    peaks = [opened(manager(settings), it).plan.peak for it in (KLEIN_4B, DEV)]
    models = manager(replace(settings, memory_limit_gb=1.03 * max(peaks) / GB))
    assert ran(models, KLEIN_4B) == ALL
    gone = weakref.ref(opened(models, KLEIN_4B).prepare_transformer(silent).transformer)
    assert ran(models, DEV) == ["text encoder", "transformer"], "what two checkpoints share is not moved"
    gc.collect()
    assert gone() is None
    assert "transformer" in ran(models, KLEIN_4B)


def test_a_part_that_left_holds_no_memory_for_whoever_has_it_still(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    models = manager(settings)
    drawn = opened(models, KLEIN_4B).prepare_transformer(silent)
    weight = weakref.ref(drawn.transformer.img_in.weight)
    models.release_all()
    assert weight() is None and drawn.transformer.img_in.weight.is_meta


BROKEN = ["truncated", "a missing tensor", "no text encoder", "an autoencoder for it"]


@pytest.mark.parametrize("wrong", BROKEN)
def test_a_failed_load_does_not_cost_the_checkpoint_in_use(toys: Toys, tmp_path: Path, wrong: str) -> None:
    settings = toys.settings(tmp_path, ["klein-4b", "dev"])
    broken = tmp_path / "broken.safetensors"
    overrides = dict(settings.path_overrides)
    match wrong:
        case "truncated":
            broken.write_bytes(toys.dev.file.read_bytes()[:1000])
            overrides["FLUX2_MODEL_PATH"] = broken
        case "a missing tensor":
            state = load_file(toys.dev.file)
            del state["single_blocks.0.linear1.weight"]
            save_file(state, broken)
            overrides["FLUX2_MODEL_PATH"] = broken
        case "no text encoder":
            overrides["MISTRAL_MODEL_PATH"] = tmp_path
        case "an autoencoder for it":
            overrides["FLUX2_MODEL_PATH"] = toys.autoencoder.file
    # No room for two: whoever made room before looking at the files would have driven the first one out.
    memory = 1.03 * opened(manager(settings), KLEIN_4B).plan.peak / GB
    models = manager(replace(settings, path_overrides=overrides, memory_limit_gb=memory))
    ran(models, KLEIN_4B)
    transformer = opened(models, KLEIN_4B).prepare_transformer(silent).transformer
    with pytest.raises(WeightsError):
        opened(models, DEV)
    assert ran(models, KLEIN_4B) == [], "nothing had to be loaded again"
    assert opened(models, KLEIN_4B).prepare_transformer(silent).transformer is transformer


def test_a_file_that_changed_is_opened_again(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    own = tmp_path / "own.safetensors"
    own.write_bytes(toys.klein.file.read_bytes())
    models = manager(replace(settings, path_overrides={**settings.path_overrides, "KLEIN_4B_MODEL_PATH": own}))
    ran(models, KLEIN_4B)
    state = load_file(own)
    state["img_in.weight"] = state["img_in.weight"] + 1
    save_file(state, own)
    assert ran(models, KLEIN_4B) == ["transformer"]
    assert opened(models, KLEIN_4B).prepare_transformer(silent).transformer.img_in.weight.equal(state["img_in.weight"])


def test_a_preview_that_cannot_be_had_is_not_asked_for_at_every_run(toys: Toys, tmp_path: Path) -> None:
    class Counting(Hub):
        asked = 0

        def find_or_download(self, part: Part, progress: ProgressCallback) -> PartFiles:
            self.asked += part.kind == "tiny autoencoder"
            return super().find_or_download(part, progress)

    settings = toys.settings(tmp_path, ["klein-4b"])
    hub = Counting(
        replace(settings, path_overrides={**settings.path_overrides, "TAEF2_MODEL_PATH": tmp_path / "nowhere"})
    )
    models = ModelManager(settings, hub)
    models.predict_plan(KLEIN_4B, RequestShape(width=64, height=64))
    assert hub.asked == 0, "a look ahead downloads nothing"
    assert [bool(opened(models, KLEIN_4B).notes) for _ in range(3)] == [True] * 3
    assert hub.asked == 1


def test_an_autoencoder_of_another_scale_is_refused(toys: Toys) -> None:
    transformer = open_transformer(toys.klein.file).params
    autoencoder = open_autoencoder(toys.autoencoder.file).params
    names = {"flow": "flow", "text": "text", "autoencoder": "ae.safetensors"}
    check_parts_match(KLEIN_4B, names, transformer, autoencoder, transformer.context_width)
    shallow = replace(autoencoder, encoder_channels=(32, 32, 32), decoder_channels=(32, 32, 32))
    for wrong in (shallow, replace(autoencoder, latent_channels=16)):
        with pytest.raises(WeightsError, match=r"ae\.safetensors makes latents"):
            check_parts_match(KLEIN_4B, names, transformer, wrong, transformer.context_width)


@pytest.mark.parametrize("part", ALL)
def test_giving_up_while_loading_leaves_a_manager_that_works(toys: Toys, tmp_path: Path, part: str) -> None:
    models = manager(toys.settings(tmp_path, ["klein-4b"]))

    def give_up(text: str, fraction: float | None) -> None:
        if text.endswith(part):
            raise KeyboardInterrupt

    session = opened(models, KLEIN_4B)
    with pytest.raises(KeyboardInterrupt):
        session.encode_prompts(["a fox"], give_up)
        session.prepare_transformer(give_up)
        session.decode(torch.zeros(1, 128, 4, 4), give_up)
    assert ran(models, KLEIN_4B)[0] == part, "what came before is there, and what was given up is not"
    assert ran(models, KLEIN_4B) == []


def test_what_is_loaded_ahead_is_all_or_what_the_first_stage_needs(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    models = manager(settings)
    session = opened(models, KLEIN_4B)
    session.preload(silent)
    assert ran(models, KLEIN_4B) == []
    apart = manager(replace(settings, memory_limit_gb=1.0 * (session.plan.peak - 1) / GB))
    session = opened(apart, KLEIN_4B)
    assert not session.plan.is_resident
    session.preload(silent)
    assert ran(apart, KLEIN_4B) == ["transformer", "preview decoder", "autoencoder"]


def test_the_outlook_is_the_plan_that_a_run_gets(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    whole = manager(settings).predict_plan(KLEIN_4B, SMALL)
    assert whole.is_resident and "everything stays in this machine's memory" in whole.describe("this machine")
    models = manager(replace(settings, memory_limit_gb=1.0 * (whole.peak - 1) / GB))
    assert models.predict_plan(KLEIN_4B, SMALL) == opened(models, KLEIN_4B).plan != whole
    with pytest.raises(OutOfMemory, match="FLUX2_MEMORY"):
        manager(replace(settings, memory_limit_gb=0.0001)).predict_plan(KLEIN_4B, SMALL)


def test_a_plan_after_one_that_ran_out_is_leaner(toys: Toys, tmp_path: Path) -> None:
    """By a quarter, or where that cannot be, as much as can be."""
    models = manager(toys.settings(tmp_path, ["klein-4b"]))
    plans = [models.predict_plan(KLEIN_4B, RequestShape(width=256, height=256))]
    with pytest.raises(OutOfMemory):
        while True:
            plans.append(models.open(KLEIN_4B, RequestShape(width=256, height=256), silent, failed_plan=plans[-1]).plan)
    peaks = [plan.peak for plan in plans]
    assert len(peaks) > 1 and all(leaner < peak for peak, leaner in itertools.pairwise(peaks))


def test_prompts_and_references_outlive_the_weights_that_read_them(toys: Toys, tmp_path: Path) -> None:
    models = manager(toys.settings(tmp_path, ["klein-4b"]))
    workload = replace(SMALL, references=((64, 48),))
    picture = Image.linear_gradient("L").convert("RGB").resize((64, 48))

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        session = opened(models, KLEIN_4B, workload)
        return session.encode_prompts(["a fox"], told).context, session.encode_reference(picture, told)

    def told(text: str, fraction: float | None) -> None:
        heard.append(text)

    heard: list[str] = []
    context, latent = read()
    assert heard and latent.shape == (1, 128, 3, 4)
    models.release_all()
    heard.clear()
    again = read()
    assert not heard and again[0].equal(context) and again[1].equal(latent)


def test_stages_have_their_parts_together_and_no_more_than_the_plan_allows(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    plan = manager(settings).predict_plan(KLEIN_4B, SMALL)
    assert [stage.name for stage in plan.stages] == [name for name in STAGE_ORDER if name != "references"]
    assert (
        plan.stage(PROMPT_STAGE).resident_parts
        == ("autoencoder", "flow", "text", "tiny")
        == plan.stage(DENOISING_STAGE).resident_parts
    )


@pytest.mark.parametrize(
    ("checkpoint", "preview", "kind"),
    [
        ("klein-4b", "tiny", TinyPreview),
        ("klein-4b", "linear", LinearPreview),
        ("nano", "tiny", AutoencoderPreview),
        ("nano", "linear", AutoencoderPreview),
        ("nano", "off", type(None)),
    ],
)
def test_the_previewer_is_the_one_that_was_set(
    toys: Toys, tmp_path: Path, checkpoint: str, preview: str, kind: type
) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"], preview=preview)
    session = opened(manager(settings), settings.checkpoint(checkpoint))
    assert isinstance(session.prepare_transformer(silent).previewer, kind) and session.notes == ()


def test_a_checkpoint_is_on_disk_when_all_its_parts_are(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    assert manager(settings).is_on_disk(KLEIN_4B) and manager(settings).is_on_disk(NANO)
    fewer = {name: path for name, path in settings.path_overrides.items() if name != "QWEN3_4B_MODEL_PATH"}
    hub = Hub(replace(settings, path_overrides=fewer), cache=tmp_path / "empty")
    assert not ModelManager(settings, hub).is_on_disk(KLEIN_4B)


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("tpu", "cuda:99", "cpuu", "", "meta"):
        with pytest.raises(DeviceError, match=r"Choose|There is no|has no"):
            choose_device(name)


def test_precision() -> None:
    natively = torch.bfloat16 if has_bfloat16() else torch.float32
    assert choose_dtype("auto", CPU, NANO, NANO.flow) is torch.float32
    assert choose_dtype("auto", CPU, KLEIN_4B, KLEIN_4B.flow) is natively
    assert choose_dtype("bfloat16", CPU, KLEIN_4B, KLEIN_4B.flow) is torch.bfloat16
    assert choose_dtype("auto", CPU, KLEIN_4B, KLEIN_4B.tiny_autoencoder) is torch.float32
    assert choose_dtype("bfloat16", CUDA, KLEIN_4B, KLEIN_4B.tiny_autoencoder) is torch.float16
    assert choose_dtype("float16", CUDA, KLEIN_4B, KLEIN_4B.flow) is torch.float16
    assert choose_dtype("float16", CUDA, KLEIN_4B, KLEIN_4B.text) is torch.bfloat16
    assert choose_dtype("float32", CUDA, KLEIN_4B, KLEIN_4B.autoencoder) is torch.float32
    assert choose_dtype("auto", CPU, KLEIN_4B, KLEIN_4B.autoencoder) is natively
    assert choose_dtype("bfloat16", CPU, KLEIN_4B, KLEIN_4B.autoencoder) is natively
    assert choose_dtype("bfloat16", CUDA, KLEIN_4B, KLEIN_4B.autoencoder) is torch.bfloat16
    # A text encoder is the same for whoever shares it: a small file of one's own, or a prompt that is enhanced.
    few_bits = replace(KLEIN_4B, flow=replace(KLEIN_4B.flow, size=GB))
    assert choose_dtype("auto", CPU, few_bits, few_bits.flow) is torch.float32
    assert choose_dtype("auto", CPU, few_bits, few_bits.text) is natively
    assert choose_dtype("auto", CPU, None, few_bits.text) is natively
    assert choose_dtype("auto", CPU, NANO, NANO.text) is torch.float32


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
def test_quantising_takes_the_large_parts_and_leaves_the_rest(toys: Toys, tmp_path: Path, quantize: str) -> None:
    plain = toys.settings(tmp_path, ["klein-4b"])
    small, whole = (
        opened(manager(settings), KLEIN_4B)
        for settings in (replace(plain, quantize=quantize), plain)  # type: ignore[arg-type]
    )

    def matrices(session: Session) -> int:
        return sum(
            isinstance(module, QuantizedLinear) for module in session.prepare_transformer(silent).transformer.modules()
        )

    assert matrices(small) > 10 and matrices(whole) == 0
    latent = torch.randn(1, 128, 4, 4)
    assert small.decode(latent, silent).equal(whole.decode(latent, silent)), "the autoencoder is not quantised"
    context, exact = (session.encode_prompts(["a fox"], silent).context for session in (small, whole))
    error = float((context - exact).norm() / exact.norm())
    assert 0 < error < 0.15, "the text encoder is quantised too"
    assert small.plan.peak < whole.plan.peak


@pytest.mark.parametrize(
    ("quantize", "device", "part", "storage"),
    [
        ("off", "cuda", KLEIN_4B.flow, "stored"),
        ("off", "mps", KLEIN_4B.flow, "plain"),
        ("off", "cpu", NANO.flow, "plain"),
        ("int8", "mps", KLEIN_4B.flow, "int8"),
        ("fp8", "cuda", DEV.text, "fp8"),
        ("fp8", "cuda", DEV.autoencoder, "plain"),
        ("int8", "cpu", NANO.flow, "plain"),
    ],
)
def test_how_weights_are_held(quantize: str, device: str, part: Part, storage: str) -> None:
    assert choose_storage(quantize, "auto", torch.device(device), part) == storage


def test_a_processor_without_bfloat16_holds_weights_in_it_all_the_same() -> None:
    assert choose_storage("off", "auto", CPU, KLEIN_4B.text) == ("stored" if has_bfloat16() else "bfloat16")
    assert choose_storage("off", "float32", CPU, KLEIN_4B.text) == "stored"
    assert choose_storage("off", "bfloat16", CPU, KLEIN_4B.text) == "stored"
