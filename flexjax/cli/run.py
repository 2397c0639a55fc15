"""Serve requests on standard input beside the finetuning jobs of CONFIG.

In, one JSON object a line: an OpenAI completions or chat body and an "id"; "model" names the base model (as does a body
without it) or an adapter. Out, as tokens come, {"id", "index", "token_ids", "text", "finish_reason"} with what is new,
and for a line that cannot be answered {"line", "error"}. The end of input waits for all requests and jobs; Ctrl-C ends
requests with the finish reason "abort" and takes checkpoints of the jobs, whose events go to standard error.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import flexjax
from flexjax.cli.adapters import add_adapter_arguments, load_adapters
from flexjax.cli.jobs import (
    CommandJobs,
    add_job_arguments,
    forget_checkpoints,
    job_settings,
    resume_command,
)
from flexjax.cli.progress import show
from flexjax.cli.settings import Settings, add_engine_arguments, read_settings
from flexjax.server.standard_input import LineServer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    add_adapter_arguments(parser)
    add_job_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    settings = job_settings(read_settings(arguments), arguments.output)
    try:
        succeeded = serve(settings, arguments)
    except KeyboardInterrupt:
        hint = f"; to go on from the checkpoints:\n  {resume_command(arguments.command_line)}" if settings.jobs else ""
        show(f"interrupted{hint}")
        return 130
    if succeeded and settings.jobs:
        forget_checkpoints(settings, arguments.output)
    return 0 if succeeded else 1


def serve(settings: Settings, arguments: argparse.Namespace) -> bool:
    """Serve until input and jobs have ended; False if a job failed. Everything is left in the order opposite to that
    in which it was entered: a closed engine ends the jobs and the requests, then their last words are written."""
    with ExitStack() as stack:
        server = stack.enter_context(LineServer(sys.stdout))
        follower = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="flexjax-jobs"))
        engine = stack.enter_context(flexjax.Engine.from_config(settings.engine, progress=show))
        load_adapters(engine, arguments.adapter)
        jobs = CommandJobs(engine, arguments.output)
        jobs.submit(settings.jobs, arguments.resume)
        succeeded = follower.submit(jobs.follow)
        show(f"{engine.config.served_model_name} is ready; requests are read from standard input")
        server.serve(engine, sys.stdin.buffer)
        return succeeded.result()
