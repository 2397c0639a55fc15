"""Random lives of the engine: jobs and requests come, pause, go on and are cancelled at any moment, places and pages
are short, units fail, and the process is killed. When nothing is left that could happen from outside, all has ended."""

import random
from contextlib import nullcontext, suppress

import pytest

from flexjax.engine import loop, trainer
from flexjax.fields import ConfigError
from flexjax.finetuning import job_run
from flexjax.finetuning.job import FinetuneJob, JobStatus
from flexjax.weights.adapter import fresh_adapter
from tests.engine.virtual_jobs import POLICIES, Disk, World
from tests.ladder import LLAMA

LIVES = 150
ADAPTER = fresh_adapter(LLAMA, rank=4, alpha=8, target_modules=("q_proj",))
ROWS = [{"input_ids": [7] * length, "loss_mask": [1] * length} for length in (20, 70, 130, 40, 200, 64)]


@pytest.fixture(autouse=True)
def virtual(monkeypatch):
    """No real time passes, and nothing is compiled."""
    monkeypatch.setattr(loop, "IDLE_PAUSE", 0.0)
    monkeypatch.setattr(loop, "prompt_interpreter", nullcontext)
    monkeypatch.setattr(trainer, "set_aside", lambda: None)
    monkeypatch.setattr(trainer, "calibrate_job", lambda *_: None)
    monkeypatch.setattr(job_run, "learning_rate", lambda *_: lambda step: 1e-3)


def random_job(draw: random.Random, name: str) -> FinetuneJob:
    return FinetuneJob(
        name=name,
        data=ROWS[: draw.randint(1, 6)],
        validation=draw.choice([None, ROWS[:2]]),
        rank=4,
        optimizer="sgd",
        batch_size=draw.randint(1, 6),
        max_steps=draw.randint(1, 5),
        evaluate_every=draw.choice([None, 1, 2]),
        checkpoint_every=draw.choice([None, 1, 2, 5]),
        weight=draw.choice([1.0, 3.0]),
    )


class Life:
    """A few jobs and what happens to them and beside them, through several processes."""

    def __init__(self, seed: int):
        self.draw = draw = random.Random(seed)
        self.settings = dict(
            policy=draw.choice(list(POLICIES)),
            pages=draw.choice([11, 14, 24, 60]),
            max_running=draw.randint(1, 3),
            places=draw.randint(1, 4),
            risk=draw.choice([0.0, 0.0, 0.0, 0.02]),
        )
        self.jobs = [random_job(draw, f"job {number}") for number in range(draw.randint(1, 4))]
        self.disk, self.cancelled, self.paused = Disk(), set(), set()
        self.seconds = draw.choice([0.02, 0.1, 0.3])

    def run(self) -> World:
        """Processes one after another, the last one to its end."""
        for _ in range(self.draw.choice([0, 0, 1, 2])):
            world = self.world()
            world.at(self.draw.uniform(0, 2 * self.seconds), world.kill)
            world.live()
        world = self.world()
        world.live()
        return world

    def world(self) -> World:
        world = World(self.draw, disk=self.disk, **self.settings)
        for job in self.jobs:
            self.at_some_time(world, self.begin, job)
        names = [world.load_adapter(f"adapter {number}") for number in range(self.draw.randint(0, 3))]
        for number in range(self.draw.choice([0, 0, 3, 12])):
            self.at_some_time(world, self.ask, number, names)
        return world

    def at_some_time(self, world: World, act, *arguments) -> None:
        world.at(self.draw.uniform(0, self.seconds), lambda: act(world, *arguments))

    def begin(self, world: World, job: FinetuneJob) -> None:
        if job.name in self.cancelled:
            return
        world.submit(job, ADAPTER, paused=job.name in self.paused)
        for _ in range(self.draw.choice([0, 0, 1, 3])):
            self.at_some_time(world, self.draw.choice([self.hold, self.cancel]), job.name)

    def hold(self, world: World, name: str) -> None:
        """Pause a job, and have it go on later, or when nothing else is left."""
        with suppress(ConfigError):  # it has ended
            world.trainer.pause(name)
            self.paused.add(name)
            if self.draw.random() < 0.7:
                self.at_some_time(world, self.go_on, name)

    def go_on(self, world: World, name: str) -> None:
        with suppress(ConfigError):
            world.trainer.resume(name)
            self.paused.discard(name)

    def cancel(self, world: World, name: str) -> None:
        if self.draw.random() < 0.5:
            with suppress(ConfigError):
                world.trainer.cancel(name)
                self.cancelled.add(name)

    def ask(self, world: World, number: int, names: list) -> None:
        outputs = self.draw.choice([1, 5, 50])
        adapter = self.draw.choice(names) if names and self.draw.random() < 0.7 else None
        chosen = {} if adapter is None else {"adapter": adapter}
        world.add_request(number, self.draw.choice([3, 64, 150]), outputs, **chosen)
        if self.draw.random() < 0.4:
            self.at_some_time(world, lambda world: world.loop.cancel_request(number))


@pytest.mark.parametrize("seed", range(LIVES))
def test_nothing_is_left_undone_when_the_engine_sleeps(seed):
    life = Life(seed)
    world = life.run()
    due = {job.name for job in life.jobs} - life.cancelled - world.faulty
    assert {name: world.asleep[name] for name in due} == dict.fromkeys(due, JobStatus.SUCCEEDED)
    assert {world.asleep.get(name) for name in world.faulty} <= {JobStatus.FAILED, JobStatus.CANCELLED}
    for run in world.runs:
        steps = [event["step"] for event in run.events if event["type"] == "step"]
        assert run.status is not JobStatus.SUCCEEDED or steps == list(range(1, run.total_steps + 1))
    assert None not in world.ends.values(), "a request was forgotten"
    assert not world.jobs and not world.trainer.training and not world.tier.lines
    assert all(each.holds == each.pins == 0 for each in world.table.resident.values())
    statistics = world.scheduler.statistics
    assert statistics.available_pages == statistics.pages
