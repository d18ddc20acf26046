"""One run from request to saved pictures. The only orchestrator; every caller goes through `Studio.generate`.

resolve -> references -> check prompt and references -> upsample -> check again -> plan -> encode text -> encode
references -> denoise (previews) -> decode -> check image -> watermark, settings, signature -> save -> Result
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version

import torch
from PIL import Image

from flux2_studio import __version__
from flux2_studio.checkpoints import Checkpoint
from flux2_studio.engine.weights.quantize import multiplies
from flux2_studio.errors import CredentialsError, OutOfMemory, SafetyError, UpsampleError
from flux2_studio.events import Drafted, Event, Notice, Ready, Result, Saved, Stopped, Upsampled, Withheld
from flux2_studio.images.masks import Region, load_mask, region_of
from flux2_studio.images.reference_store import KeptReferences
from flux2_studio.images.references import fit, fit_note, load_reference
from flux2_studio.models.hub.classifier import find_classifier
from flux2_studio.models.hub.hub_errors import amount
from flux2_studio.models.hub.repositories import Hub, Progress
from flux2_studio.models.loras import Loras
from flux2_studio.models.manager import Drawn, ModelManager
from flux2_studio.models.memory.available import is_out_of_memory
from flux2_studio.models.memory.choices import choose_dtype, choose_storage
from flux2_studio.models.memory.plan import Plan
from flux2_studio.models.worker_thread import Cancelled, check, with_status
from flux2_studio.models.writers import WriterOffer
from flux2_studio.prompting.enhance import TRY, check_choice, enrich
from flux2_studio.prompting.openai_server import ApiKey
from flux2_studio.prompting.replies import OR_WITHOUT
from flux2_studio.provenance.c2pa.credentials import Signer, Source
from flux2_studio.provenance.finish import Finished as File
from flux2_studio.provenance.finish import Finisher
from flux2_studio.provenance.watermark import PUBLISHED, Message
from flux2_studio.record import AS_WRITTEN, COMPILED, Record
from flux2_studio.request import Request, Upsampling, changes
from flux2_studio.safety.guard import Guard
from flux2_studio.safety.policy import decide
from flux2_studio.settings import Settings
from flux2_studio.stages.drawing import (
    WHOLE,
    Finished,
    Reference,
    Run,
    Sketch,
    Timer,
    asking_of,
    draw,
    encode,
    settled,
    strips,
    workload_of,
)
from flux2_studio.stages.durations import Pace, Way
from flux2_studio.stages.estimates import Outlook, Stopwatch, foresee, learn, way_of
from flux2_studio.storage.library import Library

DRAFTED = 0.3  # seconds between two previews of a draft: drawing those of a quick one would take as long as its steps


def guard_of(settings: Settings, *, shared: bool) -> Guard:
    """The safety check of a studio that others reach (`shared`), or its owner alone."""
    policy = decide(settings.safety, shared=shared, on_space=settings.on_space)
    return Guard(policy, lambda: find_classifier(settings.nsfw_model))


class Studio:
    """Turns requests into pictures, one at a time. `jobs.JobQueue` puts many callers in line.

    guard: the safety check, by default that of a studio for its owner alone. kept: where references are kept, so that
    their pictures can be made again; None keeps none. pace: learns how long runs take; None for nobody. Raises
    `StudioError` for a watermark that cannot be laid.
    """

    def __init__(
        self,
        settings: Settings,
        models: ModelManager | None = None,
        library: Library | None = None,
        *,
        guard: Guard | None = None,
        kept: KeptReferences | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.guard = guard or guard_of(settings, shared=False)
        self.signer = Signer(settings.identity, settings.c2pa_certificate, settings.c2pa_key)
        own = settings.watermark_message
        self.message = Message.parse(own) if own else PUBLISHED
        self.kept = kept
        self._pace = pace
        self._clock = clock
        self._models = models or ModelManager(settings, Hub(settings))
        self._library = library or Library(settings.outputs)
        self._finisher = Finisher(self.message, self.signer)
        self._reading = threading.Lock()

    @property
    def _asks(self) -> bool:
        """Whether a language model is worth loading as a whole, to be asked: where strangers use the studio."""
        return self.guard.policy == "on"

    @property
    def loras(self) -> Loras:
        """The LoRAs that requests may choose."""
        return self._models.loras

    def on_disk(self, checkpoint: Checkpoint) -> bool:
        """Whether `checkpoint` can run without a download."""
        return self._models.on_disk(checkpoint)

    def resolve(self, request: Request, key: ApiKey | None = None) -> Request:
        """`request` with nothing left open, its references looked at. key: see `generate`. Raises `RequestError` for
        what cannot be done, `UpsampleError` where nobody could enrich the prompt."""
        checkpoint = self._checked(request)
        check_choice(request.upsampling, checkpoint, self.settings, key)
        sizes: list[tuple[int, int]] = []
        for reference, _ in self._references(request):
            if request.mask and not sizes:
                load_mask(request.mask, reference.image.size)
            sizes.append(reference.image.size)
        return request.resolve(checkpoint, sizes)

    def outlook(self, request: Request, references: Sequence[tuple[int, int]] = ()) -> Outlook:
        """What `request` will take: memory, where its checkpoint is on disk, and time, where that was learnt. Reads
        headers only.

        references: the size of each in pixels, scaled to its cap. Raises `StudioError` where it will not fit.
        """
        checkpoint = self.settings.checkpoint(request.checkpoint)
        resolved = request.resolve(checkpoint, references)
        workload = workload_of(resolved, references, checkpoint)
        if not self.on_disk(checkpoint):
            return foresee(resolved, checkpoint, workload, there=False, loaded=False)
        plan = self._models.outlook(checkpoint, workload, request.loras, whole=self._asks)
        return foresee(
            resolved,
            checkpoint,
            workload,
            fit=plan.text(self._models.place),
            way=self._way(resolved, checkpoint, plan),
            batch=plan.batch,
            pace=self._pace,
            there=True,
            loaded=self._models.loaded(checkpoint),
        )

    def _way(self, request: Request, checkpoint: Checkpoint, plan: Plan) -> Way:
        computed = self.computed(checkpoint)
        precision = f"{computed['precision']}, weights {computed['weights']}"
        return way_of(self._models.device_name, precision, checkpoint, plan, self.settings.preview, request)

    @property
    def messages(self) -> tuple[Message, ...]:
        """What watermarks may say that are looked for: this studio's, and the published one."""
        return tuple(dict.fromkeys((self.message, PUBLISHED)))

    def writers(self, checkpoint: Checkpoint) -> tuple[WriterOffer, ...]:
        """The language models on this machine that can enrich prompts for `checkpoint`."""
        return self._models.writers(checkpoint)

    @cached_property
    def versions(self) -> Mapping[str, str]:
        """Of what pictures depend on."""
        return {"flux2-studio": __version__, "torch": torch.__version__, "transformers": version("transformers")}

    def computed(self, checkpoint: Checkpoint) -> Mapping[str, str]:
        """How `checkpoint` is computed here, as far as pictures depend on it."""
        device, part = self._models.device, checkpoint.flow
        weights: str = choose_storage(self.settings.quantize, self.settings.dtype, device, part)
        if weights in ("fp8", "int8") and multiplies(device, weights):  # type: ignore[arg-type]
            weights += " products"
        return {
            "device": device.type,
            "precision": str(choose_dtype(self.settings.dtype, device, checkpoint, part)).removeprefix("torch."),
            "weights": weights,
            "autoencoder": WHOLE,
            "blocks": self._models.compiled.outlook(part.size),
        }

    def checkpoint_hash(self, checkpoint: Checkpoint) -> str | None:
        """SHA-256 of the transformer's file; None where it is not here, or would take long to read."""
        return self._models.hash_of(checkpoint) if self.on_disk(checkpoint) else None

    def needs(self, checkpoint: Checkpoint) -> str:
        """What `checkpoint` needs of the memory, in words: by its published sizes, for it may not be here yet."""
        sizes = [part.size for part in checkpoint.parts]
        there = self._models.capacity
        return (
            f"Takes about {amount(sum(sizes))} of memory at once, {amount(max(sizes))} when its parts take turns; "
            f"{self._models.place} has {amount(there)}."
        )

    def prepare(self, name: str, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Load checkpoint `name`, which must be on disk, as far as it fits, before it is asked for. Yields Status, then
        Ready, or Stopped once `cancelled`. Raises `StudioError`."""
        checkpoint = self.settings.checkpoint(name)
        usual = Request(prompt="any").resolve(checkpoint)

        def load(progress: Progress) -> None:
            workload = workload_of(usual, [], checkpoint)
            self._models.open(checkpoint, workload, progress, whole=self._asks).preload(progress)

        try:
            yield from with_status(load, cancelled)
            yield Ready(checkpoint=name)
        except Cancelled:
            yield Stopped()
        except (RuntimeError, MemoryError) as error:
            raise self._exhausted(name, error) from error

    def enrich(
        self, request: Request, cancelled: Callable[[], bool] = lambda: False, key: ApiKey | None = None
    ) -> Iterator[Event]:
        """Have the prompt of `request` enriched as its `upsampling` says, and draw nothing: the last events are
        Upsampled and Ready, or Stopped once `cancelled`. key: see `generate`. Raises `StudioError`."""
        try:
            self.guard.ready()
            resolved, references, _ = yield from self._examined(request, cancelled, Finished(), with_files=False)
            done = yield from enrich(
                resolved, [it.image for it in references], self.settings, self._models, key, cancelled
            )
            yield from (Notice(text=text) for text in self._passed(done))
            yield Ready(checkpoint=resolved.checkpoint or "")
        except Cancelled:
            yield Stopped()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UpsampleError(f"There is too little main memory left for this: {TRY}.") from error

    def _passed(self, done: Upsampled) -> tuple[str, ...]:
        """What the safety check says of an enriched prompt. Raises `UpsampleError` where it stops it: the user's own
        prompt has passed."""
        try:
            return self.guard.prompt(done.prompt)
        except SafetyError as error:
            raise UpsampleError(f"{done.by} wrote what does not pass: {error} Try again, {OR_WITHOUT}.") from error

    def generate(
        self, request: Request, cancelled: Callable[[], bool] = lambda: False, key: ApiKey | None = None
    ) -> Iterator[Event]:
        """Carry out `request`, yielding events as `events.py` orders them; the last is a Result or, if `cancelled`
        turned true between two steps, Stopped. key: the user's own for the server that enriches prompts. Raises
        `StudioError` for what the user must know.
        """
        finished = Finished()
        try:
            yield from self._run(request, cancelled, key, finished)
        except Cancelled:
            yield from finished.fresh(finished.named(finished.notes))
            yield Stopped(images=tuple(finished.images), seeds=tuple(finished.seeds))
        except (RuntimeError, MemoryError) as error:
            raise self._exhausted(request.checkpoint, error) from error

    def draft(self, request: Request, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Draw the first picture of `request` for a look, with its prompt as it is, and keep nothing of it: whoever
        asks wants the next one in a moment. The last event is Drafted or, once `cancelled`, Stopped. Raises
        `StudioError`."""
        began = time.monotonic()
        finished = Finished()
        once = replace(request, count=1, upsampling=Upsampling())
        try:
            self.guard.ready()
            resolved, references, region = yield from self._examined(once, cancelled, finished, with_files=False)
            run = yield from self._opened(resolved, references, region, cancelled, finished, pause=DRAFTED)
            conditions = yield from encode(run)
            drawn = yield from run.working(run.session.draw)
            record = self._record(run, drawn, "", resolved.seeds[0], 0, 1)
            pictures = yield from draw(run, drawn, [record], 1, conditions, Timer())
            assert pictures is not None, "one picture is not made in parts"
            ask, told = asking_of(run)
            picture, kept = settled(pictures[0][0], resolved, region, run.first)
            yield from finished.fresh([*told, *kept, *self.guard.output(picture, ask)])
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
        self, asked: Request, cancelled: Callable[[], bool], key: ApiKey | None, finished: Finished
    ) -> Generator[Event, None, None]:
        began = time.monotonic()
        check(cancelled)
        # Whatever can fail at the end is tried before hours of work.
        self._library.check()
        self.guard.ready()
        request, references, region = yield from self._examined(asked, cancelled, finished, with_files=True)
        looking = time.monotonic() - began
        self._finisher.check(request)
        upsampled: Upsampled | None = None
        if request.upsampling.by != "none":
            pictures = [reference.image for reference in references]
            upsampled = yield from enrich(request, pictures, self.settings, self._models, key, cancelled)
            yield from finished.fresh(self._passed(upsampled))
            request = replace(request, prompt=upsampled.prompt, upsampling=Upsampling())
        exhausted: Plan | None = None  # the plan that turned out to be too much
        while finished.drawn < request.count:
            before = exhausted
            run = yield from self._opened(
                request,
                references,
                region,
                cancelled,
                finished,
                upsampled=upsampled,
                after=before,
                looking=looking,
            )
            try:
                yield from self._make(run)
            except (RuntimeError, MemoryError) as error:
                if before or not is_out_of_memory(error):
                    raise
                exhausted = run.session.plan
            if exhausted and not before:
                del run  # and whatever it holds on the device
                self._models.release_all()
                yield Notice(text="The memory ran out, in spite of the plan: trying once more, with less of it in use.")
        if finished.withheld is not None and not finished.images:
            raise finished.withheld
        yield from finished.fresh(finished.named(finished.notes))
        yield Result(
            request=request,
            images=tuple(finished.images),
            seeds=tuple(finished.seeds),
            seconds=time.monotonic() - began,
            provenance=finished.named(finished.provenance),
        )

    def _opened(
        self,
        request: Request,
        references: Sequence[Reference],
        region: Region | None,
        cancelled: Callable[[], bool],
        finished: Finished,
        *,
        upsampled: Upsampled | None = None,
        after: Plan | None = None,
        pause: float = 0.0,
        looking: float = 0.0,
    ) -> Generator[Event, None, Run]:
        """A run of what `_examined` gave, with its checkpoint open. after: the plan that turned out to be too much; the
        others are as in `Run`."""
        checkpoint = self.settings.checkpoint(request.checkpoint)
        workload = workload_of(request, [reference.image.size for reference in references], checkpoint)
        session = yield from with_status(
            lambda progress: self._models.open(
                checkpoint, workload, progress, loras=request.loras, after=after, whole=self._asks
            ),
            cancelled,
        )
        yield from finished.fresh(session.notes)
        if not session.plan.resident:
            yield Notice(text=session.plan.text(self._models.place))
        return Run(
            request=request,
            upsampled=upsampled,
            references=references,
            region=region,
            session=session,
            workload=workload,
            guard=self.guard,
            cancelled=cancelled,
            finished=finished,
            pause=pause,
            clock=self._clock,
            looking=looking,
        )

    def _examined(
        self, asked: Request, cancelled: Callable[[], bool], finished: Finished, *, with_files: bool
    ) -> Generator[Event, None, tuple[Request, list[Reference], Region | None]]:
        """The resolved request, its references and what of the first may change, all of it checked. with_files: whether
        pictures will be made of the references, which are then kept, and named in the pictures' credentials."""
        checkpoint = self._checked(asked)
        yield from finished.fresh(self.guard.prompt(asked.prompt))
        references = []
        for number, (reference, data) in enumerate(self._references(asked), start=1):
            check(cancelled)
            yield from finished.fresh(self.guard.reference(number, reference.image))
            if with_files and asked.metadata and self.kept is not None:
                self.kept.keep(data)
            if with_files and asked.sign:
                source = self.signer.source(number, data)
                yield from finished.fresh([source.note] if source.note else [])
                reference = replace(reference, source=source)
            references.append(reference)
        request = asked.resolve(checkpoint, [reference.image.size for reference in references])
        region = region_of(request, references[0].image) if references else None
        if with_files and asked.metadata and self.kept is not None and region and region.mask:
            self.kept.keep(region.mask.data)
        yield from finished.fresh(changes(asked, request))
        return request, references, region

    def _checked(self, request: Request) -> Checkpoint:
        """The checkpoint of `request`. Whatever is wrong with the numbers is said before pictures are opened."""
        checkpoint = self.settings.checkpoint(request.checkpoint)
        request.resolve(checkpoint)
        self.loras.check(request.loras, checkpoint, None)
        return checkpoint

    def _references(self, request: Request) -> Iterator[tuple[Reference, bytes]]:
        """Each reference, scaled to its cap, and its file; one at a time, for a photograph takes hundreds of megabytes
        until it is fitted. Raises `ReferenceImageError`."""
        cap = self.settings.checkpoint(request.checkpoint).reference_cap(len(request.references))
        for number, path in enumerate(request.references, start=1):
            with self._reading:  # those of one run after the other's, too: runs are submitted from many threads
                whole = load_reference(path)
                image = fit(whole.image, cap)
            note = fit_note(number, whole.image.size, image.size)
            notes = (*whole.notes, *([note] if note else []))
            yield Reference(image=image, notes=notes, sha256=whole.sha256), whole.data

    def _make(self, run: Run) -> Iterator[Event]:
        """Draw and save the pictures of `run` that are not finished yet."""
        watch = Stopwatch(run.session, run.looking)
        conditions = yield from encode(run)
        once: float | None = watch.lap()
        finished = run.finished
        fingerprint = ""  # read before the drawing: it may take a minute, be given up, or fail
        if run.request.metadata:
            checkpoint = run.session.checkpoint
            fingerprint = yield from run.working(lambda progress: self._models.hashing(checkpoint, progress))
        timer = Timer()
        most = run.session.plan.batch
        waiting = list(run.request.seeds[finished.drawn :])
        while waiting:
            seeds = waiting[:most]
            together = len(seeds)
            drawn = yield from run.working(partial(run.session.draw, pictures=together))
            yield from finished.fresh([*(lora.report.text for lora in drawn.applied), *drawn.notes])
            watch.lap()
            planned = run.session.plan
            records = [self._record(run, drawn, fingerprint, seed, i, together) for i, seed in enumerate(seeds)]
            pictures = yield from draw(run, drawn, records, len(waiting), conditions, timer)
            if pictures is None:
                most = len(seeds) // 2
                self._models.release_scratch()
                yield Notice(text=f"{len(seeds)} pictures at once do not fit into memory: making {most} at a time.")
                continue
            for (picture, decoded), record in zip(pictures, records, strict=True):  # memory may have run out meanwhile
                yield from self._finish(
                    run, picture, replace(record, computed={**record.computed, "autoencoder": decoded})
                )
            if self._pace is not None and run.session.plan is planned:  # else it took some tries
                way = self._way(run.request, run.session.checkpoint, run.session.plan)
                finishing = max(0.0, watch.lap() - sum(timer.batch))
                learn(self._pace, way, run, timer, pictures=len(seeds), finishing=finishing, once=once)
                once = None  # of the pictures that follow it is no part
            del waiting[: len(seeds)]

    def _finish(self, run: Run, picture: Image.Image, record: Record) -> Generator[Event, None, None]:
        """Check, mark and save one picture; what the check does not let through goes nowhere."""
        request, finished, index = record.request, run.finished, run.finished.drawn
        assert request.seed is not None
        try:
            ask, told = asking_of(run)
            picture, kept = settled(picture, request, run.region, run.first)
            told += (*kept, *self.guard.output(picture, ask))
        except SafetyError as error:
            finished.drawn += 1
            finished.withheld = error
            yield Withheld(index=index)
            if run.request.count > 1:  # of a single one the run's end tells
                yield Notice(text=f"{error} (Seed {request.seed}.)")
            return
        change = run.region.change if run.region else None
        file, unsigned = self._marked(picture, record, run.sources, change)
        path = self._library.save(file.data, request)
        finished.keep(path, request.seed, [*told, *unsigned, *file.notes], file.provenance)
        yield Saved(index=index, image=path, seed=request.seed, record=file.record)

    def _marked(
        self, picture: Image.Image, record: Record, sources: Sequence[Source], change: Image.Image | None
    ) -> tuple[File, tuple[str, ...]]:
        """The finished file of `picture`, and why it is not signed where it was to be."""
        try:
            return self._finisher.finish(picture, record, sources, change), ()
        except CredentialsError as error:  # it was there before the work, and so is the picture now
            unsigned = replace(record, request=replace(record.request, sign=False))
            file = self._finisher.finish(picture, unsigned, change=change)
            return file, (f"The picture is not signed. {error}",)

    def keep(self, sketch: Sketch) -> tuple[Saved, tuple[str, ...]]:
        """Check, mark and save the preview of a run that was not finished, as large as the picture would have been,
        and what the user should know of it. Raises `StudioError`."""
        request = sketch.record.request
        assert request.seed is not None and request.width and request.height
        size = request.width, request.height
        picture = sketch.image if sketch.image.size == size else sketch.image.resize(size, Image.Resampling.LANCZOS)
        picture, notes = settled(picture, request, sketch.region, sketch.first)
        told = (*notes, *self.guard.output(picture))
        change = sketch.region.change if sketch.region else None
        file, unsigned = self._marked(picture, sketch.record, sketch.sources, change)
        path = self._library.save(file.data, request)
        return Saved(index=0, image=path, seed=request.seed, record=file.record), (*told, *unsigned, *file.notes)

    def _record(self, run: Run, drawn: Drawn, fingerprint: str, seed: int, place: int, together: int) -> Record:
        upsampled = run.upsampled
        return Record(
            request=replace(run.request, seed=seed, count=1, references=(), mask=None),
            label=run.session.checkpoint.label,
            checkpoint=fingerprint,
            references=tuple(reference.sha256 for reference in run.references),
            mask=run.region.mask.sha256 if run.region and run.region.mask else "",
            loras=tuple(lora.sha256 for lora in drawn.applied),
            original_prompt=upsampled.original if upsampled else None,
            upsampled_by=upsampled.by if upsampled else None,
            place=place,
            together=together,
            versions=self.versions,
            computed={
                **self.computed(run.session.checkpoint),
                "autoencoder": strips(run.session.plan),
                "blocks": COMPILED if drawn.compiled else AS_WRITTEN,
            },
        )
