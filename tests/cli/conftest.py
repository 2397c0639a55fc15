"""A working directory with a tiny model, rows to train on and a configuration, and what the commands make of them."""

import json
from pathlib import Path

import pytest

from flexjax.cli import main
from tests.tiny_model import write_tiny_model

ROWS = tuple(
    {"prompt": f"{a} and {b} make", "completion": f" {a + b} of them, said number {a}!"}
    for a in range(4)
    for b in range(4)
)

ENGINE = """
[engine]
model = "tiny"
dtype = "float32"
max_model_len = 256
max_rows = 4
row_sizes = [4]
chunk_sizes = [128]
pages = 120
max_adapters = 12
adapter_rank_capacity = 96
microbatch_tokens = 256
backward_window = 128
"""

JOB = """
[[finetune]]
data = "rows.jsonl"
rank = 4
alpha = 8
schedule = "constant"
"""


@pytest.fixture(scope="session")
def work(tmp_path_factory, compilation_cache) -> Path:
    """Holds the directory "tiny" (a model), rows.jsonl, and count.toml: a job "counter" of 40 steps."""
    folder = tmp_path_factory.mktemp("work")
    write_tiny_model(folder / "tiny")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    write_config(folder / "count.toml", compilation_cache, 'name = "counter"\nepochs = 20\nlearning_rate = 1e-2\n')
    write_config(folder / "server.toml", compilation_cache)
    return folder


def write_config(file: Path, compilation_cache: str, *jobs: str) -> str:
    """A configuration with a job for each text of further keys; returns its name."""
    engine = f'{ENGINE}compilation_cache = "{compilation_cache}"\n'
    file.write_text(engine + "".join(JOB + job for job in jobs))
    return str(file)


@pytest.fixture(scope="session")
def adapter(work) -> Path:
    """The adapter of count.toml, trained without interruption by ``flexjax finetune``."""
    assert main(["finetune", str(work / "count.toml"), "--output", str(work / "whole")]) == 0
    return work / "whole" / "counter"
