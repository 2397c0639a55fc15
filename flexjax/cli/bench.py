"""Measure the kernels at real shapes, or whole steps of an engine, and write the figures as JSON.

kernels   every kernel beside the ceilings of the chip and the best alternative, all measured in the same run
step      decoding, prompts, finetuning and start-up, through the engine's own loop
"""

import argparse
from pathlib import Path

from flexjax.bench.kernel_bench import run_kernel_bench
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


def add_common_arguments(parser: argparse.ArgumentParser, out: Path, only: str) -> None:
    parser.add_argument("--workloads", type=Path, metavar="DIR", help="recorded workloads, whose lengths are taken too")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help=f"default: {out}")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=only)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def run(arguments: argparse.Namespace) -> int:
    return arguments.bench(arguments)


def bench_kernels(arguments: argparse.Namespace) -> int:
    return run_kernel_bench(arguments.workloads, arguments.out, arguments.only)


def bench_step(arguments: argparse.Namespace) -> int:
    return run_step_bench(arguments.config, arguments.workloads, arguments.out, arguments.only)
