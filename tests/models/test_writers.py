"""Language models that write beside the checkpoints whose text encoders they are: one set of weights for both uses."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flux2_studio.checkpoints import DEV, KLEIN_4B, NANO, Checkpoint, LocalWriter, list_local_writers
from flux2_studio.engine.text.encoder import open_text_encoder
from flux2_studio.engine.text.writer import Writer, open_writer
from flux2_studio.errors import OutOfMemory, WeightsError
from flux2_studio.models.checkpoint_files import PartKey
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.manager import ModelManager
from flux2_studio.models.memory.plan import PROMPT_STAGE
from flux2_studio.models.writers import find_text_encoder_writer
from flux2_studio.settings import Settings
from tests import tiny
from tests.models.writing import (
    CPU,
    MISTRAL,
    QWEN,
    SMALL,
    TOKENS,
    Told,
    alone,
    keys,
    limited,
    manager,
    peaks,
    silent,
    whole,
    wrote,
)
from tests.tiny import Toys

OWN = [(KLEIN_4B, QWEN), (DEV, MISTRAL)]


def size_of(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def folder_of(settings: Settings, model: LocalWriter) -> Path:
    assert model.part.path_variable
    return settings.path_overrides[model.part.path_variable]


# --- one set of weights ---


@pytest.mark.parametrize(("checkpoint", "model"), OWN, ids=lambda it: it.name)
def test_a_writer_is_loaded_once_for_both_uses(
    toys: Toys, tmp_path: Path, checkpoint: Checkpoint, model: LocalWriter
) -> None:
    settings = toys.settings(tmp_path, [checkpoint.name])
    folder = folder_of(settings, model)
    by_itself = open_writer(folder, folder, model.recipe).load(device=CPU, dtype=torch.float32)
    models, told = manager(settings), Told()
    writing = models.acquire_writer(model, told, tokens=TOKENS)
    assert wrote(writing.writer) == wrote(by_itself) != ""
    assert (told.loads, writing.notes) == ([f"Loading {model.label}"], ())
    held = models._residency.device_bytes
    assert held == size_of(by_itself.model)
    session = models.open(checkpoint, SMALL, told)
    context = session.encode_prompts(["a fox"], told).context
    assert models._residency.device_bytes == held and len(keys(models)) == 1, "the encoder is not loaded beside it"
    assert session.plan.stage(PROMPT_STAGE).weights > held, "the plan counts all of it, and the other parts"
    assert context.equal(alone(settings, checkpoint))
    assert "text" not in " ".join(told.loads)
    assert models.acquire_writer(model, told, tokens=TOKENS).writer is writing.writer, "it is there"
    assert wrote(writing.writer) == wrote(by_itself), "reading prompts has changed nothing"


@pytest.mark.parametrize(("checkpoint", "model"), OWN, ids=lambda it: it.name)
def test_it_takes_the_place_of_the_encoder_that_is_there(
    toys: Toys, tmp_path: Path, checkpoint: Checkpoint, model: LocalWriter
) -> None:
    settings = toys.settings(tmp_path, [checkpoint.name])
    models = manager(settings, host_budget=10**9)
    models.open(checkpoint, SMALL, silent).encode_prompts(["a fox"], silent)
    (plain,) = keys(models)
    before: list[list[PartKey]] = []

    def progress(text: str, fraction: float | None) -> None:
        before.append(keys(models))

    models.acquire_writer(model, progress, tokens=TOKENS)
    assert before and [] in before and before[-1] == [], "the encoder leaves before the writer comes"
    assert keys(models) == [plain.shared_with] and models._residency.host_bytes == 0, "nor does it wait anywhere"


def test_contexts_are_remembered_by_the_weights_not_by_what_else_they_can_do(toys: Toys, tmp_path: Path) -> None:
    models, told = manager(toys.settings(tmp_path, ["klein-4b"])), Told()
    read = models.open(KLEIN_4B, SMALL, silent).encode_prompts(["a fox"], silent).context
    models.acquire_writer(QWEN, silent, tokens=TOKENS)
    again = models.open(KLEIN_4B, SMALL, silent).encode_prompts(["a fox"], told).context
    assert told.texts == [] and again.equal(read)
    other = models.open(KLEIN_4B, SMALL, silent).encode_prompts(["an owl"], told).context
    assert told.texts == ["Reading the prompt"], "by the writer's own encoder"
    models.release_all()
    told.texts.clear()
    assert (
        models.open(KLEIN_4B, SMALL, silent).encode_prompts(["an owl"], told).context.equal(other) and told.texts == []
    )


def test_contexts_are_the_same_in_eight_bits(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"], quantize="int8")
    models = manager(settings)
    models.acquire_writer(QWEN, silent, tokens=TOKENS)
    context = models.open(KLEIN_4B, SMALL, silent).encode_prompts(["a fox"], silent).context
    assert len(keys(models)) == 1
    assert context.equal(alone(settings, KLEIN_4B))
    assert not context.equal(alone(replace(settings, quantize="off"), KLEIN_4B))


def test_a_run_beside_the_writer_draws_as_ever(toys: Toys, tmp_path: Path) -> None:
    """All stages, with all of it on the device, and once more when it is gone."""
    models = manager(toys.settings(tmp_path, ["klein-4b"]))
    models.acquire_writer(QWEN, silent, tokens=TOKENS)
    held = []
    for _ in range(2):
        session = models.open(KLEIN_4B, SMALL, silent)
        assert session.plan.is_resident
        session.preload(silent)
        session.encode_prompts(["a fox"], silent)
        assert session.prepare_transformer(silent).transformer.img_in.weight.device == CPU
        session.decode(torch.zeros(1, 128, 4, 4), silent)
        held.append(models._residency.device_bytes)
        assert held[-1] <= session.plan.stage(PROMPT_STAGE).weights
        models.release_all()
    assert held[0] > held[1], "the second time the encoder alone was loaded"


def test_it_reads_the_prompt_and_leaves_where_it_cannot_stay(toys: Toys, tmp_path: Path) -> None:
    """To read it with the encoder, that would have to be loaded; once it has left, the next run does."""
    settings = toys.settings(tmp_path, ["klein-4b"])
    plain, whole = peaks(settings, KLEIN_4B, QWEN, SMALL)
    assert plain < whole
    models, told = manager(limited(settings, plain)), Told()
    models.acquire_writer(QWEN, silent, tokens=TOKENS)
    session = models.open(KLEIN_4B, SMALL, silent)
    assert session.plan.resident_parts == "all but the text encoder"
    session.encode_prompts(["a fox"], told)
    assert told.loads == []
    session.prepare_transformer(silent)
    assert keys(models, KLEIN_4B.text) == []
    session = models.open(KLEIN_4B, SMALL, silent)
    assert session.plan.is_resident
    session.encode_prompts(["an owl"], told)
    assert told.loads == ["Loading FLUX.2 klein 4B: text encoder"]


# --- too little memory ---


def needs(settings: Settings, model: LocalWriter, pictures: Sequence[tuple[int, int]] = ()) -> tuple[int, int]:
    """Bytes of all weights of `model`, and what writing takes beside them."""
    opened = manager(settings)._opener.writer(model, silent)
    return opened.weights.total, opened.writing_bytes(TOKENS, tuple(pictures))


@pytest.mark.parametrize("model", [QWEN, MISTRAL], ids=lambda it: it.name)
def test_what_does_not_fit_is_streamed_and_writes_the_same(toys: Toys, tmp_path: Path, model: LocalWriter) -> None:
    settings = toys.settings(tmp_path, ["klein-4b", "dev"])
    weights, activations = needs(settings, model)
    text = wrote(manager(settings).acquire_writer(model, silent, tokens=TOKENS).writer)
    context = {it.name: alone(settings, it) for it in (KLEIN_4B, DEV)}
    checkpoint = KLEIN_4B if model == QWEN else DEV
    streamed = []
    for share in (1.0, 0.9, 0.6):
        models = manager(limited(settings, share * weights + activations), streaming=True, host_budget=10**9)
        writing = models.acquire_writer(model, silent, tokens=TOKENS)
        assert wrote(writing.writer) == text
        assert models._residency.device_bytes + activations <= share * weights + activations + 2
        (entry,) = models._residency._entries.values()
        streamed.append(len(entry.streamed))
        if share < 1:
            (note,) = writing.notes
            layers = len(writing.writer.model.decoder.layers)
            assert f"{streamed[-1]} of {model.label}'s {layers} layers" in note and "OpenRouter" in note
            # Its encoder reads as well, with layers that come and go.
            assert writing.writer.encoder.encode(["a fox"]).context.equal(context[checkpoint.name])
        else:
            assert writing.notes == ()
    assert streamed[0] == 0 < streamed[1] < streamed[2]


def test_what_does_not_fit_at_all_is_refused_with_a_way_out(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b", "dev"])
    weights, activations = needs(settings, MISTRAL)
    with pytest.raises(OutOfMemory, match=r"language model, OpenRouter, or draw without enhancing.*FLUX2_QUANTIZE"):
        manager(limited(settings, activations / 2), streaming=True).acquire_writer(MISTRAL, silent, tokens=TOKENS)
    below = limited(settings, weights + activations - 100)
    with pytest.raises(OutOfMemory, match=r"^Mistral Small 3\.2 24B needs about 0\.\d+ GB of memory to write, and 0\."):
        manager(below, streaming=False).acquire_writer(MISTRAL, silent, tokens=TOKENS)
    assert manager(below, streaming=True).acquire_writer(MISTRAL, silent, tokens=TOKENS).notes
    # What it is to look at takes room as well.
    models = manager(limited(settings, weights + activations), streaming=False)
    models.acquire_writer(MISTRAL, silent, tokens=TOKENS)
    with pytest.raises(OutOfMemory):
        models.acquire_writer(MISTRAL, silent, [(768, 768)] * 3, tokens=TOKENS)


def test_streamed_layers_need_main_memory(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    weights, activations = needs(settings, QWEN)
    models = manager(limited(settings, 0.8 * weights + activations), streaming=True)
    monkeypatch.setattr(models, "_free_host_bytes", lambda: weights - 1)
    with pytest.raises(OutOfMemory, match="as much main memory, of which 0"):
        models.acquire_writer(QWEN, silent, tokens=TOKENS)
    monkeypatch.setattr(models, "_free_host_bytes", lambda: weights)
    assert models.acquire_writer(QWEN, silent, tokens=TOKENS).notes


# --- giving up, and files that cannot be used ---


@pytest.mark.parametrize("streaming", [False, True])
def test_giving_up_while_it_is_loaded_leaves_nothing_of_it(toys: Toys, tmp_path: Path, streaming: bool) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    weights, activations = needs(settings, QWEN)
    share = 0.8 if streaming else 1.0
    models = manager(limited(settings, share * weights + activations), streaming=streaming)
    for fraction in (None, 1.0):  # before its first byte, after its last

        def give_up(text: str, done: float | None, at: float | None = fraction) -> None:
            if text.startswith("Loading") and done == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            models.acquire_writer(QWEN, give_up, tokens=TOKENS)
        gc.collect()
        assert models._residency.device_bytes == models._residency.host_bytes == 0
        assert not [it for it in gc.get_objects() if type(it) is Writer]
    assert wrote(models.acquire_writer(QWEN, silent, tokens=TOKENS).writer)


def headless(toys: Toys, tmp_path: Path) -> Settings:
    """Settings of a dev whose own copy of Mistral lacks what writing needs."""
    settings = toys.settings(tmp_path, ["dev"])
    folder = tmp_path / "headless"
    shutil.copytree(toys.new_mistral.folder, folder)
    state = load_file(folder / "model.safetensors")
    tiny.save_state({name: it for name, it in state.items() if name != "lm_head.weight"}, folder / "model.safetensors")
    return replace(settings, path_overrides={**settings.path_overrides, "MISTRAL_MODEL_PATH": folder})


def test_a_file_that_changes_is_another_writer(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    folder = tmp_path / "own"
    shutil.copytree(toys.qwen.folder, folder)
    models = manager(replace(settings, path_overrides={**settings.path_overrides, "QWEN3_4B_MODEL_PATH": folder}))
    text = wrote(models.acquire_writer(QWEN, silent, tokens=TOKENS).writer)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = -state["model.norm.weight"]
    tiny.save_state(state, folder / "model.safetensors")
    assert wrote(models.acquire_writer(QWEN, silent, tokens=TOKENS).writer) != text
    models.open(KLEIN_4B, SMALL, silent).encode_prompts(["a fox"], silent)
    assert all(key.is_whole_model for key in keys(models, QWEN.part)), "the encoder comes from the new one as well"


def test_the_whole_model_is_loaded_in_place_of_the_encoder(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["dev"])
    models, told = manager(settings), Told()
    session = whole(models, DEV)
    assert session.acquire_vision_model() is None, "nothing is there"
    assert models._residency.device_bytes == 0, "and nothing came for it"
    writer = session.acquire_vision_model(told)
    assert writer is not None and writer.has_vision and told.loads == ["Loading FLUX.2 dev: text encoder"]
    assert session.acquire_vision_model() is writer and session.notes == ()
    context = session.encode_prompts(["a fox"], told).context
    assert told.loads == ["Loading FLUX.2 dev: text encoder"], "once"
    assert context.equal(alone(settings, DEV))
    assert writer.next_logits("answer", "yes or no?").shape == (tiny.VOCABULARY,)
    session.prepare_transformer(silent)
    assert session.plan.is_resident and session.acquire_vision_model() is writer, (
        "it stays to be asked about what is drawn"
    )
    assert whole(models, DEV).acquire_vision_model() is writer
    assert models.open(DEV, SMALL, silent).acquire_vision_model() is writer, (
        "being there, it is used without having been wanted"
    )
    models.release_all()
    assert session.acquire_vision_model() is None


def test_only_who_sees_and_reads_the_checkpoints_prompts_is_asked(toys: Toys, tmp_path: Path) -> None:
    models = manager(toys.settings(tmp_path, ["klein-4b", "dev"]))
    models.acquire_writer(QWEN, silent, tokens=TOKENS)
    models.acquire_writer(MISTRAL, silent, tokens=TOKENS)
    session = whole(models, KLEIN_4B)
    assert (session.acquire_vision_model(), session.acquire_vision_model(silent), session.notes) == (None, None, ())
    assert whole(models, NANO).acquire_vision_model(silent) is None
    assert models.open(DEV, SMALL, silent).acquire_vision_model() is not None


def test_a_copy_that_cannot_write_can_still_read(toys: Toys, tmp_path: Path) -> None:
    models = manager(headless(toys, tmp_path))
    session = whole(models, DEV)
    (note,) = session.notes
    assert "has no lm_head" in note
    assert session.encode_prompts(["a fox"], silent).context.shape[0] == 1
    with pytest.raises(WeightsError, match="has no lm_head"):
        models.acquire_writer(MISTRAL, silent)
    (offer,) = models.list_writers(DEV)
    assert "has no lm_head" in offer.description


def test_the_outlook_knows_of_the_whole_model(toys: Toys, tmp_path: Path) -> None:
    models = manager(toys.settings(tmp_path, ["dev"]))
    plain, entire = models.predict_plan(DEV, SMALL), models.predict_plan(DEV, SMALL, load_vision_model=True)
    assert plain.peak < entire.peak and entire.stages == whole(models, DEV).plan.stages
    assert entire.stage(PROMPT_STAGE).activations > plain.stage(PROMPT_STAGE).activations, (
        "to be asked about a picture takes more"
    )
    whole(models, DEV).preload(silent)
    assert models.predict_plan(DEV, SMALL).stages == entire.stages


# --- what the page offers ---


def test_offers(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b", "dev"])
    models = manager(settings)
    own, other = models.list_writers(KLEIN_4B)
    assert [(it.name, it.is_text_encoder, it.has_vision, it.is_on_disk, it.download) for it in (own, other)] == [
        ("qwen3-4b", True, False, True, 0),
        ("mistral", False, True, True, 0),
    ]
    folder = folder_of(settings, QWEN)
    encoder = open_text_encoder(folder, folder, QWEN.recipe).tensor_bytes(dtype=torch.float32)
    assert own.memory == size_of(models.acquire_writer(QWEN, silent).writer.model) - sum(encoder.values()) > 0
    assert other.memory == pytest.approx(size_of(models.acquire_writer(MISTRAL, silent).writer.model), rel=0.01)
    assert all(part in own.description for part in ("own text encoder", "layers that reading leaves out", "MB more"))
    assert other.description.startswith("Loads Mistral Small 3.2 24B (")
    (own,) = models.list_writers(DEV)
    assert own.is_text_encoder and own.has_vision


def test_offers_of_what_is_not_here(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    bare = replace(settings, path_overrides={})
    models = ModelManager(bare, Hub(bare, cache=tmp_path / "empty"))
    own, other = models.list_writers(KLEIN_4B)
    assert (own.is_on_disk, own.download, own.memory) == (False, QWEN.part.size, QWEN.part.size)
    assert own.description.endswith("less than 8.0 GB more.")
    assert (other.is_on_disk, other.download, other.memory) == (False, MISTRAL.part.size, MISTRAL.part.size)
    assert other.description == "Loads Mistral Small 3.2 24B (48.0 GB) after a download of 48.0 GB."
    missing = replace(settings, path_overrides={"QWEN3_4B_MODEL_PATH": tmp_path / "nowhere"})
    own, _ = ModelManager(missing, Hub(missing, cache=tmp_path / "empty")).list_writers(KLEIN_4B)
    assert (own.is_on_disk, own.download) == (False, 0) and "QWEN3_4B_MODEL_PATH points to" in own.description


def test_where_another_machine_reads_prompts_the_own_writer_is_not_there_anyway(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["dev"], text_encoder_url="http://127.0.0.1:9/")
    models = manager(settings)
    (offer,) = models.list_writers(DEV)
    assert not offer.is_text_encoder and offer.memory == pytest.approx(
        size_of(models.acquire_writer(MISTRAL, silent).writer.model), rel=0.01
    )
    session = whole(models, DEV)
    assert session.acquire_vision_model(silent) is None and session.notes == ()


def test_toys_have_no_writer(toys: Toys, tmp_path: Path) -> None:
    models = manager(toys.settings(tmp_path, ["klein-4b"]))
    assert models.list_writers(NANO) == () == list_local_writers(NANO)
    assert find_text_encoder_writer(NANO) is None and find_text_encoder_writer(KLEIN_4B) == QWEN
    assert find_text_encoder_writer(replace(KLEIN_4B, recipe=replace(KLEIN_4B.recipe, length=8))) is None
