"""Serve the OpenAI API over HTTP, beside the finetuning jobs of CONFIG.

The model answers under its name, adapters under theirs; clients load more of them from the adapter folder. Every
request leaves a line of JSON on standard error. SIGTERM or Ctrl-C: new work is refused while what runs ends (for at
most drain_seconds), then jobs that have not ended leave a checkpoint; a second one ends everything at once.
"""

import argparse
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from socket import socket
from typing import Any

import jax

import flexjax
from flexjax.cli.adapters import add_adapter_arguments, load_adapters
from flexjax.cli.jobs import CommandJobs, add_job_arguments, forget_checkpoints, job_settings, resume_command
from flexjax.cli.progress import show
from flexjax.cli.settings import Settings, add_engine_arguments, read_settings
from flexjax.config import EngineConfig, from_table, load_tables
from flexjax.engine.machine import platform_of
from flexjax.request import SamplingParams
from flexjax.server.app import create_app
from flexjax.server.config import ServerConfig
from flexjax.server.data_folder import CHECKPOINTS
from flexjax.server.keys import read_keys
from flexjax.server.process import ServerProcess, address_of, bind

OVERRIDES = ("host", "port", "api_keys", "api_keys_file", "allowed_origins", "data_dir", "adapter_dir")
"""Options that are fields of the [server] table under the same name."""

KEY_VARIABLE = "FLEXJAX_API_KEY"
"""Of the environment: a key, where no option gives one."""

HIDDEN = "a key"

OBJECTIVE_MS = 50.0
"""For an output token, on a GPU where nothing else is said."""

FAILED = 1
"""Exit status when the engine's thread has died, so that a supervisor starts the service again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    group = parser.add_argument_group("the service")
    group.add_argument("--host", metavar="NAME", help="address to listen on; 0.0.0.0 is all of this machine's")
    group.add_argument("--port", type=int, metavar="N", help="0 takes a free one")
    group.add_argument(
        "--api-key",
        dest="api_keys",
        action="append",
        metavar="KEY",
        help=f"clients must send this one or another that is given so; ${KEY_VARIABLE} keeps it off the process list",
    )
    group.add_argument("--api-keys-file", metavar="FILE", help="an owner and a key a line; owners are kept apart")
    group.add_argument(
        "--allowed-origins",
        type=json_list,
        metavar="LIST",
        help="""sites whose pages may use the service from a browser, as JSON: '["https://chat.example.org"]'""",
    )
    group.add_argument("--data-dir", metavar="DIR", help="folder of the service")
    group.add_argument("--adapter-dir", metavar="DIR", help="folder clients may load adapters from (DATA-DIR/adapters)")
    add_adapter_arguments(parser)
    add_job_arguments(parser)


def json_list(text: str) -> list[Any]:
    """As vLLM's option has it. Raises ArgumentTypeError."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, list):
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a list in JSON, such as '[\"*\"]'")
    return found


def run(arguments: argparse.Namespace) -> int:
    config = server_config(arguments)
    read_keys(config)  # before the model is loaded, so that a mistake shows at once
    settings = job_settings(read_settings(arguments), arguments.output)
    settings = settings.with_checkpoints(Path(config.data_dir) / CHECKPOINTS)
    settings = replace(settings, engine=with_objective(settings.engine, platform_of(settings.engine)))
    with bind(config) as listener:
        show_log()
        succeeded, failure = serve(settings, config, listener, arguments)
    if settings.jobs and succeeded:
        forget_checkpoints(settings, arguments.output)
    elif settings.jobs:
        command = resume_command(without_keys(arguments.command_line))
        show(f"not every job has succeeded; to go on from the checkpoints:\n  {command}")
    if failure is not None:
        show(f"the engine has failed: {failure}\nstart the service again: jobs of clients go on from their checkpoints")
    return 0 if failure is None else FAILED


def with_objective(config: EngineConfig, platform: str) -> EngineConfig:
    """A service's clients bring jobs when they like, which must not make others' answers ten times as slow: with
    neither a policy nor an objective for tokens, it has one on a GPU. What a CPU can keep depends on the model."""
    chosen = config.policy != "auto" or config.tpot_objective_ms or config.itl_objective_ms
    return config if chosen or platform == "cpu" else replace(config, tpot_objective_ms=OBJECTIVE_MS)


def without_keys(command_line: list[str]) -> list[str]:
    """What may be shown. What stands for a key is none, so that nobody uses it as one."""
    words = [f"--api-key={HIDDEN}" if word.startswith("--api-key=") else word for word in command_line]
    return [HIDDEN if before == "--api-key" else word for before, word in zip(["", *words], words, strict=False)]


def server_config(arguments: argparse.Namespace) -> ServerConfig:
    """The [server] table, with the options of the command line. Raises ConfigError."""
    given = {name: getattr(arguments, name) for name in OVERRIDES if getattr(arguments, name) is not None}
    if "api_keys" not in given and os.environ.get(KEY_VARIABLE):
        given["api_keys"] = [os.environ[KEY_VARIABLE]]
    paths = ("api_keys_file", "data_dir", "adapter_dir")
    absolute = {name: str(Path(value).absolute()) if name in paths else value for name, value in given.items()}
    if arguments.config is None:
        return from_table(ServerConfig, absolute, "command line")
    path = Path(arguments.config)
    table: dict[str, Any] = load_tables(path).get("server", {})
    return from_table(ServerConfig, table | absolute, f"{path} [server]", path.parent)


def show_log() -> None:
    """Our own log, which has a line for every request, on standard error as it is."""
    handler, own = logging.StreamHandler(), logging.getLogger("flexjax")
    handler.setFormatter(logging.Formatter("%(message)s"))
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    own.propagate = False  # libraries that we load give the root logger a handler of theirs


def serve(
    settings: Settings, config: ServerConfig, listener: socket, arguments: argparse.Namespace
) -> tuple[bool, BaseException | None]:
    """Serve until told to stop; whether all jobs have succeeded, and why the engine failed, if it did. A closed engine
    ends the jobs, then the thread that follows them comes to its end."""
    with ExitStack() as closing, ExitStack() as stack:
        follower = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="flexjax-jobs"))
        engine = stack.enter_context(flexjax.Engine.from_config(settings.engine, progress=show))
        prepare_sampling(engine)
        load_adapters(engine, arguments.adapter)
        jobs = CommandJobs(engine, arguments.output)
        jobs.submit(settings.jobs, arguments.resume)
        succeeded = follower.submit(jobs.follow)
        show_service(engine, config, address_of(listener))
        app = create_app(engine, config)
        closing.callback(app.state.service.close)
        ServerProcess(app, config).run(sockets=[listener])
        show("stopped")
    return succeeded.result(), engine.loop.failure


def prepare_sampling(engine: "flexjax.Engine") -> None:
    """Sample a token in every way, so that no client waits for the programs of it."""
    began = time.perf_counter()
    for settings in ({"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.9}, {"presence_penalty": 1.0}):
        engine.generate([[0]], SamplingParams(max_tokens=1, **settings))
    show(f"sampling ready in {time.perf_counter() - began:.1f} s")


def show_service(engine: "flexjax.Engine", config: ServerConfig, address: str) -> None:
    settings, devices = engine.config, jax.devices()[: engine.config.tp]
    apart = ", owners of keys from the folders of their names in it" if config.api_keys_file else ""
    show(str(engine.memory_plan))
    show(f"devices: {', '.join(each.device_kind for each in devices)}")
    show(f"adapters: {', '.join(sorted(engine.adapters.named)) or 'none'}; clients load from {config.adapters}{apart}")
    show(
        f"{settings.served_model_name} ({settings.model}, {settings.dtype}): {settings.max_rows} rows of at most "
        f"{settings.max_model_len} tokens, {config.max_queue} more may wait"
    )
    show(room_of_jobs(settings))
    show(read_keys(config).summary)
    show(f"ready: {address}/v1")


def room_of_jobs(config: EngineConfig) -> str:
    """What finetuning may do to requests; ``config`` is resolved."""
    limits = {"an output token": config.tpot_objective_ms, "a gap between two": config.itl_objective_ms}
    if config.policy == "co_serve":
        kept = " and ".join(f"{limit:g} ms {what}" for what, limit in limits.items() if limit is not None)
        return f"finetuning takes the time that requests leave within {kept}"
    if config.policy == "flat_out":
        return "finetuning takes all the room it finds: there is no objective; tpot_objective_ms is one"
    return f"finetuning: policy {config.policy}"
