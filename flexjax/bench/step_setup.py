"""StepSetup and StepReport: what a measuring process is given and what it leaves. They know no case."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flexjax.bench.ceilings import Ceilings
from flexjax.bench.results import case_result
from flexjax.bench.step_model import describe_model, write_model
from flexjax.bench.step_plan import StepCase, StepPlan
from flexjax.config import EngineConfig, from_table
from flexjax.engine.engine import Engine
from flexjax.fields import ConfigError
from flexjax.models.config import ModelConfig
from flexjax.weights.source import open_model

ALWAYS = {"load_format": "dummy", "prefix_caching": False}
"""Random weights; and every prompt is computed, whatever came before it."""


@dataclass(frozen=True)
class StepSetup:
    """Attributes:
    engine_table: fields of `EngineConfig` for every case; without a model, the plan's shape is run.
    workloads: folder of lengths, or None.
    folder: for files of this process.
    """

    plan: StepPlan
    engine_table: Mapping[str, Any]
    workloads: Path | None
    folder: Path

    @cached_property
    def model_path(self) -> str:
        named = self.engine_table.get("model")
        return named or str(write_model(self.folder / self.plan.shape, self.plan.shape, self.plan.layers))

    @cached_property
    def model(self) -> ModelConfig:
        return open_model(self.model_path).config

    def engine_config(self, case: StepCase, **needed: Any) -> EngineConfig:
        """The engine of a case: what the case needs, then the tables, which win."""
        own = self.plan.engine_fields(case)
        table = {**ALWAYS, **needed, **self.engine_table, **own, "model": self.model_path}
        return from_table(EngineConfig, table, f"engine of {case.name}")

    def workload(self, name: str) -> Path:
        """A file of the workloads. Raises ConfigError without one."""
        if self.workloads is None or not (self.workloads / name).is_file():
            raise ConfigError(f"{name} is not in the workloads ({self.workloads}); give --workloads DIR")
        return self.workloads / name


@dataclass
class StepReport:
    """Written anew with every figure, so that none is lost with the process.

    Attributes:
        ceilings: of the device.
        show: called with a line of text about every figure.
    """

    path: Path
    ceilings: Ceilings
    show: Callable[[str], None]
    metrics: dict[str, float] = field(default_factory=dict)
    cases: list[dict] = field(default_factory=list)
    implementations: dict[str, str] = field(default_factory=dict)
    model: str | None = None

    def describe(self, engine: Engine) -> None:
        """Note what runs."""
        kernels = dataclasses.asdict(engine.loop.runner.programs.kernels)
        self.implementations = {name: value for name, value in kernels.items() if isinstance(value, str)}
        self.model = describe_model(engine.model, engine.config.dtype)

    def add(self, metrics: Mapping[str, float], name: str, shape: str, ms: float, **more: Any) -> None:
        """Figures of one case; see `case_result`. With bytes or flops, the share of the ceiling is added."""
        least = self.ceilings.least_seconds(more.get("bytes") or 0.0, more.get("flops") or 0.0)
        self.metrics |= metrics
        self.cases.append(case_result(name, shape, ms, **{"fraction": 1e3 * least / ms or None, **more}))
        self._write()
        figures = ", ".join(f"{metric} {value:,.4g}" for metric, value in metrics.items())
        self.show(f"  {name}: {figures} ({shape})")

    def _write(self) -> None:
        parts = ("metrics", "cases", "implementations", "model")
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        unfinished.write_text(json.dumps({name: getattr(self, name) for name in parts}))
        unfinished.replace(self.path)
