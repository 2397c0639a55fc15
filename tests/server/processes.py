"""Servers in processes of their own, which can be killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import openai

from tests.tiny_model import ENGINE, write_tiny_model

ROOT = Path(__file__).parents[2]
POLICY = 'policy = "fixed_budget"\npolicy_options = { finetune_tokens = 128, backward_units = 4 }\n'


def write_config(folder: Path, compilation_cache: str, server: dict | None = None, **settings) -> Path:
    """A configuration under which jobs repeat to the bit; its data folder is beside it.

    Args:
        server: more of the [server] table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {"model": str(write_tiny_model(folder / "tiny")), "compilation_cache": compilation_cache}
    lines = lambda values: [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    engine, port = lines({**ENGINE, **own, **settings}), {"port": 0, "data_dir": "data"}
    file = folder / "serve.toml"
    file.write_text("\n".join(["[engine]", *engine, POLICY, "[server]", *lines(port | (server or {})), ""]))
    return file


@contextmanager
def served(
    config: Path, module: str = "flexjax.cli", inside: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen, openai.OpenAI]]:
    """A server of its own process, which is killed at the end.

    Args:
        module: that is run, with the arguments of ``flexjax``.
        inside: words before the command, that have it run somewhere else.
    """
    log = config.with_name("log")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    with open(log, "w") as lines:
        command = [*inside, sys.executable, "-m", module, "serve", str(config)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=lines, stdout=lines)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"ready: (http\S+/v1)", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        with openai.OpenAI(base_url=found[1], api_key="none", max_retries=2) as client:
            yield process, client
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def adapter_bytes(config: Path, name: str) -> bytes:
    return (config.with_name("data") / "adapters" / name / "adapter_model.safetensors").read_bytes()
