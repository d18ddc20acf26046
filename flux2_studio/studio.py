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
from flux2_studio.models.manager import ModelManager, Sampler
from flux2_studio.models.memory.available import is_out_of_memory
from flux2_studio.models.memory.choices import choose_dtype, choose_storage
from flux2_studio.models.memory.plan import MemoryPlan
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

DRAFT_PREVIEW_SECONDS = (
    0.3  # minimum seconds between two previews of a draft; a preview of every fast step would double its time
)


def make_guard(settings: Settings, *, shared: bool) -> SafetyGuard:
    """The safety check of a studio that others reach (`shared`), or its owner alone."""
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
        own = settings.watermark_message
        self.message = WatermarkMessage.parse(own) if own else PUBLISHED_MESSAGE
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
        workload = make_request_shape(resolved, references, checkpoint)
        if not self.is_on_disk(checkpoint):
            return make_estimate(resolved, checkpoint, workload, is_on_disk=False, is_loaded=False)
        plan = self._models.predict_plan(
            checkpoint, workload, request.loras, load_vision_model=self._needs_vision_model
        )
        return make_estimate(
            resolved,
            checkpoint,
            workload,
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
        """The language models on this machine that can enrich prompts for `checkpoint`."""
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
        there = self._models.memory_capacity
        return (
            f"Takes about {format_size(sum(sizes))} of memory at once, {format_size(max(sizes))} when its parts take "
            "turns; "
            f"{self._models.device_label} has {format_size(there)}."
        )

    def preload(self, name: str, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Load checkpoint `name`, which must be on disk, as far as it fits, before it is asked for. Yields Status, then
        Ready, or Stopped once `cancelled`. Raises `StudioError`."""
        checkpoint = self.settings.checkpoint(name)
        usual = Request(prompt="any").resolve(checkpoint)

        def load(progress: ProgressCallback) -> None:
            workload = make_request_shape(usual, [], checkpoint)
            self._models.open(checkpoint, workload, progress, load_vision_model=self._needs_vision_model).preload(
                progress
            )

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
            done = yield from enhance_prompt(
                resolved, [it.image for it in references], self.settings, self._models, api_key, cancelled
            )
            yield from (Notice(text=text) for text in self._check_enhanced_prompt(done))
            yield Ready(checkpoint=resolved.checkpoint or "")
        except Cancelled:
            yield Stopped()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UpsampleError(f"There is too little main memory left for this: {SMALLER_REFERENCES_HINT}.") from error

    def _check_enhanced_prompt(self, enhanced: PromptEnhanced) -> tuple[str, ...]:
        """What the safety check says of an enriched prompt. Raises `UpsampleError` where it stops it: the user's own
        prompt has passed."""
        try:
            return self.guard.check_prompt(enhanced.prompt)
        except SafetyError as error:
            raise UpsampleError(
                f"{enhanced.by} wrote what does not pass: {error} Try again, {OR_WITHOUT_ENHANCING}."
            ) from error

    def generate(
        self, request: Request, cancelled: Callable[[], bool] = lambda: False, api_key: ApiKey | None = None
    ) -> Iterator[Event]:
        """Carry out `request`, yielding events as `events.py` orders them; the last is a Result or, if `cancelled`
        turned true between two steps, Stopped. api_key: the user's own for the server that enriches prompts. Raises
        `StudioError` for what the user must know.
        """
        finished = RunOutputs()
        try:
            yield from self._run(request, cancelled, api_key, finished)
        except Cancelled:
            yield from finished.new_notices(finished.with_seeds(finished.notes))
            yield Stopped(images=tuple(finished.images), seeds=tuple(finished.seeds))
        except (RuntimeError, MemoryError) as error:
            raise self._exhausted(request.checkpoint, error) from error

    def draft(self, request: Request, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Draw the first picture of `request` as a draft, without prompt enhancement and without saving it.

        The last event is Drafted, or Stopped if `cancelled`. Raises `StudioError`.
        """
        began = time.monotonic()
        finished = RunOutputs()
        once = replace(request, count=1, upsampling=Upsampling())
        try:
            self.guard.check_ready()
            resolved, references, region = yield from self._check_inputs(
                once, cancelled, finished, for_generation=False
            )
            run = yield from self._open_run(
                resolved, references, region, cancelled, finished, preview_interval=DRAFT_PREVIEW_SECONDS
            )
            conditions = yield from encode_conditioning(run)
            drawn = yield from run.run_in_worker(run.session.prepare_transformer)
            record = self._record(run, drawn, "", resolved.seeds[0], 0, 1)
            pictures = yield from generate_batch(run, drawn, [record], 1, conditions, StepTimer())
            assert pictures is not None, "one picture is not made in parts"
            ask, told = find_yes_no_model(run)
            picture, kept = composite_region(pictures[0][0], resolved, region, run.first_reference)
            yield from finished.new_notices([*told, *kept, *self.guard.check_output(picture, ask)])
            yield Drafted(request=resolved, image=picture, seconds=time.monotonic() - began)
        except Cancelled:
            yield Stopped()
        except (RuntimeError, MemoryError) as error:
            raise self._exhausted(request.checkpoint, error) from error

    def _exhausted(self, name: str | None, error: RuntimeError | MemoryError) -> OutOfMemory:
        """What the user is told of `error`, once all weights have left the memory. Raises `error` if it is another."""
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
        began = time.monotonic()
        raise_if_cancelled(cancelled)
        # Whatever can fail at the end is tried before hours of work.
        self._library.check_writable()
        self.guard.check_ready()
        request, references, region = yield from self._check_inputs(submitted, cancelled, outputs, for_generation=True)
        looking = time.monotonic() - began
        self._finisher.check(request)
        upsampled: PromptEnhanced | None = None
        if request.upsampling.by != "none":
            pictures = [reference.image for reference in references]
            upsampled = yield from enhance_prompt(request, pictures, self.settings, self._models, api_key, cancelled)
            yield from outputs.new_notices(self._check_enhanced_prompt(upsampled))
            request = replace(request, prompt=upsampled.prompt, upsampling=Upsampling())
        exhausted: MemoryPlan | None = None  # the plan that turned out to be too much
        while outputs.completed_count < request.count:
            before = exhausted
            run = yield from self._open_run(
                request,
                references,
                region,
                cancelled,
                outputs,
                enhanced=upsampled,
                failed_plan=before,
                check_seconds=looking,
            )
            try:
                yield from self._generate_pictures(run)
            except (RuntimeError, MemoryError) as error:
                if before or not is_out_of_memory(error):
                    raise
                exhausted = run.session.plan
            if exhausted and not before:
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
            seconds=time.monotonic() - began,
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
        """A run of what `_check_inputs` gave, with its checkpoint open. failed_plan: the plan that turned out to be too
        much; the others are as in `RunContext`."""
        checkpoint = self.settings.checkpoint(request.checkpoint)
        workload = make_request_shape(request, [reference.image.size for reference in references], checkpoint)
        session = yield from in_worker_thread(
            lambda progress: self._models.open(
                checkpoint,
                workload,
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
            request_shape=workload,
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
                source = self.signer.make_ingredient(number, data)
                yield from outputs.new_notices([source.note] if source.note else [])
                reference = replace(reference, ingredient=source)
            references.append(reference)
        request = submitted.resolve(checkpoint, [reference.image.size for reference in references])
        region = make_edit_region(request, references[0].image, self.pictures) if references else None
        if for_generation and submitted.metadata and self.reference_store is not None and region and region.mask:
            self.reference_store.save(region.mask.data)
        yield from outputs.new_notices(describe_changes(submitted, request))
        return request, references, region

    def _check_request(self, request: Request) -> Checkpoint:
        """The checkpoint of `request`. Whatever is wrong with the numbers is said before pictures are opened."""
        checkpoint = self.settings.checkpoint(request.checkpoint)
        request.resolve(checkpoint)
        self.loras.check(request.loras, checkpoint, None)
        return checkpoint

    def _references(self, request: Request) -> Iterator[tuple[PreparedReference, bytes]]:
        """Each reference, scaled to its cap, and its file. Raises `ReferenceImageError`."""
        cap = self.settings.checkpoint(request.checkpoint).max_pixels_per_reference(len(request.references))
        for number, path in enumerate(request.references, start=1):
            found = self.pictures.fitted(path, cap)
            note = fit_note(number, found.full_size, found.image.size)
            notes = (*found.notes, *([note] if note else []))
            yield PreparedReference(image=found.image, notes=notes, sha256=found.sha256), found.data

    def _generate_pictures(self, run: RunContext) -> Iterator[Event]:
        """Draw and save the pictures of `run` that are not finished yet."""
        watch = StageStopwatch(run.session, run.check_seconds)
        conditions = yield from encode_conditioning(run)
        once: float | None = watch.lap()
        finished = run.outputs
        fingerprint = ""  # read before the drawing: it may take a minute, be given up, or fail
        if run.request.metadata:
            checkpoint = run.session.checkpoint
            fingerprint = yield from run.run_in_worker(lambda progress: self._models.compute_hash(checkpoint, progress))
        timer = StepTimer()
        most = run.session.plan.batch_size
        waiting = list(run.request.seeds[finished.completed_count :])
        while waiting:
            seeds = waiting[:most]
            together = len(seeds)
            drawn = yield from run.run_in_worker(partial(run.session.prepare_transformer, batch_size=together))
            yield from finished.new_notices([*(lora.report.text for lora in drawn.applied_loras), *drawn.notes])
            watch.lap()
            planned = run.session.plan
            records = [self._record(run, drawn, fingerprint, seed, i, together) for i, seed in enumerate(seeds)]
            pictures = yield from generate_batch(run, drawn, records, len(waiting), conditions, timer)
            if pictures is None:
                most = len(seeds) // 2
                self._models.release_unused_memory()
                yield Notice(text=f"{len(seeds)} pictures at once do not fit into memory: making {most} at a time.")
                continue
            for (picture, decoded), record in zip(pictures, records, strict=True):  # memory may have run out meanwhile
                yield from self._finish(
                    run, picture, replace(record, computed={**record.computed, "autoencoder": decoded})
                )
            if self._durations is not None and run.session.plan is planned:  # else decoding was retried: not typical
                way = self._run_features(run.request, run.session.checkpoint, run.session.plan)
                finishing = max(0.0, watch.lap() - sum(timer.step_seconds))
                learn_duration(
                    self._durations, way, run, timer, pictures=len(seeds), finish_seconds=finishing, setup_seconds=once
                )
                once = None  # only the first batch includes the setup time
            del waiting[: len(seeds)]

    def _finish(self, run: RunContext, picture: Image.Image, record: Record) -> Generator[Event, None, None]:
        """Check, mark and save one picture; what the check does not let through goes nowhere."""
        request, finished, index = record.request, run.outputs, run.outputs.completed_count
        assert request.seed is not None
        try:
            ask, told = find_yes_no_model(run)
            picture, kept = composite_region(picture, request, run.region, run.first_reference)
            told += (*kept, *self.guard.check_output(picture, ask))
        except SafetyError as error:
            finished.completed_count += 1
            finished.withheld = error
            yield Withheld(index=index)
            if run.request.count > 1:  # of a single one the run's end tells
                yield Notice(text=f"{error} (Seed {request.seed}.)")
            return
        change = run.region.edit_mask if run.region else None
        file, unsigned = self._encode_file(picture, record, run.ingredients, change)
        path = self._library.save(file.data, request)
        finished.add_picture(path, request.seed, [*told, *unsigned, *file.notes], file.provenance)
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
            unsigned = replace(record, request=replace(record.request, sign=False))
            file = self._finisher.finish(picture, unsigned, edit_mask=edit_mask)
            return file, (f"The picture is not signed. {error}",)

    def save_preview(self, unfinished: UnfinishedPicture) -> tuple[Saved, tuple[str, ...]]:
        """Check, mark and save the preview of a run that was not finished, as large as the picture would have been,
        and what the user should know of it. Raises `StudioError`."""
        request = unfinished.record.request
        assert request.seed is not None and request.width and request.height
        size = request.width, request.height
        picture = (
            unfinished.image
            if unfinished.image.size == size
            else unfinished.image.resize(size, Image.Resampling.LANCZOS)
        )
        picture, notes = composite_region(picture, request, unfinished.region, unfinished.first_reference)
        told = (*notes, *self.guard.check_output(picture))
        change = unfinished.region.edit_mask if unfinished.region else None
        file, unsigned = self._encode_file(picture, unfinished.record, unfinished.ingredients, change)
        path = self._library.save(file.data, request)
        return Saved(index=0, image=path, seed=request.seed, record=file.record), (*told, *unsigned, *file.notes)

    def _record(
        self, run: RunContext, sampler: Sampler, fingerprint: str, seed: int, place: int, together: int
    ) -> Record:
        upsampled = run.enhanced
        return Record(
            request=replace(run.request, seed=seed, count=1, references=(), mask=None),
            label=run.session.checkpoint.label,
            checkpoint=fingerprint,
            references=tuple(reference.sha256 for reference in run.references),
            mask=run.region.mask.sha256 if run.region and run.region.mask else "",
            loras=tuple(lora.sha256 for lora in sampler.applied_loras),
            original_prompt=upsampled.original if upsampled else None,
            upsampled_by=upsampled.by if upsampled else None,
            place=place,
            together=together,
            versions=self.versions,
            computed={
                **self.compute_settings(run.session.checkpoint),
                "autoencoder": describe_tiling(run.session.plan),
                "blocks": COMPILED_BLOCKS if sampler.is_compiled else EAGER_BLOCKS,
            },
        )
