"""Serve a small real model and finetune an adapter of it at the same time; show it live and write a report."""

import argparse
from pathlib import Path

from flexjax.bench.demo import run_demo

DEFAULT_CONFIG = Path("configs/demo.toml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, default=DEFAULT_CONFIG, metavar="CONFIG")
    parser.add_argument("--short", action="store_true", help="fewer requests and steps")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where adapter, report and plots go")


def run(arguments: argparse.Namespace) -> int:
    return run_demo(arguments.config, arguments.short, arguments.output)
