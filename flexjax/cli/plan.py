"""Print, without starting anything, what an engine would decide: memory, what tapes keep, how adapters are sharded.

Only shapes are computed; nothing is allocated on a device.
"""

import argparse
import os

from flexjax.cli.settings import Settings, add_engine_arguments, read_settings
from flexjax.compiler.parallelization import parallel_plan
from flexjax.compiler.rematerialization import PLAN_HEADER, BackwardWork, all_plans, backward_work, plan_of
from flexjax.config import EngineConfig
from flexjax.engine.layouts import LayoutCatalog
from flexjax.engine.machine import platform_of
from flexjax.engine.startup import dimensions_of, plan_pages, policy_of, tape_of
from flexjax.finetuning.job import TARGET_MODULES, ordered_modules
from flexjax.models.build import abstract_decoder, dtype_of
from flexjax.state import nbytes
from flexjax.weights.source import open_model

DEFAULT_RANK = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument("--target-modules", metavar="NAMES", help="with commas; default: those of CONFIG's jobs")
    parser.add_argument("--platform", choices=("cpu", "gpu"), help="that sizes shall suit; default: this machine's")
    parser.add_argument("--rank", type=int, metavar="N", help="of an adapter; default: the largest of CONFIG's jobs")


def run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # asking a GPU for its size must not take it
    settings = read_settings(arguments)
    model = open_model(settings.engine.model, settings.engine.revision).config
    config = settings.engine.resolved(
        model.max_position_embeddings, arguments.platform or platform_of(settings.engine)
    )
    modules, rank = target_modules(arguments.target_modules, settings), adapter_rank(arguments.rank, settings)
    dtype = dtype_of(config.dtype)
    weight_bytes = nbytes(abstract_decoder(model, dtype, config.tp)[1]) // config.tp
    tape = tape_of(config, model, weight_bytes)
    dims = dimensions_of(config, model, tape)
    memory = plan_pages(config, dims, weight_bytes, temporaries=0)
    work = backward_work(model, modules, dtype, tp=config.tp, rank=rank, mean_context=config.max_model_len // 2)
    sections = {
        "Steps": steps_of(config),
        "Memory of one device": str(memory),
        "Pruning: what the gradients of the adapters need": f"{work.interior}\n\n{work.lowest}",
        "Rematerialization: plans for the tape, leanest first; * is taken, - where pages are short": tape_plans(
            work, tape, dims.lean_tape
        ),
        "Parallelization": str(parallel_plan(model, modules, dtype, tp=config.tp, rank=rank)),
    }
    print("\n\n".join(f"== {title} ==\n{text}" for title, text in sections.items()))
    return 0


def steps_of(config: EngineConfig) -> str:
    """The sizes for which programs are compiled; ``config`` is resolved."""
    listed = lambda sizes: ", ".join(f"{size:,}" for size in sizes)
    what, sizes = "slots of prompts or windows beside them", config.chunk_sizes
    if config.step_sizes is not None:
        what, sizes = "slots of steps with prompts or windows", config.step_sizes
    catalog = LayoutCatalog(config, policy_of(config).layout)
    at_first = len(catalog.layouts)
    catalog.add_adapters()
    return (
        f"rows that decode {listed(config.row_sizes)}; {what} {listed(sizes)}: {at_first} layouts, "
        f"{len(catalog.layouts)} with adapters\n"
        f"microbatches of up to {config.microbatch_tokens:,} tokens, backward units of {config.backward_window:,}"
    )


def target_modules(chosen: str | None, settings: Settings) -> tuple[str, ...]:
    """All modules that some job adapts: one backward program serves them."""
    if chosen is not None:
        return ordered_modules(chosen if chosen == "all-linear" else tuple(chosen.split(",")))
    used = {name for job in settings.jobs for name in job.target_modules}
    return tuple(name for name in TARGET_MODULES if name in used) or TARGET_MODULES


def adapter_rank(chosen: int | None, settings: Settings) -> int:
    return chosen or max((job.rank for job in settings.jobs), default=DEFAULT_RANK)


def tape_plans(work: BackwardWork, tape: tuple[str, ...], lean: tuple[str, ...] | None) -> str:
    """Every plan that no other beats, and those that the engine takes, marked with an asterisk and a dash."""
    marks = {plan_of(work, tape): "*"} | ({} if lean is None else {plan_of(work, lean): "-"})
    plans = all_plans(work)
    plans = sorted([*plans, *(plan for plan in marks if plan not in plans)], key=lambda plan: plan.columns)
    marked = [f"{marks.get(plan, ' ')} {plan}" for plan in plans]
    return "\n".join([f"  {PLAN_HEADER}", *marked])
