"""Run the finetuning jobs of CONFIG, show their progress, and write each adapter in PEFT's format to DIR/NAME.

Nobody is answered meanwhile: the jobs get all the time there is, and sizes that CONFIG leaves out suit them alone.
Ctrl-C takes checkpoints and prints the command that goes on from them. The exit code is 1 if a job fails.
"""

import argparse
from dataclasses import replace

import flexjax
from flexjax.cli.jobs import (
    CommandJobs,
    add_job_arguments,
    forget_checkpoints,
    job_settings,
    resume_command,
)
from flexjax.cli.progress import show
from flexjax.cli.settings import add_engine_arguments, read_settings
from flexjax.config import EngineConfig
from flexjax.fields import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    add_job_arguments(parser)


def without_requests(config: EngineConfig) -> EngineConfig:
    """For jobs alone, unless the configuration names a policy."""
    return replace(config, policy="finetune_only", policy_options=()) if config.policy == "auto" else config


def run(arguments: argparse.Namespace) -> int:
    settings = job_settings(read_settings(arguments), arguments.output)
    if not settings.jobs:
        raise ConfigError("there is nothing to finetune; CONFIG needs a [[finetune]] table")
    try:
        with flexjax.Engine.from_config(without_requests(settings.engine), progress=show) as engine:
            jobs = CommandJobs(engine, arguments.output)
            jobs.submit(settings.jobs, arguments.resume)
            succeeded = jobs.follow()
    except KeyboardInterrupt:
        show(f"interrupted; to go on from the checkpoints:\n  {resume_command(arguments.command_line)}")
        return 130
    if succeeded:
        forget_checkpoints(settings, arguments.output)
    return 0 if succeeded else 1
