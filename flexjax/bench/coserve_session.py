"""CoserveSession: an engine that runs for one command of `flexjax bench coserve`, and what its figures hang on."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from flexjax.bench.ceilings import FULL, TINY, Ceilings, measure_ceilings
from flexjax.bench.coserve_engine import CoserveSetup, Feed
from flexjax.bench.coserve_results import ResultFolder
from flexjax.bench.coserve_run import Outcome, TraceRun
from flexjax.bench.coserve_trace import Trace
from flexjax.bench.measurement import device_facts
from flexjax.bench.step_decode import load_adapters
from flexjax.bench.step_model import describe_model
from flexjax.bench.step_traffic import random_prompts, submit_together
from flexjax.config import EngineConfig
from flexjax.engine.engine import Engine
from flexjax.engine.machine import claim_memory
from flexjax.layout import PAGE_TOKENS

WARM_REQUESTS, WARM_TOKENS = 4, 8


@dataclass(frozen=True)
class CoserveSession:
    """Attributes:
    adapters: names of those served, (None,) for the base model alone.
    results: of this device and this model.
    ceilings: measured before the engine started.
    """

    setup: CoserveSetup
    engine: Engine
    adapters: tuple[str | None, ...]
    results: ResultFolder
    ceilings: Ceilings
    show: Callable[[str], None]

    def of(self, setup: CoserveSetup) -> "CoserveSession":
        """The same engine for another trace, or under another policy, whose figures are about it from now on."""
        if setup.plan.policy != self.setup.plan.policy:
            self.engine.set_policy(*setup.plan.engine_policy(setup.plan.policy))
        return dataclasses.replace(self, setup=setup, results=dataclasses.replace(self.results, plan=setup.plan))

    def replay(self, trace: Trace, *, seed: int = 0, job: bool = False, **changed: Any) -> Outcome:
        """One trace; ``changed`` are fields of `TraceRun`, the plan's otherwise."""
        plan = self.setup.plan
        self._warm_up()
        feed = Feed(self.engine, trace, self.adapters, seed)
        fields = {"count_from": plan.count_from, "drain_seconds": plan.drain_seconds, "show": self.show, **changed}
        made = self.setup.jobs(self.engine.model.vocab_size) if job else []
        return TraceRun(self.engine, trace, feed, **fields).run(made)

    def _warm_up(self) -> None:
        """A few requests of each adapter, so that the first of a trace is not the first of the process."""
        count = WARM_REQUESTS * len(self.adapters)
        prompts = random_prompts([PAGE_TOKENS] * count, self.engine.model.vocab_size, seed=count)
        for answer in submit_together(self.engine, prompts, [WARM_TOKENS] * count, self.adapters):
            answer.wait()

    def engine_facts(self) -> dict[str, Any]:
        """The engine's configuration without the paths of this machine."""
        config = self.engine.config
        kept = [each.name for each in dataclasses.fields(EngineConfig) if "path" not in each.metadata]
        described = {name: getattr(config, name) for name in kept if name != "served_model_name"}
        tape = self.engine.loop.runner.programs.dims.tape
        return described | {"policy_options": config.options, "tape": tape, "pages": self.engine.memory_plan.pages}


@contextmanager
def session(setup: CoserveSetup, policy: str, out: Path, show: Callable[[str], None]) -> Iterator[CoserveSession]:
    """Start the engine of a policy, with its adapters; ``out`` is the folder of results."""
    config = setup.engine_config(policy)
    claim_memory(config.memory_fraction)
    ceilings, facts = measure_ceilings(FULL if jax.default_backend() == "gpu" else TINY), device_facts()
    with Engine(config, show) as engine:
        facts |= {"model": describe_model(engine.model, config.dtype)}
        plan, kernels = setup.plan, dataclasses.asdict(engine.loop.runner.programs.kernels)
        ran = {name: value for name, value in kernels.items() if isinstance(value, str)}
        adapters = load_adapters(engine, plan.adapters, plan.rank, setup.folder) if plan.adapters else (None,)
        results = ResultFolder(out, plan, facts, ran)
        yield CoserveSession(setup, engine, adapters, results, ceilings, show)
