"""Whatever goes wrong in a job's own work ends that job: requests, the other jobs and the next one go on."""

import pytest

from flexjax.engine import trainer
from flexjax.request import SamplingParams
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
