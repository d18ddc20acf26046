"""Residency, the choice of device and precision, and how many pictures go into a batch."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2_studio.checkpoints import DEV, KLEIN_4B, NANO, Part
from flux2_studio.engine.params import TransformerParams
from flux2_studio.engine.preview import AutoencoderPreview, LinearPreview, TinyPreview
from flux2_studio.engine.quantize import QuantizedLinear
from flux2_studio.engine.weights import open_autoencoder, open_transformer
from flux2_studio.errors import DeviceError, WeightsError
from flux2_studio.models import memory
from flux2_studio.models.hub import Hub, PartFiles, Progress
from flux2_studio.models.manager import ModelManager, check_fit, choose_device, choose_dtype, choose_storage
from flux2_studio.settings import Settings
from tests.tiny import Toys

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def silent(text: str, fraction: float | None) -> None:
    pass


def manager(settings: Settings) -> ModelManager:
    return ModelManager(settings, Hub(settings))


def test_the_last_checkpoint_stays_and_the_one_before_leaves(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b", "dev"])
    models = manager(settings)
    klein, dev = settings.checkpoint("klein-4b"), settings.checkpoint("dev")
    first = models.load(klein, silent)
    assert models.load(klein, silent).transformer is first.transformer
    gone = [weakref.ref(first.transformer), weakref.ref(first.text)]
    autoencoder = first.autoencoder
    del first
    second = models.load(dev, silent)
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert second.autoencoder is autoencoder, "what two checkpoints share is not moved"


@pytest.mark.parametrize("wrong", ["truncated", "a missing tensor", "no text encoder", "an autoencoder for it"])
def test_a_failed_load_does_not_cost_the_checkpoint_in_use(toys: Toys, tmp_path: Path, wrong: str) -> None:
    settings = toys.settings(tmp_path, ["klein-4b", "dev"])
    broken = tmp_path / "broken.safetensors"
    overrides = dict(settings.overrides)
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
    models = manager(replace(settings, overrides=overrides))
    loaded = models.load(KLEIN_4B, silent)
    with pytest.raises(WeightsError):
        models.load(DEV, silent)
    told: list[str] = []
    assert models.load(KLEIN_4B, lambda text, _: told.append(text)).transformer is loaded.transformer
    assert not told, "nothing had to be loaded again"


def test_a_preview_that_cannot_be_had_is_not_asked_for_at_every_run(toys: Toys, tmp_path: Path) -> None:
    class Counting(Hub):
        asked = 0

        def locate(self, part: Part, progress: Progress) -> PartFiles:
            self.asked += part.kind == "tiny autoencoder"
            return super().locate(part, progress)

    settings = toys.settings(tmp_path, ["klein-4b"])
    hub = Counting(replace(settings, overrides={**settings.overrides, "TAEF2_MODEL_PATH": tmp_path / "nowhere"}))
    models = ModelManager(settings, hub)
    assert [bool(models.load(KLEIN_4B, silent).notes) for _ in range(3)] == [True] * 3
    assert hub.asked == 1


def test_an_autoencoder_of_another_scale_is_refused(toys: Toys) -> None:
    transformer = open_transformer(toys.klein.file).params
    autoencoder = open_autoencoder(toys.autoencoder.file).params
    names = {"flow": "flow", "text": "text", "autoencoder": "ae.safetensors"}
    check_fit(KLEIN_4B, names, transformer, autoencoder, transformer.context_width)
    shallow = replace(autoencoder, encoder_channels=(32, 32, 32), decoder_channels=(32, 32, 32))
    for wrong in (shallow, replace(autoencoder, latent_channels=16)):
        with pytest.raises(WeightsError, match=r"ae\.safetensors makes latents"):
            check_fit(KLEIN_4B, names, transformer, wrong, transformer.context_width)


def test_giving_up_while_loading_leaves_a_manager_that_works(toys: Toys, tmp_path: Path) -> None:
    models = manager(toys.settings(tmp_path, ["klein-4b"]))

    def give_up(text: str, fraction: float | None) -> None:
        if "transformer" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.load(KLEIN_4B, give_up)
    assert models.load(KLEIN_4B, silent).transformer is not None


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
    loaded = manager(settings).load(settings.checkpoint(checkpoint), silent)
    assert isinstance(loaded.previewer, kind) and loaded.notes == ()


def test_a_checkpoint_is_on_disk_when_all_its_parts_are(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    assert manager(settings).on_disk(KLEIN_4B) and manager(settings).on_disk(NANO)
    fewer = {name: path for name, path in settings.overrides.items() if name != "QWEN3_4B_MODEL_PATH"}
    hub = Hub(replace(settings, overrides=fewer), cache=tmp_path / "empty")
    assert not ModelManager(settings, hub).on_disk(KLEIN_4B)


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("tpu", "cuda:99", "cpuu", "", "meta"):
        with pytest.raises(DeviceError, match=r"Choose|There is no|has no"):
            choose_device(name)


def test_precision() -> None:
    assert choose_dtype("auto", CPU, NANO, NANO.flow) is torch.float32
    assert choose_dtype("auto", CPU, KLEIN_4B, KLEIN_4B.flow) is torch.bfloat16
    assert choose_dtype("auto", CPU, KLEIN_4B, KLEIN_4B.tiny_autoencoder) is torch.float32
    assert choose_dtype("bfloat16", CUDA, KLEIN_4B, KLEIN_4B.tiny_autoencoder) is torch.float16
    assert choose_dtype("float16", CUDA, KLEIN_4B, KLEIN_4B.flow) is torch.float16
    assert choose_dtype("float16", CUDA, KLEIN_4B, KLEIN_4B.text) is torch.bfloat16
    assert choose_dtype("float32", CUDA, KLEIN_4B, KLEIN_4B.autoencoder) is torch.float32


def test_a_batch_is_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    params = TransformerParams(
        in_channels=128,
        context_width=7680,
        hidden=3072,
        head_width=128,
        mlp=9216,
        double_blocks=5,
        single_blocks=20,
        guidance_embedding=False,
    )

    def size(count: int, tokens: int, free: int, device: torch.device = CUDA, kept: int = 0) -> int:
        monkeypatch.setattr(memory, "free_memory", lambda _: free)
        return memory.batch_size(count, tokens, kept, params, torch.bfloat16, device)

    assert size(4, 4608, 80 * 10**9) == 4
    assert 1 < size(16, 4608, 10 * 10**9) < 16
    assert size(4, 4608, 0) == 1
    assert size(4, 20992, 40 * 10**9, kept=16384) < size(4, 20992, 40 * 10**9), "kept references take their room"
    assert size(16, 300, 80 * 10**9, CPU) == memory.CPU_TOKENS // 300
    assert size(16, 4608, 80 * 10**9, CPU) == 1


def test_free_memory_of_this_machine() -> None:
    assert 10**8 < memory.free_memory(CPU) < 10**13


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert memory.is_out_of_memory(MemoryError())
    assert memory.is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert memory.is_out_of_memory(RuntimeError("MPS backend out of memory"))
    assert not memory.is_out_of_memory(RuntimeError("shape mismatch"))
    assert not memory.is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
def test_quantising_takes_the_large_parts_and_leaves_the_rest(toys: Toys, tmp_path: Path, quantize: str) -> None:
    plain = toys.settings(tmp_path, ["klein-4b"])
    small = manager(replace(plain, quantize=quantize)).load(KLEIN_4B, silent)  # type: ignore[arg-type]
    whole = manager(plain).load(KLEIN_4B, silent)

    def matrices(model: torch.nn.Module) -> int:
        return sum(isinstance(module, QuantizedLinear) for module in model.modules())

    assert matrices(small.transformer) > 10 and matrices(small.autoencoder) == 0
    assert matrices(whole.transformer) == 0
    context, exact = (loaded.text.encode(["a fox"]).context for loaded in (small, whole))
    error = float((context - exact).norm() / exact.norm())
    assert 0 < error < 0.15, "the text encoder is quantised too"


@pytest.mark.parametrize(
    ("quantize", "device", "part", "storage"),
    [
        ("off", "cuda", KLEIN_4B.flow, "stored"),
        ("off", "cpu", KLEIN_4B.text, "stored"),
        ("off", "mps", KLEIN_4B.flow, "plain"),
        ("off", "cpu", NANO.flow, "plain"),
        ("int8", "mps", KLEIN_4B.flow, "int8"),
        ("fp8", "cuda", DEV.text, "fp8"),
        ("fp8", "cuda", DEV.autoencoder, "plain"),
        ("int8", "cpu", NANO.flow, "plain"),
    ],
)
def test_how_weights_are_held(quantize: str, device: str, part: Part, storage: str) -> None:
    assert choose_storage(quantize, torch.device(device), part) == storage
