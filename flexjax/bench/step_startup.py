"""Startup: seconds from the start of a process to the first token it makes, with an empty and a filled cache of
compiled programs. The weights are random, so no file is read.

    python -m flexjax.bench.step_startup ENGINE.json        the process that is timed
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from flexjax.bench.step_model import describe_model
from flexjax.bench.step_plan import StepCase
from flexjax.bench.step_setup import StepReport, StepSetup
from flexjax.bench.step_traffic import random_prompts, submit_together
from flexjax.config import EngineConfig, from_table
from flexjax.engine.engine import Engine

FIRST_TOKEN = "first token"
PROMPT_TOKENS = 64


def run_startup(setup: StepSetup, cases: tuple[StepCase, ...], report: StepReport) -> None:
    """Twice the same process; the first one fills the cache."""
    (case,) = cases
    folder = setup.folder / "startup"
    folder.mkdir()
    config = setup.engine_config(case)
    report.model = describe_model(setup.model, config.dtype)
    table = vars(config) | {"policy_options": config.options, "compilation_cache": str(folder / "compiled")}
    engine_file = folder / "engine.json"
    engine_file.write_text(json.dumps(table))
    sizes = f"row sizes {list(config.row_sizes)}, chunk sizes {list(config.chunk_sizes)}"
    for metric, cache in zip(case.metrics, ("an empty", "a filled"), strict=True):
        seconds = startup_seconds(engine_file, folder)
        report.add({metric: seconds}, metric.removesuffix("_s"), f"{cache} cache, {sizes}", 1e3 * seconds)


def startup_seconds(engine_file: Path, folder: Path) -> float:
    """Raises RuntimeError if the process ends without a token."""
    environment = os.environ | {"CUDA_CACHE_PATH": str(folder / "cuda")}
    command = [sys.executable, "-m", "flexjax.bench.step_startup", str(engine_file)]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith(FIRST_TOKEN):
                return time.perf_counter() - started
            print(f"    {time.perf_counter() - started:6.1f} s  {line.rstrip()}")
    raise RuntimeError(f"the process that was started ended with code {process.returncode} and without a token")


def main(engine_file: str) -> int:
    """Start an engine and answer one request with one token."""
    config = from_table(EngineConfig, json.loads(Path(engine_file).read_text()), engine_file)
    with Engine(config, lambda line: print(line, flush=True)) as engine:
        prompts = random_prompts([PROMPT_TOKENS], engine.model.vocab_size, seed=0)
        submit_together(engine, prompts, [1])[0].wait()
        print(FIRST_TOKEN, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
