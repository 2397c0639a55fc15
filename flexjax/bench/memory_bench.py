"""MemoryBench: `flexjax bench memory`. Activation memory of LoRA finetuning as each means to save it is added."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from flexjax.bench.measurement import device_facts
from flexjax.bench.memory_ablation import AblationStep, ablation
from flexjax.bench.memory_measured import measured_memory
from flexjax.bench.results import write_results
from flexjax.bench.step_memory import MemoryWatch
from flexjax.bench.step_model import write_model
from flexjax.engine.machine import claim_memory
from flexjax.finetuning.job import TARGET_MODULES
from flexjax.models.build import dtype_of
from flexjax.steps.kernels import Kernels
from flexjax.weights.source import open_model

DOWN = ("down_proj",)
DTYPE = "bfloat16"


@dataclass(frozen=True)
class MemoryAsked:
    """What is counted and what is measured.

    Attributes:
        counted: (shape, modules); measured: the same, on a GPU only unless ``anywhere``.
        tokens: of the sequence.
        seconds: that each measurement looks at a running job; engine: further fields of its `EngineConfig`.
    """

    counted: tuple[tuple[str, tuple[str, ...]], ...]
    measured: tuple[tuple[str, tuple[str, ...]], ...]
    tokens: int = 1024
    rank: int = 16
    window: int = 512
    seconds: float = 10.0
    engine: Mapping[str, Any] = field(default_factory=dict)
    anywhere: bool = False


FULL = MemoryAsked(
    counted=tuple(
        (shape, modules) for shape in ("llama-3.1-70b", "llama-3.1-8b") for modules in (TARGET_MODULES, DOWN)
    ),
    measured=(("llama-3.1-8b", TARGET_MODULES),),
)


def run_memory_bench(out: Path, plan: MemoryAsked = FULL) -> int:
    """Count, measure where there is a GPU, print a table and write ``out``."""
    claim_memory(0.9)
    gpu = jax.default_backend() == "gpu"
    cases, metrics = [], {}
    with tempfile.TemporaryDirectory(prefix="flexjax-memory-") as folder:
        for shape, modules in plan.counted:
            cases += counted_cases(Path(folder), shape, modules, plan)
        for shape, modules in plan.measured if gpu or plan.anywhere else ():
            cases.append(measured_case(Path(folder), shape, modules, plan, cases))
    for case in cases:
        metrics |= {f"{case['metric']}_gb": case["gb"], f"{case['metric']}_saved": case["saved"]}
        print(f"{case['name']:<40} {case['gb']:>8.2f} GB  {case['saved']:>6.1%} less  {case['shape']}", flush=True)
    if not gpu and not plan.anywhere:
        print("nothing was measured: jax sees no GPU here")
    write_results(out, device_facts(), {}, metrics, cases)
    print(f"\n{out}")
    return 0


def counted_cases(folder: Path, shape: str, modules: tuple[str, ...], plan: MemoryAsked) -> list[dict]:
    model = open_model(str(write_model(folder / shape, shape, None))).config
    chunk = Kernels.for_model("gpu", model, dtype_of(DTYPE)).head_chunk
    sizes = {"rank": plan.rank, "window": plan.window, "head_chunk": chunk}
    steps = ablation(model, modules, plan.tokens, DTYPE, **sizes)
    return [counted_case(shape, modules, step, steps[0]) for step in steps]


def counted_case(shape: str, modules: tuple[str, ...], step: AblationStep, plain: AblationStep) -> dict:
    return case_of(shape, modules, step.name, step.kept, step.bytes, plain.bytes)


def measured_case(folder: Path, shape: str, modules: tuple[str, ...], plan: MemoryAsked, cases: list[dict]) -> dict:
    """Beside what was counted for the same; the adapter and its optimizer state are in what is measured too."""
    sizes = {"rank": plan.rank, "window": plan.window, "seconds": plan.seconds, "engine": plan.engine}
    watch: MemoryWatch = measured_memory(folder / shape, modules, plan.tokens, show=quiet, **sizes)
    plain = next(case for case in cases if case["metric"] == metric_of(shape, modules, "nothing"))
    kept = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in watch.parts.items())
    case = case_of(shape, modules, "measured", kept, watch.bytes, plain["bytes"])
    return case | {"memory_mb": {name: size / 1e6 for name, size in watch.parts.items()}}


def case_of(shape: str, modules: tuple[str, ...], step: str, kept: str, size: int, plain: int) -> dict:
    adapted = "all modules" if modules == TARGET_MODULES else ", ".join(modules)
    metric = metric_of(shape, modules, step)
    figures: Mapping = {"bytes": size, "gb": size / 1e9, "saved": 1 - size / plain}
    return {"name": f"{shape}, {adapted}: {step}", "metric": metric, "shape": kept, **figures}


def metric_of(shape: str, modules: tuple[str, ...], step: str) -> str:
    adapted = "all" if modules == TARGET_MODULES else "_".join(modules)
    return f"memory_{shape.replace('-', '_').replace('.', '_')}_{adapted}_{step.replace('-', '_')}"


quiet: Callable[[str], None] = lambda line: None
