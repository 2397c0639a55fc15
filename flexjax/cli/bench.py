"""Measure the kernels at real shapes, or whole steps of an engine, and write the figures as JSON.

kernels   every kernel beside the ceilings of the chip and the best alternative, all measured in the same run
step      decoding, prompts, finetuning and start-up, through the engine's own loop
coserve   a trace of requests beside a finetuning job, under an objective; and the alternatives to that
memory    activation memory of finetuning as each means to save it is added: counted, and measured where there is a GPU
"""

import argparse
from pathlib import Path

from flexjax.bench.coserve_bench import run_coserve_bench
from flexjax.bench.coserve_plan import CHOICES
from flexjax.bench.kernel_bench import run_kernel_bench
from flexjax.bench.memory_bench import run_memory_bench
from flexjax.bench.step_bench import run_step_bench

RESULTS = Path("benchmarks/results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands = parser.add_subparsers(metavar="WHAT", required=True)
    kernels = subcommands.add_parser("kernels", description="Measure the kernels.")
    kernels.set_defaults(bench=bench_kernels)
    add_common_arguments(
        kernels, RESULTS / "kernels.json", "metrics, or cases whose name or operation begins so or matches (*)"
    )
    step = subcommands.add_parser("step", description="Measure whole steps of an engine.")
    step.set_defaults(bench=bench_step)
    step.add_argument("config", nargs="?", metavar="CONFIG", help="TOML file with [bench] and [engine] tables")
    add_common_arguments(step, RESULTS / "step.json", "names, kinds or metrics of cases")
    coserve = subcommands.add_parser("coserve", description="Replay a trace of requests beside a finetuning job.")
    coserve.set_defaults(bench=bench_coserve)
    add_coserve_arguments(coserve)
    memory = subcommands.add_parser("memory", description="Count, and measure, activation memory.")
    memory.set_defaults(bench=lambda arguments: run_memory_bench(arguments.out))
    memory.add_argument("--out", type=Path, default=RESULTS / "memory.json", metavar="FILE")
    memory.add_argument("--debug", action="store_true", help="show tracebacks")


def add_common_arguments(parser: argparse.ArgumentParser, out: Path, only: str) -> None:
    parser.add_argument("--workloads", type=Path, metavar="DIR", help="recorded workloads, whose lengths are taken too")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help=f"default: {out}")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=only)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def add_coserve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="TOML file with [bench] and [engine] tables")
    parser.add_argument("--workloads", type=Path, metavar="DIR", help="folder of traces and lengths")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help=f"of results; default: {RESULTS}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--capacity", action="store_true", help="find the highest rate held without a job (a denominator)"
    )
    what.add_argument("--alone", action="store_true", help="measure finetuning alone (a denominator)")
    what.add_argument(
        "--divide", action="store_true", help="divide the runs in --out by denominators that were measured since"
    )
    overrides = parser.add_argument_group("instead of what [bench] says")
    overrides.add_argument(
        "--workload", nargs="+", default=(), metavar="NAME", help="traces to replay, files of DIR without .jsonl"
    )
    overrides.add_argument(
        "--policy", nargs="+", default=(), metavar="NAME", help=f"each trace under each of these; {', '.join(CHOICES)}"
    )
    overrides.add_argument("--seconds", type=float, metavar="S", help="only the beginning of the trace")
    overrides.add_argument("--leave-out-every", type=int, metavar="N", help="leave every N-th row of the trace out")
    overrides.add_argument("--capacity-from", type=float, metavar="R", help="requests/s where a search begins")
    overrides.add_argument("--capacity-seconds", type=float, metavar="S", help="of the trace in a trial of --capacity")
    overrides.add_argument("--count-from", type=float, metavar="S", help="seconds from which rates are counted")


def run(arguments: argparse.Namespace) -> int:
    return arguments.bench(arguments)


def bench_kernels(arguments: argparse.Namespace) -> int:
    return run_kernel_bench(arguments.workloads, arguments.out, arguments.only)


def bench_step(arguments: argparse.Namespace) -> int:
    return run_step_bench(arguments.config, arguments.workloads, arguments.out, arguments.only)


def bench_coserve(arguments: argparse.Namespace) -> int:
    what = next((name for name in ("capacity", "alone", "divide") if getattr(arguments, name)), "run")
    names = ("seconds", "leave_out_every", "count_from", "capacity_from", "capacity_seconds")
    overrides = {name: getattr(arguments, name) for name in names}
    places = arguments.config, arguments.workloads, arguments.out
    return run_coserve_bench(*places, what, arguments.workload, arguments.policy, **overrides)
