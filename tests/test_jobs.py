"""The queue, with a scripted studio in place of the real one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flux2_studio.checkpoints import CHECKPOINTS
from flux2_studio.errors import RequestError, StudioError, UpsampleError, WeightsError
from flux2_studio.events import (
    Event,
    Failed,
    Notice,
    Preview,
    PromptEnhanced,
    PromptProgress,
    Queued,
    Ready,
    Result,
    Saved,
    Status,
    Stopped,
)
from flux2_studio.jobs.queue import INTERNAL_ERROR_MESSAGE, MAX_ENHANCE_JOBS, MAX_FINISHED_JOBS, JobQueue
from flux2_studio.jobs.scheduler import MAX_SKIPS
from flux2_studio.jobs.tasks import EnhanceJob, Job
from flux2_studio.prompting.openai_server import ApiKey
from flux2_studio.record import Record
from flux2_studio.request import Request, Upsampling
from flux2_studio.storage.database import Database
from flux2_studio.storage.history import History
from tests.scripted_studio import PATIENCE, Gate, Script, ScriptedStudio, endless, follow, four_steps, preview, result


def bad_weights(request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
    yield Status(text="loading")
    raise WeightsError("klein.safetensors is damaged: download it again.")


def defect(request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
    yield preview(1)
    raise ZeroDivisionError("secret detail")


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Callable[..., tuple[JobQueue, ScriptedStudio]]:
    """Starts a queue over scripts; the queue is closed after the test."""

    def start(**scripts: Script) -> tuple[JobQueue, ScriptedStudio]:
        studio = ScriptedStudio(**scripts)
        jobs = JobQueue(studio)
        request.addfinalizer(jobs.close)
        return jobs, studio

    return start


Start = Callable[..., tuple[JobQueue, ScriptedStudio]]


def test_a_run_from_submit_to_result(start: Start) -> None:
    jobs, _ = start(fox=four_steps)
    job = jobs.submit(Request(prompt="fox", seed=5))
    events = follow(job)
    assert events[-1] == result(job.request)
    assert job.request.seeds == (5,)
    assert job.finished


def test_a_mistake_is_told_at_submit_and_runs_nothing(start: Start) -> None:
    jobs, studio = start(fox=four_steps)
    with pytest.raises(RequestError, match="no such script"):
        jobs.submit(Request(prompt="unknown"))
    follow(jobs.submit(Request(prompt="fox")))
    assert studio.ran == ["fox"]


def test_numbers_rise_and_since_continues(start: Start) -> None:
    jobs, _ = start(fox=four_steps)
    job = jobs.submit(Request(prompt="fox"))
    live = list(job.events(timeout=PATIENCE))
    numbers = [number for number, _ in live]
    assert numbers == sorted(set(numbers))
    last = numbers[-1]
    assert list(job.events(last, timeout=PATIENCE)) == live[-1:]


def test_nothing_new_of_a_finished_run_ends_at_once(start: Start) -> None:
    jobs, _ = start(fox=four_steps)
    job = jobs.submit(Request(prompt="fox"))
    last = list(job.events(timeout=PATIENCE))[-1][0]
    got: list[object] = []
    reader = threading.Thread(target=lambda: got.extend(job.events(last + 1)), daemon=True)
    reader.start()
    reader.join(PATIENCE)
    assert not reader.is_alive(), "a follower that has seen the end waits for ever"
    assert got == []


def test_a_late_follower_gets_what_stays_true(start: Start) -> None:
    jobs, _ = start(fox=four_steps)
    job = jobs.submit(Request(prompt="fox", width=100))
    follow(job)
    notice, end = follow(job)
    assert isinstance(notice, Notice) and "rounded from 100" in notice.text
    assert end == result(job.request)


def test_a_slow_follower_gets_only_the_newest_preview() -> None:
    job = Job(Request(prompt="fox").resolve(CHECKPOINTS[0]), "")
    job.add_event(Status(text="drawing"))
    for step in (1, 2, 3):
        job.add_event(preview(step))
        job.add_event(Notice(text=f"kept {step}"))
    seen = [event for _, event in job.events(timeout=0.01)]
    notices = [Notice(text=f"kept {step}") for step in (1, 2, 3)]
    assert seen == [Status(text="drawing"), *notices[:2], preview(3), notices[2]]
    assert not job.finished


def test_events_that_come_while_following(start: Start) -> None:
    gate = Gate()
    jobs, _ = start(gate=gate)
    job = jobs.submit(Request(prompt="gate"))
    assert gate.begun.wait(PATIENCE)
    got: list[Event] = []
    reader = threading.Thread(target=lambda: got.extend(follow(job)), daemon=True)
    reader.start()
    job.add_event(Notice(text="while you wait"))
    gate.go.set()
    reader.join(PATIENCE)
    assert got == [Notice(text="while you wait"), result(job.request)]


def test_cancel_between_steps(start: Start) -> None:
    jobs, _ = start(endless=endless)
    job = jobs.submit(Request(prompt="endless"))
    for _, event in job.events(timeout=PATIENCE):
        if isinstance(event, Preview):
            job.cancel()
    assert job.cancelled
    assert follow(job)[-1] == Stopped(images=(Path("first.png"),), seeds=(1,))


def test_cancelling_one_leaves_the_next_alone(start: Start) -> None:
    jobs, _ = start(endless=endless, fox=four_steps)
    stopped, next_one = jobs.submit(Request(prompt="endless")), jobs.submit(Request(prompt="fox"))
    stopped.cancel()
    assert isinstance(follow(stopped)[-1], Stopped)
    assert isinstance(follow(next_one)[-1], Result)


def test_a_run_cancelled_while_it_waits_draws_nothing(start: Start) -> None:
    gate = Gate()
    jobs, studio = start(gate=gate, fox=four_steps)
    first, waiting = jobs.submit(Request(prompt="gate")), jobs.submit(Request(prompt="fox"))
    waiting.cancel()
    assert follow(waiting) == [Stopped()]  # at once, without its turn
    gate.go.set()
    assert isinstance(follow(first)[-1], Result)
    follow(jobs.submit(Request(prompt="fox")))
    assert studio.ran == ["gate", "fox"]  # the cancelled one never ran


def test_nothing_comes_after_the_last_event() -> None:
    job = Job(Request(prompt="fox"), "")
    job.cancel()
    job.add_event(Queued(runs_ahead=1))  # the queue may have counted places just before
    job.add_event(Preview(step=1, steps=4, images=(), first_index=0, count=1, seconds_left=None))
    assert job.finished
    assert [event for _, event in job.events()] == [Stopped()]


def test_no_run_begins_when_the_queue_is_closed(start: Start) -> None:
    jobs, _ = start(fox=four_steps)
    jobs.close()
    with pytest.raises(StudioError, match="shutting down"):
        jobs.submit(Request(prompt="fox"))


def test_places_in_the_queue(start: Start) -> None:
    gate = Gate()
    jobs, studio = start(gate=gate, fox=four_steps, owl=four_steps)
    running = jobs.submit(Request(prompt="gate"))
    assert gate.begun.wait(PATIENCE)
    second, third = jobs.submit(Request(prompt="fox")), jobs.submit(Request(prompt="owl"))
    assert [event for _, event in second.events(timeout=0.01)] == [Queued(runs_ahead=1)]
    assert [event for _, event in third.events(timeout=0.01)] == [Queued(runs_ahead=2)]
    assert [event for _, event in running.events(timeout=0.01)] == []
    gate.go.set()
    assert isinstance(follow(third)[-1], Result)
    assert studio.ran == ["gate", "fox", "owl"]


def test_a_studio_error_is_told_and_the_worker_lives(start: Start) -> None:
    jobs, _ = start(bad=bad_weights, fox=four_steps)
    failed = follow(jobs.submit(Request(prompt="bad")))
    assert failed[-1] == Failed(message="klein.safetensors is damaged: download it again.")
    assert isinstance(follow(jobs.submit(Request(prompt="fox")))[-1], Result)


def test_a_defect_is_logged_whole_and_told_in_words(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    jobs, _ = start(defect=defect, fox=four_steps)
    with caplog.at_level(logging.ERROR, logger="flux2_studio.jobs.queue"):
        job = jobs.submit(Request(prompt="defect"))
        events = follow(job)
    assert events[-1] == Failed(message=INTERNAL_ERROR_MESSAGE)
    assert "secret detail" not in INTERNAL_ERROR_MESSAGE
    (record,) = [record for record in caplog.records if record.name == "flux2_studio.jobs.queue"]
    assert job.id in record.getMessage()
    assert record.exc_info is not None and record.exc_info[0] is ZeroDivisionError
    assert isinstance(follow(jobs.submit(Request(prompt="fox")))[-1], Result)


def test_a_job_belongs_to_its_owner(start: Start) -> None:
    jobs, _ = start(fox=four_steps)
    job = jobs.submit(Request(prompt="fox"), owner="ann")
    follow(job)
    assert jobs.get(job.id, "ann") is job
    assert jobs.get(job.id, "bob") is None
    assert jobs.get(job.id) is None
    assert jobs.get("unknown", "ann") is None


def test_old_jobs_are_forgotten(start: Start) -> None:
    jobs, _ = start(fox=four_steps)
    made = []
    for _ in range(MAX_FINISHED_JOBS + 3):
        made.append(jobs.submit(Request(prompt="fox")))
        follow(made[-1])
    assert jobs.get(made[0].id) is None
    assert jobs.get(made[-1].id) is made[-1]
    assert sum(jobs.get(job.id) is not None for job in made) <= MAX_FINISHED_JOBS + 1


def test_close_ends_what_runs_and_what_waits() -> None:
    jobs = JobQueue(ScriptedStudio(endless=endless))
    running, waiting = jobs.submit(Request(prompt="endless")), jobs.submit(Request(prompt="endless"))
    closer = threading.Thread(target=jobs.close, daemon=True)
    closer.start()
    closer.join(PATIENCE)
    assert not closer.is_alive()
    assert isinstance(follow(running)[-1], Stopped)
    assert isinstance(follow(waiting)[-1], Stopped)


def test_runs_of_the_loaded_checkpoint_go_before_others(start: Start) -> None:
    gate = Gate()
    jobs, studio = start(gate=gate, ann=four_steps, bob=four_steps)
    jobs.submit(Request(prompt="gate", checkpoint="klein-4b"))
    assert gate.begun.wait(PATIENCE)
    waiting = [
        jobs.submit(Request(prompt=prompt, checkpoint=checkpoint))
        for prompt, checkpoint in (("bob", "klein-9b"), ("ann", "klein-4b")) * 2
    ]
    told = [[event for _, event in job.events(timeout=0.01)][-1] for job in waiting]
    assert told == [Queued(runs_ahead=ahead) for ahead in (3, 1, 4, 2)]
    gate.go.set()
    for job in waiting:
        follow(job)
    assert studio.ran == ["gate", "ann", "ann", "bob", "bob"], "one swap instead of three"


def test_nobody_is_passed_over_for_ever(start: Start) -> None:
    gate = Gate()
    jobs, studio = start(gate=gate, ann=four_steps, bob=four_steps)
    jobs.submit(Request(prompt="gate", checkpoint="klein-4b"))
    assert gate.begun.wait(PATIENCE)
    jobs.submit(Request(prompt="bob", checkpoint="klein-9b"))
    for job in [jobs.submit(Request(prompt="ann", checkpoint="klein-4b")) for _ in range(MAX_SKIPS + 3)]:
        gate.go.set()
        follow(job)
    assert studio.ran.index("bob") == 1 + MAX_SKIPS


def test_a_chosen_checkpoint_is_loaded_once_the_run_is_done(start: Start) -> None:
    gate = Gate()
    jobs, studio = start(gate=gate)
    job = jobs.submit(Request(prompt="gate"))
    assert gate.begun.wait(PATIENCE)
    wanted = jobs.preload("klein-4b")
    assert [event for _, event in wanted.events(timeout=0.01)] == [Queued(runs_ahead=1)]
    gate.go.set()
    assert follow(wanted)[-1] == Ready(checkpoint="klein-4b")
    assert isinstance(follow(job)[-1], Result)
    assert studio.ran == ["gate", "prepare klein-4b"]


def test_a_run_does_not_wait_for_what_was_merely_chosen(start: Start) -> None:
    jobs, _ = start(fox=four_steps)
    chosen = jobs.preload("nano-base")
    assert next(chosen.events(timeout=PATIENCE))[1] == Status(text="loading")
    assert isinstance(follow(jobs.submit(Request(prompt="fox")))[-1], Result)
    assert follow(chosen)[-1] == Stopped()


def test_a_run_lets_its_own_checkpoint_be_loaded_to_the_end(start: Start) -> None:
    jobs, _ = start(fox=four_steps)
    chosen = jobs.preload("nano-base")
    assert next(chosen.events(timeout=PATIENCE))[1] == Status(text="loading")
    job = jobs.submit(Request(prompt="fox", checkpoint="nano-base"))
    assert not chosen.cancelled
    assert [event for _, event in job.events(timeout=0.05)] == []
    chosen.cancel()
    assert isinstance(follow(job)[-1], Result)


def test_the_last_choice_counts(start: Start) -> None:
    jobs, studio = start()
    first = jobs.preload("nano-base")
    assert next(first.events(timeout=PATIENCE))[1] == Status(text="loading")
    second = jobs.preload("klein-9b")
    assert follow(first)[-1] == Stopped()
    assert follow(second)[-1] == Ready(checkpoint="klein-9b")
    assert studio.ran == ["prepare nano-base", "prepare klein-9b"]


def test_the_same_choice_again_changes_nothing(start: Start) -> None:
    jobs, studio = start(fox=four_steps)
    first = jobs.preload("nano-base", "ann")
    assert next(first.events(timeout=PATIENCE))[1] == Status(text="loading")
    assert jobs.preload("nano-base", "bob") is first and not first.cancelled
    follow(jobs.submit(Request(prompt="fox", checkpoint="nano")))
    assert follow(first)[-1] == Stopped()
    assert follow(jobs.preload("nano")) == [Ready(checkpoint="nano")], "it was used last"
    assert studio.ran == ["prepare nano-base", "fox"]


def test_a_choice_that_cannot_be_loaded_is_told(start: Start) -> None:
    class Broken(ScriptedStudio):
        def preload(self, name: str, cancelled: Callable[[], bool]) -> Iterator[Event]:
            raise WeightsError("klein.safetensors is damaged: download it again.")

    jobs = JobQueue(Broken(fox=four_steps))
    try:
        assert follow(jobs.preload("klein-4b"))[-1] == Failed(
            message="klein.safetensors is damaged: download it again."
        )
        assert isinstance(follow(jobs.submit(Request(prompt="fox")))[-1], Result)
    finally:
        jobs.close()


def writes(request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
    for text in ("A red", "A red fox"):
        yield PromptProgress(text=text)
    yield PromptEnhanced(original=request.prompt, prompt="A red fox.", by="somebody")
    yield Ready(checkpoint="nano")


def no_credit(request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
    yield Status(text="asking")
    raise UpsampleError("There is no credit left.")


def test_of_what_a_model_writes_only_the_newest_is_kept(start: Start) -> None:
    jobs, _ = start(writes=writes)
    job = jobs.enhance_prompt(Request(prompt="writes", upsampling=Upsampling(by="openrouter")))
    assert isinstance(job, EnhanceJob)
    follow(job)
    kinds = [type(event) for event in follow(job)]
    assert kinds == [PromptEnhanced, Ready]


def test_another_machine_enhances_while_a_run_goes_on(start: Start) -> None:
    gate = Gate()
    jobs, studio = start(gate=gate, writes=writes)
    running = jobs.submit(Request(prompt="gate"))
    assert gate.begun.wait(PATIENCE)
    assert isinstance(
        follow(jobs.enhance_prompt(Request(prompt="writes", upsampling=Upsampling(by="openrouter"))))[-1], Ready
    )
    gate.go.set()
    follow(running)
    assert studio.ran == ["gate", "enhance writes"]


def test_a_model_of_this_machine_waits_for_the_run_under_way(start: Start) -> None:
    gate = Gate()
    jobs, studio = start(gate=gate, writes=writes)
    jobs.submit(Request(prompt="gate"))
    assert gate.begun.wait(PATIENCE)
    waiting = jobs.enhance_prompt(Request(prompt="writes", upsampling=Upsampling(by="local")))
    assert [event for _, event in waiting.events(timeout=0)] == [Queued(runs_ahead=1)] and studio.ran == ["gate"]
    gate.go.set()
    assert isinstance(follow(waiting)[-1], Ready)


def test_a_model_that_wrote_may_have_taken_the_checkpoints_place(start: Start) -> None:
    jobs, studio = start(four=four_steps, writes=writes)
    follow(jobs.submit(Request(prompt="four")))
    follow(jobs.enhance_prompt(Request(prompt="writes", upsampling=Upsampling(by="local"))))
    follow(jobs.preload("nano"))
    assert studio.ran[-1] == "prepare nano"


def test_there_is_an_end_to_how_many_prompts_are_enhanced_at_once(start: Start) -> None:
    jobs, _ = start(endless=endless)
    asked = Request(prompt="endless", upsampling=Upsampling(by="openrouter"))
    for number in range(MAX_ENHANCE_JOBS):
        jobs.enhance_prompt(asked, f"somebody {number}")
    with pytest.raises(UpsampleError, match="try again in a minute"):
        jobs.enhance_prompt(asked, "one more")
    assert not jobs.enhance_prompt(asked, "somebody 0").finished, "in place of one's own there is room"


def test_a_failed_enhancement_says_that_the_run_would_go_on_without(start: Start) -> None:
    jobs, _ = start(no_credit=no_credit, bad=bad_weights)
    assert follow(jobs.submit(Request(prompt="no_credit")))[-1] == Failed(
        message="There is no credit left.", in_prompt_enhancement=True
    )
    end = follow(jobs.submit(Request(prompt="bad")))[-1]
    assert isinstance(end, Failed) and not end.in_prompt_enhancement


@pytest.mark.parametrize("script", [four_steps, no_credit, defect])
def test_a_key_reaches_the_run_and_is_forgotten_with_its_end(start: Start, script: Script) -> None:
    jobs, studio = start(script=script)
    job = jobs.submit(Request(prompt="script"), "me", ApiKey("sk-secret"))
    follow(job)
    (key,) = studio.keys
    assert key is not None and key.reveal() == "sk-secret"
    assert job.api_key is None and jobs.get(job.id, "me") is job


def test_a_run_that_is_cancelled_in_the_queue_forgets_its_key_too(start: Start) -> None:
    gate = Gate()
    jobs, _ = start(gate=gate, four=four_steps)
    jobs.submit(Request(prompt="gate"))
    assert gate.begun.wait(PATIENCE)
    job = jobs.submit(Request(prompt="four"), "me", ApiKey("sk-secret"))
    job.cancel()
    assert job.finished and job.api_key is None
    gate.go.set()


def test_a_new_enhancement_takes_the_place_of_its_owners_earlier_one(start: Start) -> None:
    jobs, _ = start(endless=endless, writes=writes)
    remote = Upsampling(by="openrouter")
    mine, theirs = (
        jobs.enhance_prompt(Request(prompt="endless", upsampling=remote), owner) for owner in ("me", "them")
    )
    assert isinstance(follow(jobs.enhance_prompt(Request(prompt="writes", upsampling=remote), "me"))[-1], Ready)
    assert isinstance(follow(mine)[-1], Stopped) and not theirs.finished


def test_enhancements_end_with_the_studio(start: Start) -> None:
    jobs, _ = start(endless=endless)
    job = jobs.enhance_prompt(Request(prompt="endless", upsampling=Upsampling(by="openrouter")))
    jobs.close()
    assert isinstance(follow(job)[-1], Stopped)
    with pytest.raises(StudioError, match="shutting down"):
        jobs.enhance_prompt(Request(prompt="endless", upsampling=Upsampling(by="openrouter")))


# --- history ----------------------------------------------------------------------------------------------------


def saves(image: Path) -> Script:
    def script(request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
        assert request.seed is not None
        yield Saved(index=0, image=image, seed=request.seed, record=Record(request=request, label="Nano"))
        yield result(request)

    return script


def test_a_picture_is_in_its_owners_history_before_anybody_is_told(tmp_path: Path) -> None:
    image = tmp_path / "outputs" / "a.png"
    image.parent.mkdir()
    image.write_bytes(b"picture")
    history = History(Database(tmp_path / "db"), image.parent, tmp_path / "trash")
    jobs = JobQueue(ScriptedStudio(fox=saves(image)), history=history)
    try:
        job = jobs.submit(Request(prompt="fox", seed=7), "me")
        for _, event in job.events():
            if isinstance(event, Saved):
                (entry,) = history.page("me").entries
                assert (entry.prompt, entry.seed, history.find_file("me", entry.id)) == ("fox", 7, image)
        assert len(history.page("me").entries) == 1 and history.page("you").entries == ()
    finally:
        jobs.close()


def test_a_history_that_cannot_be_written_is_told_and_stops_no_run(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"picture")
    jobs = JobQueue(ScriptedStudio(fox=saves(image)), history=History(Database(tmp_path), tmp_path, tmp_path / "trash"))
    try:
        events = [event for _, event in jobs.submit(Request(prompt="fox"), "me").events()]
    finally:
        jobs.close()
    (notice,) = [event.text for event in events if isinstance(event, Notice)]
    assert notice.startswith("The picture is saved as a.png, but is not in History.")
    assert isinstance(events[-1], Result)
