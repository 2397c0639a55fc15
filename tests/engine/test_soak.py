"""Many things at once, in a seeded random order: nothing is lost, nothing is mixed up, nothing is left behind."""

import contextlib
import queue
import random

import pytest

from flexjax.fields import ConfigError
from flexjax.request import SamplingParams
from tests.engine.conftest import job

PROMPTS = [list(b"hello there"), list(range(70, 170)), [7], list(b"a b c d e f g" * 9)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


class Crowd:
    """Users of one engine who act in turns."""

    def __init__(self, engine, directory, random: random.Random):
        self.engine, self.directory, self.random = engine, directory, random
        self.waiting: dict[int, tuple[int, str | None, queue.SimpleQueue]] = {}
        self.jobs, self.cancelled, self.versions = [], set(), 0

    def ask(self) -> None:
        number, adapter = self.random.randrange(len(PROMPTS)), self.random.choice([None, None, "keeper"])
        listener = queue.SimpleQueue()
        (request,) = self.engine.submit(PROMPTS[number], GREEDY, adapter, listener, self.random.randrange(3))
        self.waiting[request] = (number, adapter, listener)

    def give_up(self) -> None:
        if self.waiting:
            request = self.random.choice(list(self.waiting))
            self.cancelled.add(request)
            self.engine.cancel([request])

    def train(self) -> None:
        if len(self.jobs) < 4:
            self.jobs.append(self.engine.finetune(job(f"job{len(self.jobs)}", epochs=3)))

    def touch_a_job(self) -> None:
        if self.jobs:
            handle = self.random.choice(self.jobs)
            with contextlib.suppress(ConfigError):  # it may have ended, or be in the state already
                getattr(handle, self.random.choice(["pause", "resume", "resume", "cancel"]))()

    def reload(self) -> None:
        self.engine.load_adapter("keeper", self.directory)

    def forget_prefixes(self) -> None:
        self.engine.loop.call(self.engine.scheduler.forget_adapter, 0)

    def answers(self) -> dict[int, list[int]]:
        finals = {}
        for request, (_, _, listener) in self.waiting.items():
            output = listener.get(timeout=60)
            while output.finish_reason is None:
                output = listener.get(timeout=60)
            assert output.finish_reason in ("length", "abort")
            assert output.finish_reason == "length" or request in self.cancelled
            finals[request] = output.token_ids
        return finals


@pytest.mark.parametrize("seed", [1, 2])
def test_a_crowd(new_engine, tmp_path, seed):
    with new_engine(pages=48) as engine:
        trained = engine.finetune(job("keeper"))
        assert trained.wait(timeout=120) == "succeeded"
        engine.export_adapter("keeper", tmp_path / "keeper")
        expected = {
            (number, adapter): engine.generate([prompt], GREEDY, adapter)[0].token_ids
            for number, prompt in enumerate(PROMPTS)
            for adapter in (None, "keeper")
        }
        crowd = Crowd(engine, tmp_path / "keeper", random.Random(seed))
        acts = [crowd.ask] * 6 + [crowd.give_up, crowd.train, crowd.touch_a_job, crowd.reload, crowd.forget_prefixes]
        for _ in range(120):
            crowd.random.choice(acts)()
        for request, tokens in crowd.answers().items():
            number, adapter, _ = crowd.waiting[request]
            whole = expected[number, adapter]
            assert tokens == whole[: len(tokens)] and (request in crowd.cancelled or tokens == whole)
        for handle in crowd.jobs:
            with contextlib.suppress(ConfigError):
                handle.resume()
            assert handle.wait(timeout=60) in ("succeeded", "cancelled"), handle.error
        engine.loop.call(engine.scheduler.check)
        statistics = engine.scheduler.statistics
        assert statistics.running == statistics.waiting == 0
        assert statistics.free_pages + statistics.cached_pages == statistics.pages
        succeeded = {handle.name for handle in crowd.jobs if handle.status == "succeeded"}
        assert set(engine.adapters.named) == {"keeper"} | succeeded
        assert all(version.pins == 0 for version in engine.adapters.resident.values())
        assert len(engine.adapters.resident) == len(engine.adapters.named), "a version was left on the device"
