"""One run from request to saved pictures, in `Studio.generate`; also drafts, prompt enhancement and preloading.

check prompt -> load and check references -> resolve -> enhance prompt -> check it again -> plan memory -> encode text
-> encode references -> denoise (previews) -> decode -> composite -> check picture -> watermark, settings, signature
-> save -> Result
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version

import torch
from PIL import Image

from flux2_studio import __version__
from flux2_studio.checkpoints import Checkpoint
from flux2_studio.engine.weights.quantize import has_8bit_matmul
from flux2_studio.errors import CredentialsError, OutOfMemory, SafetyError, UpsampleError
from flux2_studio.events import Drafted, Event, Notice, PromptEnhanced, Ready, Result, Saved, Stopped, Withheld
from flux2_studio.images.masks import EditRegion, load_mask, make_edit_region
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.images.references import fit_note
from flux2_studio.models.hub.classifier import find_classifier
from flux2_studio.models.hub.hub_errors import format_size
from flux2_studio.models.hub.repositories import Hub, ProgressCallback
from flux2_studio.models.loras import LoraLibrary
from flux2_studio.models.manager import ModelManager
from flux2_studio.models.memory.available import is_out_of_memory
from flux2_studio.models.memory.choices import choose_dtype, choose_storage
from flux2_studio.models.memory.plan import MemoryPlan
from flux2_studio.models.session import Sampler
from flux2_studio.models.worker_thread import Cancelled, in_worker_thread, raise_if_cancelled
from flux2_studio.models.writers import WriterOffer
from flux2_studio.prompting.enhance import SMALLER_REFERENCES_HINT, check_upsampling_choice, enhance_prompt
from flux2_studio.prompting.openai_server import ApiKey
from flux2_studio.prompting.replies import OR_WITHOUT_ENHANCING
from flux2_studio.provenance.c2pa.credentials import ReferenceIngredient, Signer
from flux2_studio.provenance.finish import FinishedFile as File
from flux2_studio.provenance.finish import Finisher
from flux2_studio.provenance.watermark import PUBLISHED_MESSAGE, WatermarkMessage
from flux2_studio.record import COMPILED_BLOCKS, EAGER_BLOCKS, Record
from flux2_studio.request import Request, Upsampling, describe_changes
from flux2_studio.safety.guard import SafetyGuard
from flux2_studio.safety.policy import decide_policy
from flux2_studio.settings import Settings
from flux2_studio.stages.compositing import composite_region
from flux2_studio.stages.conditioning import encode_conditioning, find_yes_no_model
from flux2_studio.stages.denoising import UNTILED, StepTimer, describe_tiling, generate_batch
from flux2_studio.stages.durations import DurationModel, RunFeatures
from flux2_studio.stages.estimates import RunEstimate, StageStopwatch, learn_duration, make_estimate, make_run_features
from flux2_studio.stages.run_context import (
    PreparedReference,
    RunContext,
    RunOutputs,
    UnfinishedPicture,
    make_request_shape,
)
from flux2_studio.storage.library import OutputLibrary

# Least time between two previews of a draft: a preview of every fast step would double its time.
DRAFT_PREVIEW_SECONDS = 0.3


def make_guard(settings: Settings, *, shared: bool) -> SafetyGuard:
    """Make the safety check of a studio. shared: whether others than its owner can reach it."""
    policy = decide_policy(settings.safety, shared=shared, on_space=settings.on_space)
    return SafetyGuard(policy, lambda: find_classifier(settings.nsfw_model))


class Studio:
    """Turns requests into pictures, one at a time. `jobs.queue.JobQueue` queues the requests of many callers.

    guard: the safety check; by default the one for a studio that only its owner uses. reference_store: keeps copies of
    references, so that pictures can be reproduced; None keeps no copies. durations: learns how long runs take; None
    learns nothing. Raises `StudioError` if the configured watermark message is invalid.
    """

    def __init__(
        self,
        settings: Settings,
        models: ModelManager | None = None,
        library: OutputLibrary | None = None,
        *,
        guard: SafetyGuard | None = None,
        reference_store: ReferenceStore | None = None,
        durations: DurationModel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.guard = guard or make_guard(settings, shared=False)
        self.signer = Signer(settings.identity, settings.c2pa_certificate, settings.c2pa_key)
        own_message = settings.watermark_message
        self.message = WatermarkMessage.parse(own_message) if own_message else PUBLISHED_MESSAGE
        self.reference_store = reference_store
        self.pictures = PictureCache()  # of the references that runs and the page read
        self._durations = durations
        self._clock = clock
        self._models = models or ModelManager(settings, Hub(settings))
        self._library = library or OutputLibrary(settings.outputs)
        self._finisher = Finisher(self.message, self.signer)

    @property
    def _needs_vision_model(self) -> bool:
        """Whether to load a whole language model for the safety check. True if the policy is "on"."""
        return self.guard.policy == "on"

    @property
    def loras(self) -> LoraLibrary:
        """The LoRAs that requests may choose."""
        return self._models.loras

    def is_on_disk(self, checkpoint: Checkpoint) -> bool:
        """Whether `checkpoint` can run without a download."""
        return self._models.is_on_disk(checkpoint)

    def resolve(self, request: Request, api_key: ApiKey | None = None) -> Request:
        """Return `request` resolved, after opening its references and mask. api_key: see `generate`.

        Raises `RequestError` if it is invalid, and `UpsampleError` if the chosen language model is not available.
        """
        checkpoint = self._check_request(request)
        check_upsampling_choice(request.upsampling, checkpoint, self.settings, api_key)
        sizes: list[tuple[int, int]] = []
        for reference, _ in self._references(request):
            if request.mask and not sizes:
                load_mask(request.mask, reference.image.size, self.pictures)
            sizes.append(reference.image.size)
        return request.resolve(checkpoint, sizes)

    def estimate_run(self, request: Request, references: Sequence[tuple[int, int]] = ()) -> RunEstimate:
        """Estimate the memory and the time of `request`: memory if its checkpoint is on disk, time if similar runs were
        timed. Reads only the headers of the weight files.

        references: (width, height) of each after scaling to its pixel limit. Raises `StudioError` if it does not fit.
        """
        checkpoint = self.settings.checkpoint(request.checkpoint)
        resolved = request.resolve(checkpoint, references)
        shape = make_request_shape(resolved, references, checkpoint)
        if not self.is_on_disk(checkpoint):
            return make_estimate(resolved, checkpoint, shape, is_on_disk=False, is_loaded=False)
        plan = self._models.predict_plan(checkpoint, shape, request.loras, load_vision_model=self._needs_vision_model)
        return make_estimate(
            resolved,
            checkpoint,
            shape,
            memory_fit=plan.describe(self._models.device_label),
            features=self._run_features(resolved, checkpoint, plan),
            batch_size=plan.batch_size,
            durations=self._durations,
            is_on_disk=True,
            is_loaded=self._models.is_loaded(checkpoint),
        )

    def _run_features(self, request: Request, checkpoint: Checkpoint, plan: MemoryPlan) -> RunFeatures:
        computed = self.compute_settings(checkpoint)
        precision = f"{computed['precision']}, weights {computed['weights']}"
        return make_run_features(self._models.device_name, precision, checkpoint, plan, self.settings.preview, request)

    @property
    def messages(self) -> tuple[WatermarkMessage, ...]:
        """The watermark messages that Inspect looks for: this studio's, and Black Forest Labs' published one."""
        return tuple(dict.fromkeys((self.message, PUBLISHED_MESSAGE)))

    def list_writers(self, checkpoint: Checkpoint) -> tuple[WriterOffer, ...]:
        """The language models on this machine that can enhance prompts for `checkpoint`."""
        return self._models.list_writers(checkpoint)

    @cached_property
    def versions(self) -> Mapping[str, str]:
        """Of what pictures depend on."""
        return {"flux2-studio": __version__, "torch": torch.__version__, "transformers": version("transformers")}

    def compute_settings(self, checkpoint: Checkpoint) -> Mapping[str, str]:
        """How `checkpoint` is computed here, as far as pictures depend on it."""
        device, part = self._models.device, checkpoint.flow
        weights: str = choose_storage(self.settings.quantize, self.settings.dtype, device, part)
        if weights in ("fp8", "int8") and has_8bit_matmul(device, weights):  # type: ignore[arg-type]
            weights += " products"
        return {
            "device": device.type,
            "precision": str(choose_dtype(self.settings.dtype, device, checkpoint, part)).removeprefix("torch."),
            "weights": weights,
            "autoencoder": UNTILED,
            "blocks": self._models.background_compiler.expected_mode(part.size),
        }

    def checkpoint_hash(self, checkpoint: Checkpoint) -> str | None:
        """SHA-256 of the transformer's file; None where it is not here, or would take long to read."""
        return self._models.quick_hash(checkpoint) if self.is_on_disk(checkpoint) else None

    def describe_memory_needs(self, checkpoint: Checkpoint) -> str:
        """What `checkpoint` needs of the memory, in words: by its published sizes, for it may not be here yet."""
        sizes = [part.size for part in checkpoint.parts]
        capacity = self._models.memory_capacity
        return (
            f"Takes about {format_size(sum(sizes))} of memory at once, {format_size(max(sizes))} when its parts take "
            "turns; "
            f"{self._models.device_label} has {format_size(capacity)}."
        )

    def preload(self, name: str, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Load checkpoint `name`, which must be on disk, as far as it fits, before it is asked for. Yields Status, then
        Ready, or Stopped once `cancelled`. Raises `StudioError`."""
        checkpoint = self.settings.checkpoint(name)
        request = Request(prompt="any").resolve(checkpoint)

        def load(progress: ProgressCallback) -> None:
            shape = make_request_shape(request, [], checkpoint)
            self._models.open(checkpoint, shape, progress, load_vision_model=self._needs_vision_model).preload(progress)

        try:
            yield from in_worker_thread(load, cancelled)
            yield Ready(checkpoint=name)
        except Cancelled:
            yield Stopped()
        except (RuntimeError, MemoryError) as error:
            raise self._exhausted(name, error) from error

    def enhance_prompt(
        self, request: Request, cancelled: Callable[[], bool] = lambda: False, api_key: ApiKey | None = None
    ) -> Iterator[Event]:
        """Enhance the prompt of `request` as its `upsampling` says, without drawing. Raises `StudioError`.

        Yields PromptEnhanced and, as the last event, Ready; or Stopped if `cancelled`. api_key: see `generate`.
        """
        try:
            self.guard.check_ready()
            resolved, references, _ = yield from self._check_inputs(
                request, cancelled, RunOutputs(), for_generation=False
            )
            enhanced = yield from enhance_prompt(
                resolved, [it.image for it in references], self.settings, self._models, api_key, cancelled
            )
            yield from (Notice(text=text) for text in self._check_enhanced_prompt(enhanced))
            yield Ready(checkpoint=resolved.checkpoint or "")
        except Cancelled:
            yield Stopped()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UpsampleError(f"There is too little main memory left for this: {SMALLER_REFERENCES_HINT}.") from error

    def _check_enhanced_prompt(self, enhanced: PromptEnhanced) -> tuple[str, ...]:
        """Check an enhanced prompt and return the notes of the safety check.

        Raises `UpsampleError` if it does not pass: the user's own prompt has passed before.
        """
        try:
            return self.guard.check_prompt(enhanced.prompt)
        except SafetyError as error:
            raise UpsampleError(
                f"{enhanced.by} wrote what does not pass: {error} Try again, {OR_WITHOUT_ENHANCING}."
            ) from error

    def generate(
        self, request: Request, cancelled: Callable[[], bool] = lambda: False, api_key: ApiKey | None = None
    ) -> Iterator[Event]:
        """Carry out `request`. Yields events in the order that `events.py` describes.

        The last event is Result, or Stopped if `cancelled` returned True between two steps. api_key: the user's own key
        for the server that enhances prompts. Raises `StudioError`.
        """
        outputs = RunOutputs()
        try:
            yield from self._run(request, cancelled, api_key, outputs)
        except Cancelled:
            yield from outputs.new_notices(outputs.with_seeds(outputs.notes))
            yield Stopped(images=tuple(outputs.images), seeds=tuple(outputs.seeds))
        except (RuntimeError, MemoryError) as error:
            raise self._exhausted(request.checkpoint, error) from error

    def draft(self, request: Request, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Draw the first picture of `request` as a draft, without prompt enhancement and without saving it.

        The last event is Drafted, or Stopped if `cancelled`. Raises `StudioError`.
        """
        started = time.monotonic()
        outputs = RunOutputs()
        single = replace(request, count=1, upsampling=Upsampling())
        try:
            self.guard.check_ready()
            resolved, references, region = yield from self._check_inputs(
                single, cancelled, outputs, for_generation=False
            )
            run = yield from self._open_run(
                resolved, references, region, cancelled, outputs, preview_interval=DRAFT_PREVIEW_SECONDS
            )
            conditioning = yield from encode_conditioning(run)
            sampler = yield from run.run_in_worker(run.session.prepare_transformer)
            record = self._record(run, sampler, "", resolved.seeds[0], 0, 1)
            pictures = yield from generate_batch(run, sampler, [record], 1, conditioning, StepTimer())
            assert pictures is not None, "one picture is not made in parts"
            yes_no_model, notes = find_yes_no_model(run)
            picture, more_notes = composite_region(pictures[0][0], resolved, region, run.first_reference)
            yield from outputs.new_notices([*notes, *more_notes, *self.guard.check_output(picture, yes_no_model)])
            yield Drafted(request=resolved, image=picture, seconds=time.monotonic() - started)
        except Cancelled:
            yield Stopped()
        except (RuntimeError, MemoryError) as error:
            raise self._exhausted(request.checkpoint, error) from error

    def _exhausted(self, name: str | None, error: RuntimeError | MemoryError) -> OutOfMemory:
        """Free all weights and return the error that the user reads. Raises `error` itself unless memory ran out."""
        if not is_out_of_memory(error):
            raise error
        self._models.release_all()
        return OutOfMemory(
            f"{self.settings.checkpoint(name).label} does not fit into this device's memory for this request. Choose a "
            f"smaller size, fewer or smaller references, or a smaller checkpoint."
        )

    def _run(
        self, submitted: Request, cancelled: Callable[[], bool], api_key: ApiKey | None, outputs: RunOutputs
    ) -> Generator[Event, None, None]:
        started = time.monotonic()
        raise_if_cancelled(cancelled)
        # What can fail at the end is tried first, before hours of work.
        self._library.check_writable()
        self.guard.check_ready()
        request, references, region = yield from self._check_inputs(submitted, cancelled, outputs, for_generation=True)
        check_seconds = time.monotonic() - started
        self._finisher.check(request)
        enhanced: PromptEnhanced | None = None
        if request.upsampling.by != "none":
            pictures = [reference.image for reference in references]
            enhanced = yield from enhance_prompt(request, pictures, self.settings, self._models, api_key, cancelled)
            yield from outputs.new_notices(self._check_enhanced_prompt(enhanced))
            request = replace(request, prompt=enhanced.prompt, upsampling=Upsampling())
        failed_plan: MemoryPlan | None = None  # the plan that turned out to be too much
        while outputs.completed_count < request.count:
            previous_plan = failed_plan
            run = yield from self._open_run(
                request,
                references,
                region,
                cancelled,
                outputs,
                enhanced=enhanced,
                failed_plan=previous_plan,
                check_seconds=check_seconds,
            )
            try:
                yield from self._generate_pictures(run)
            except (RuntimeError, MemoryError) as error:
                if previous_plan or not is_out_of_memory(error):
                    raise
                failed_plan = run.session.plan
            if failed_plan and not previous_plan:
                del run  # and whatever it holds on the device
                self._models.release_all()
                yield Notice(text="The memory ran out, in spite of the plan: trying once more, with less of it in use.")
        if outputs.withheld is not None and not outputs.images:
            raise outputs.withheld
        yield from outputs.new_notices(outputs.with_seeds(outputs.notes))
        yield Result(
            request=request,
            images=tuple(outputs.images),
            seeds=tuple(outputs.seeds),
            seconds=time.monotonic() - started,
            provenance=outputs.with_seeds(outputs.provenance),
        )

    def _open_run(
        self,
        request: Request,
        references: Sequence[PreparedReference],
        region: EditRegion | None,
        cancelled: Callable[[], bool],
        outputs: RunOutputs,
        *,
        enhanced: PromptEnhanced | None = None,
        failed_plan: MemoryPlan | None = None,
        preview_interval: float = 0.0,
        check_seconds: float = 0.0,
    ) -> Generator[Event, None, RunContext]:
        """Open the checkpoint and return the context of a run. Takes the results of `_check_inputs`.

        failed_plan: the plan under which memory ran out. For the other arguments see `RunContext`.
        """
        checkpoint = self.settings.checkpoint(request.checkpoint)
        shape = make_request_shape(request, [reference.image.size for reference in references], checkpoint)
        session = yield from in_worker_thread(
            lambda progress: self._models.open(
                checkpoint,
                shape,
                progress,
                loras=request.loras,
                failed_plan=failed_plan,
                load_vision_model=self._needs_vision_model,
            ),
            cancelled,
        )
        yield from outputs.new_notices(session.notes)
        if not session.plan.is_resident:
            yield Notice(text=session.plan.describe(self._models.device_label))
        return RunContext(
            request=request,
            enhanced=enhanced,
            references=references,
            region=region,
            session=session,
            request_shape=shape,
            guard=self.guard,
            cancelled=cancelled,
            outputs=outputs,
            preview_interval=preview_interval,
            clock=self._clock,
            check_seconds=check_seconds,
        )

    def _check_inputs(
        self, submitted: Request, cancelled: Callable[[], bool], outputs: RunOutputs, *, for_generation: bool
    ) -> Generator[Event, None, tuple[Request, list[PreparedReference], EditRegion | None]]:
        """Check and resolve a request. Returns the resolved request, its references and the edit region.

        for_generation: pictures will be saved. The references are then copied to the reference store, and prepared as
        ingredients of the content credentials.
        """
        checkpoint = self._check_request(submitted)
        yield from outputs.new_notices(self.guard.check_prompt(submitted.prompt))
        references = []
        for number, (reference, data) in enumerate(self._references(submitted), start=1):
            raise_if_cancelled(cancelled)
            yield from outputs.new_notices(self.guard.check_reference(number, reference.image))
            if for_generation and submitted.metadata and self.reference_store is not None:
                self.reference_store.save(data)
            if for_generation and submitted.sign:
                ingredient = self.signer.make_ingredient(number, data)
                yield from outputs.new_notices([ingredient.note] if ingredient.note else [])
                reference = replace(reference, ingredient=ingredient)
            references.append(reference)
        request = submitted.resolve(checkpoint, [reference.image.size for reference in references])
        region = make_edit_region(request, references[0].image, self.pictures) if references else None
        if for_generation and submitted.metadata and self.reference_store is not None and region and region.mask:
            self.reference_store.save(region.mask.data)
        yield from outputs.new_notices(describe_changes(submitted, request))
        return request, references, region

    def _check_request(self, request: Request) -> Checkpoint:
        """Check all of `request` that needs no picture, and return its checkpoint."""
        checkpoint = self.settings.checkpoint(request.checkpoint)
        request.resolve(checkpoint)
        self.loras.check(request.loras, checkpoint, None)
        return checkpoint

    def _references(self, request: Request) -> Iterator[tuple[PreparedReference, bytes]]:
        """Yield each reference, scaled to its cap, with the bytes of its file. Raises `ReferenceImageError`."""
        cap = self.settings.checkpoint(request.checkpoint).max_pixels_per_reference(len(request.references))
        for number, path in enumerate(request.references, start=1):
            found = self.pictures.fitted(path, cap)
            note = fit_note(number, found.full_size, found.image.size)
            notes = (*found.notes, *([note] if note else []))
            yield PreparedReference(image=found.image, notes=notes, sha256=found.sha256), found.data

    def _generate_pictures(self, run: RunContext) -> Iterator[Event]:
        """Generate and save those pictures of `run` that are not done yet, batch by batch."""
        stopwatch = StageStopwatch(run.session, run.check_seconds)
        conditioning = yield from encode_conditioning(run)
        setup_seconds: float | None = stopwatch.lap()
        outputs = run.outputs
        fingerprint = ""  # computed before drawing: it may take a minute, be cancelled, or fail
        if run.request.metadata:
            checkpoint = run.session.checkpoint
            fingerprint = yield from run.run_in_worker(lambda progress: self._models.compute_hash(checkpoint, progress))
        timer = StepTimer()
        max_batch = run.session.plan.batch_size
        remaining_seeds = list(run.request.seeds[outputs.completed_count :])
        while remaining_seeds:
            seeds = remaining_seeds[:max_batch]
            batch_size = len(seeds)
            sampler = yield from run.run_in_worker(partial(run.session.prepare_transformer, batch_size=batch_size))
            yield from outputs.new_notices([*(lora.report.text for lora in sampler.applied_loras), *sampler.notes])
            stopwatch.lap()
            plan_before = run.session.plan
            records = [self._record(run, sampler, fingerprint, seed, i, batch_size) for i, seed in enumerate(seeds)]
            pictures = yield from generate_batch(run, sampler, records, len(remaining_seeds), conditioning, timer)
            if pictures is None:
                max_batch = len(seeds) // 2
                self._models.release_unused_memory()
                yield Notice(
                    text=f"{len(seeds)} pictures at once do not fit into memory: making {max_batch} at a time."
                )
                continue
            for (picture, tiling), record in zip(pictures, records, strict=True):  # memory may have run out meanwhile
                yield from self._finish(
                    run, picture, replace(record, computed={**record.computed, "autoencoder": tiling})
                )
            if (
                self._durations is not None and run.session.plan is plan_before
            ):  # else decoding was retried: not typical
                features = self._run_features(run.request, run.session.checkpoint, run.session.plan)
                finish_seconds = max(0.0, stopwatch.lap() - sum(timer.step_seconds))
                learn_duration(
                    self._durations,
                    features,
                    run,
                    timer,
                    pictures=len(seeds),
                    finish_seconds=finish_seconds,
                    setup_seconds=setup_seconds,
                )
                setup_seconds = None  # only the first batch includes the setup time
            del remaining_seeds[: len(seeds)]

    def _finish(self, run: RunContext, picture: Image.Image, record: Record) -> Generator[Event, None, None]:
        """Check, mark and save one picture. A picture that does not pass the check is discarded."""
        request, outputs, index = record.request, run.outputs, run.outputs.completed_count
        assert request.seed is not None
        try:
            yes_no_model, notes = find_yes_no_model(run)
            picture, more_notes = composite_region(picture, request, run.region, run.first_reference)
            notes += (*more_notes, *self.guard.check_output(picture, yes_no_model))
        except SafetyError as error:
            outputs.completed_count += 1
            outputs.withheld = error
            yield Withheld(index=index)
            if run.request.count > 1:  # of a single one the run's end tells
                yield Notice(text=f"{error} (Seed {request.seed}.)")
            return
        edit_mask = run.region.edit_mask if run.region else None
        file, signing_notes = self._encode_file(picture, record, run.ingredients, edit_mask)
        path = self._library.save(file.data, request)
        outputs.add_picture(path, request.seed, [*notes, *signing_notes, *file.notes], file.provenance)
        yield Saved(index=index, image=path, seed=request.seed, record=file.record)

    def _encode_file(
        self,
        picture: Image.Image,
        record: Record,
        ingredients: Sequence[ReferenceIngredient],
        edit_mask: Image.Image | None,
    ) -> tuple[File, tuple[str, ...]]:
        """Return the finished file of `picture`, and a note for the user if it could not be signed."""
        try:
            return self._finisher.finish(picture, record, ingredients, edit_mask), ()
        except CredentialsError as error:  # signing worked before the run; do not lose the picture now
            unsigned_record = replace(record, request=replace(record.request, sign=False))
            file = self._finisher.finish(picture, unsigned_record, edit_mask=edit_mask)
            return file, (f"The picture is not signed. {error}",)

    def save_preview(self, unfinished: UnfinishedPicture) -> tuple[Saved, tuple[str, ...]]:
        """Check, mark and save the last preview of an unfinished run, in the size of the requested picture.

        Returns the saved picture and notes for the user. Raises `StudioError`.
        """
        request = unfinished.record.request
        assert request.seed is not None and request.width and request.height
        size = request.width, request.height
        picture = (
            unfinished.image
            if unfinished.image.size == size
            else unfinished.image.resize(size, Image.Resampling.LANCZOS)
        )
        picture, notes = composite_region(picture, request, unfinished.region, unfinished.first_reference)
        notes_of_check = (*notes, *self.guard.check_output(picture))
        edit_mask = unfinished.region.edit_mask if unfinished.region else None
        file, signing_notes = self._encode_file(picture, unfinished.record, unfinished.ingredients, edit_mask)
        path = self._library.save(file.data, request)
        return Saved(index=0, image=path, seed=request.seed, record=file.record), (
            *notes_of_check,
            *signing_notes,
            *file.notes,
        )

    def _record(
        self, run: RunContext, sampler: Sampler, fingerprint: str, seed: int, place: int, together: int
    ) -> Record:
        enhanced = run.enhanced
        return Record(
            request=replace(run.request, seed=seed, count=1, references=(), mask=None),
            label=run.session.checkpoint.label,
            checkpoint=fingerprint,
            references=tuple(reference.sha256 for reference in run.references),
            mask=run.region.mask.sha256 if run.region and run.region.mask else "",
            loras=tuple(lora.sha256 for lora in sampler.applied_loras),
            original_prompt=enhanced.original if enhanced else None,
            upsampled_by=enhanced.by if enhanced else None,
            place=place,
            together=together,
            versions=self.versions,
            computed={
                **self.compute_settings(run.session.checkpoint),
                "autoencoder": describe_tiling(run.session.plan),
                "blocks": COMPILED_BLOCKS if sampler.is_compiled else EAGER_BLOCKS,
            },
        )
