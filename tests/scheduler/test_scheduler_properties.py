"""Any order of requests, jobs, cancellations and completions: nothing leaks, nothing starves, nothing is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from flexjax.layout import SlotLayout

SIMULATE = []
LAYOUTS = (SlotLayout(2), SlotLayout(5, 64, tape=True, dropout=True), SlotLayout(5, 192, tape=True, dropout=True))
POLICIES = (
    ("co_serve", {"objective": 0.02}),
    ("co_serve", {"objective": 0.007}),
    ("price", {"percent": 15}),
    ("flat_out", {"units": 3}),
    ("temporal_sharing", {"n": 2, "stretch": 0.004}),
    ("fixed_budget", {"finetune_tokens": 64, "backward_units": 2, "layout": LAYOUTS[2]}),
)
PROMPTS = st.tuples(st.integers(0, 2), st.integers(1, 260)).map(lambda pair: [pair[0]] * pair[1])


@pytest.fixture(scope="session", autouse=True)
def simulation_for_machines(simulate):
    SIMULATE.append(simulate)


class SchedulerMachine(RuleBasedStateMachine):
    """The device of the simulation checks what is read; this only shakes the scheduler."""

    @initialize(
        policy=st.sampled_from(POLICIES), lag=st.integers(0, 2), caching=st.booleans(), pages=st.integers(6, 30)
    )
    def begin(self, policy, lag, caching, pages):
        name, options = policy
        self.sim = SIMULATE[0](name, pages=pages, rows=5, lag=lag, caching=caching, layouts=LAYOUTS, **options)
        self.pages = pages
        self.cancelled = set()
        self.cancelled_jobs = set()
        self.paused = set()

    @rule(prompt=PROMPTS, new=st.integers(1, 80), version=st.integers(0, 1), priority=st.integers(0, 1))
    def ask(self, prompt, new, version, priority):
        if len(prompt) + new <= 64 * self.pages:
            stops = frozenset({len(self.sim.requests) % 50})
            self.sim.request(prompt, new, adapter_version=version, priority=priority, stop_token_ids=stops)

    @rule(
        job=st.sampled_from("ab"),
        lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
        dropout=st.booleans(),
        evaluation=st.booleans(),
        closes_group=st.booleans(),
    )
    def finetune(self, job, lengths, **fields):
        if 2 * sum(-(-length // 64) for length in lengths) <= self.pages:
            self.sim.microbatch(job, lengths, pages_per_block=2, layers=2, **fields)

    @rule(count=st.integers(1, 12))
    def run(self, count):
        for _ in range(count):
            self.sim.step()

    @rule(data=st.data())
    def cancel(self, data):
        alive = sorted(set(self.sim.requests) - set(self.sim.reasons) - self.cancelled)
        if alive:
            request = data.draw(st.sampled_from(alive))
            assert self.sim.scheduler.cancel(request)
            self.cancelled.add(request)
            self.sim.scheduler.check()

    @rule(job=st.sampled_from("ab"))
    def cancel_job(self, job):
        self.sim.cancel_job(job)
        self.cancelled_jobs |= {m.id for m in self.sim.device.microbatches.values() if m.job == job}
        self.paused.discard(job)
        self.sim.scheduler.check()

    @rule(job=st.sampled_from("ab"), paused=st.booleans(), weight=st.sampled_from((0.5, 1.0, 4.0)))
    def set_job(self, job, paused, weight):
        self.sim.scheduler.set_job(job, weight, paused)
        (self.paused.add if paused else self.paused.discard)(job)

    @rule(version=st.integers(0, 1))
    def forget(self, version):
        self.sim.scheduler.forget_adapter(version)
        self.sim.scheduler.check()

    def teardown(self):
        if not hasattr(self, "sim"):
            return
        for job in self.paused:
            self.sim.scheduler.set_job(job, paused=False)
        self.sim.drain()
        self.sim.verify()
        assert set(self.sim.reasons) | self.cancelled == set(self.sim.requests)
        assert set(self.sim.finished_microbatches) | self.cancelled_jobs == set(self.sim.device.microbatches)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=8))
def test_with_enough_pages_every_token_is_computed_exactly_once(simulate, sizes):
    sim = simulate(pages=100, caching=False, layouts=LAYOUTS, rows=5)
    for length, new in sizes:
        sim.request([length % 50] * length, new)
    sim.microbatch(lengths=[length for length, _ in sizes][:3], pages_per_block=2)
    sim.drain()
    sim.verify()
    wanted = {(index, at) for index, (length, new) in enumerate(sizes) for at in range(length + new - 1)}
    assert sim.device.computed == dict.fromkeys(wanted, 1)


def test_importing_the_scheduler_loads_no_jax():
    root = Path(__file__).parents[2]
    script = "import flexjax.scheduler, sys; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0
