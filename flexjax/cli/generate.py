"""Continue prompts and print the texts.

Without options the model's own sampling defaults hold (generation_config.json), and answers end after 256 tokens.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import flexjax
from flexjax.cli.adapters import add_adapter_arguments, load_adapters
from flexjax.cli.progress import show
from flexjax.cli.settings import add_engine_arguments, read_settings
from flexjax.config import EngineConfig
from flexjax.engine.machine import platform_of
from flexjax.fields import ConfigError
from flexjax.request import RequestOutput, SamplingParams
from flexjax.sizes import sizes_for

MAX_TOKENS = 256

SAMPLING = {
    "max_tokens": int,
    "min_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "seed": int,
    "n": int,
    "logprobs": int,
}
"""Numbers of `SamplingParams` that are options under the same name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    add_adapter_arguments(parser)
    parser.add_argument("--use", metavar="NAME", help="adapter to answer with; without it the base model answers")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt on every line; - is standard input")
    parser.add_argument("--chat", action="store_true", help="each prompt is what a user says to the model")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line for every answer")
    group = parser.add_argument_group("sampling (names and meanings of vLLM)")
    for name, kind in SAMPLING.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X")
    group.add_argument("--stop", action="append", metavar="TEXT", help="may be given several times")
    group.add_argument("--ignore-eos", action="store_true", default=None)


def run(arguments: argparse.Namespace) -> int:
    prompts = read_prompts(arguments)
    given = sampling_of(arguments)
    sequences = len(prompts) * SamplingParams(**given).n  # refuses impossible values before the model is loaded
    if arguments.use is not None and arguments.use not in dict(arguments.adapter):
        raise ConfigError(f"--use is {arguments.use!r}; name that adapter with --adapter {arguments.use}=DIR")
    config = read_settings(arguments).engine
    with flexjax.Engine.from_config(enough_for(config, sequences, platform_of(config)), progress=show) as engine:
        load_adapters(engine, arguments.adapter)
        sampling = SamplingParams(**{"max_tokens": MAX_TOKENS, **engine.defaults.sampling, **given})
        if arguments.chat:
            conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
            outputs = engine.chat(conversations, sampling, arguments.use)
        else:
            outputs = engine.generate(prompts, sampling, arguments.use)
    write = write_json if arguments.json else write_text
    write(prompts, sampling.n, outputs)
    return 0


def enough_for(config: EngineConfig, sequences: int, platform: str) -> EngineConfig:
    """No job comes, and no more sequences than these: where the configuration leaves it open, the engine is no larger,
    so that few programs are compiled."""
    if config.policy == "auto" and not (config.tpot_objective_ms or config.itl_objective_ms):
        config = replace(config, policy="inference_only")
    open_rows = config.max_rows is None and config.row_sizes is None
    return replace(config, max_rows=sizes_for(platform).rows_for(sequences)) if open_rows else config


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Raises ConfigError without a prompt, OSError or ValueError if the file cannot be read."""
    prompts = list(arguments.prompt)
    if arguments.prompts is not None:
        text = sys.stdin.read() if arguments.prompts == "-" else Path(arguments.prompts).read_text(encoding="utf-8")
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("there is no prompt; give --prompt TEXT or --prompts FILE with a prompt on every line")
    return prompts


def sampling_of(arguments: argparse.Namespace) -> dict:
    """The fields of `SamplingParams` that the command line gives."""
    names = (*SAMPLING, "stop", "ignore_eos")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def write_json(prompts: list[str], n: int, outputs: list[RequestOutput]) -> None:
    for index, output in enumerate(outputs):
        line = {
            "index": index,
            "prompt": prompts[index // n],
            "token_ids": output.token_ids,
            "text": output.text,
            "finish_reason": output.finish_reason,
        }
        if output.logprobs is not None:
            line["logprobs"] = output.logprobs
        print(json.dumps(line))


def write_text(prompts: list[str], n: int, outputs: list[RequestOutput]) -> None:
    """A single answer stands alone; several have headings."""
    for index, output in enumerate(outputs):
        if len(outputs) > 1:
            print(f"=== {prompts[index // n]}" + (f" ({index % n + 1} of {n})" if n > 1 else ""))
        print(output.text)
