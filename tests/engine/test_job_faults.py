"""Whatever goes wrong in a job's own work ends that job: requests, the other jobs and the next one go on."""

import queue

import pytest

from flexjax.engine import trainer
from flexjax.engine.loop import EngineStopped
from flexjax.request import SamplingParams
from tests.engine.broken_program import fail_on_the_device
from tests.engine.conftest import job

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
FAULTS = {
    "making its batches": lambda engine: (engine.trainer.queue.runs[-1], "peek"),
    "getting its memory": lambda engine: (engine._runner, "add_job"),
    "measuring its units": lambda engine: (trainer, "calibrate_job"),
    "copying a checkpoint": lambda engine: (engine.checkpoints, "save"),
    "taking the adapter": lambda engine: (engine.trainer, "trained_adapter"),
}


def name_of(argument) -> str | None:
    """Of the job that an argument is, or belongs to."""
    if isinstance(argument, str):
        return argument
    return getattr(getattr(argument, "job", argument), "name", None)


GIVEN = {"backward": 3, "update": 2}
"""Which argument of a unit's program is given away to it: the job's gradients, or the stack."""


class TooLate:
    """What a device returns that finds out later."""

    def is_ready(self) -> bool:
        return True

    def block_until_ready(self) -> None:
        raise MemoryError("no room for that")

    __float__ = block_until_ready


def break_unit(engine, unit: str, moment: str, name: str, monkeypatch) -> None:
    """From its second step on, a unit of the job fails before it runs, while it runs, or so that it shows later."""
    runner, run = engine._runner, getattr(engine._runner, unit)

    def broken(job, *arguments):
        if job.version.name != name or len(engine.trainer.jobs[name].run.losses) < 2:
            return run(job, *arguments)
        if moment == "before":
            raise MemoryError("no room for that")
        if moment == "later":
            run(job, *arguments)
            return TooLate()
        with monkeypatch.context() as patch:
            patch.setattr(runner.programs, unit, lambda *_: fail_on_the_device(GIVEN[unit]))
            return run(job, *arguments)

    monkeypatch.setattr(runner, unit, broken)


@pytest.fixture(scope="module")
def faulty(new_engine, tmp_path_factory):
    with new_engine(max_adapters=3, checkpoint_dir=str(tmp_path_factory.mktemp("checkpoints"))) as engine:
        yield engine


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_job_ends_no_other(faulty, fault, monkeypatch):
    before = faulty.generate(["hello"], GREEDY)[0].token_ids
    other = faulty.finetune(job(f"beside {fault}", epochs=30))
    while not other.losses:
        assert other.wait(timeout=0.01) in ("queued", "running"), other.error
    broken = faulty.finetune(job(f"broken {fault}", checkpoint_every=2), paused=True)
    owner, name = FAULTS[fault](faulty)
    method = getattr(owner, name)

    def fail(*arguments, **settings):
        if owner is faulty.trainer.jobs[broken.name].run or broken.name in map(name_of, arguments):
            raise MemoryError("no room for that")
        return method(*arguments, **settings)

    monkeypatch.setattr(owner, name, fail)
    broken.resume()
    assert broken.wait(timeout=60) == "failed" and "no room for that" in broken.error
    assert faulty.generate(["hello"], GREEDY)[0].token_ids == before
    monkeypatch.undo()
    other.cancel()
    again = faulty.finetune(job(f"again {fault}"))
    assert again.wait(timeout=60) == "succeeded", again.error
    faulty.loop.call(faulty.scheduler.check)
    versions = faulty.adapters.resident.values()
    assert all(each.announced and each.pins == each.holds == 0 for each in versions), "a place was not given back"


def test_who_is_shown_the_adapter_has_it_before_its_name_means_it(faulty):
    seen = []
    show = lambda adapter: seen.append((adapter.fingerprint, "shown" in faulty.adapters.named))
    assert faulty.finetune(job("shown"), show_trained=show).wait(timeout=60) == "succeeded"
    assert seen == [(faulty.adapter("shown").fingerprint, False)]


def test_a_fault_in_showing_the_adapter_ends_its_job_alone(faulty):
    def fail(_) -> None:
        raise MemoryError("no room for that")

    broken = faulty.finetune(job("unseen"), show_trained=fail)
    assert broken.wait(timeout=60) == "failed" and "no room for that" in broken.error
    assert "unseen" not in faulty.adapters.named
    assert faulty.finetune(job("seen")).wait(timeout=60) == "succeeded"


@pytest.mark.parametrize(
    "unit, moment",
    [
        ("loss", "before"),
        ("loss", "later"),
        ("backward", "on the device"),
        ("backward", "later"),
        ("update", "before"),
        ("update", "later"),
    ],
)
def test_a_unit_that_fails_ends_its_job_and_no_other(faulty, unit, moment, monkeypatch):
    before = faulty.generate(["hello"], GREEDY)[0].token_ids
    other, name = faulty.finetune(job(f"beside {unit} {moment}", epochs=30)), f"broken {unit} {moment}"
    broken = faulty.finetune(job(name, epochs=30), paused=True)
    break_unit(faulty, unit, moment, name, monkeypatch)
    stream = faulty.stream("hello", SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True))
    broken.resume()
    assert broken.wait(timeout=60) == "failed" and "no room for that" in broken.error
    assert list(stream)[-1].finish_reason == "length" and 2 <= len(broken.losses) < broken.total_steps
    monkeypatch.undo()
    assert faulty.generate(["hello"], GREEDY)[0].token_ids == before
    seen = len(other.losses)
    while len(other.losses) < min(seen + 2, other.total_steps):
        assert other.wait(timeout=0.01) in ("running", "succeeded"), other.error
    if other.wait(timeout=0) == "running":
        other.cancel()
    faulty.loop.call(faulty.scheduler.check)
    again = faulty.finetune(job(f"again {unit} {moment}"))
    assert again.wait(timeout=60) == "succeeded", again.error
    statistics = faulty.scheduler.statistics
    assert statistics.tape_pages == 0 and statistics.available_pages == statistics.pages


@pytest.mark.parametrize("unit", ["update", "publish"])
def test_what_takes_the_weights_along_ends_the_engine_and_says_so(new_engine, unit, monkeypatch, caplog):
    """Everybody is told: streams, jobs, callers who wait and those who come later."""
    listener = queue.SimpleQueue()
    with new_engine(max_adapters=3) as engine:
        lasting = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
        handle = engine.finetune(job("fatal", epochs=50), paused=unit == "publish")
        if unit == "update":
            break_unit(engine, unit, "on the device", "fatal", monkeypatch)
        else:
            monkeypatch.setattr(engine._runner.programs, "publish", lambda *_: fail_on_the_device(0))
        engine.submit([5], lasting, None, listener)
        if unit == "publish":
            handle.resume()
        assert handle.wait(timeout=60) == "failed" and "the engine stopped" in handle.error
        assert "took the weights" in str(engine.loop.failure) and "no room for that" in str(engine.loop.failure)
        while (output := listener.get(timeout=60)).finish_reason is None:
            pass
        assert output.finish_reason in ("error", "length")
        with pytest.raises(EngineStopped):
            engine.generate([[5]], GREEDY)
    assert any("took the weights" in str(record.exc_info) for record in caplog.records if record.exc_info)
