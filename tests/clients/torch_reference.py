"""What transformers and PEFT compute, asked of the Python that the tests of parity ask."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.parity.conftest import OFFLINE, REFERENCE

VARIABLE = "FLEXJAX_PARITY_PYTHON"
needs_torch = pytest.mark.skipif(
    not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no Python with torch, transformers and peft"
)

SHOW_VERSION = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"


def reference_version(package: str) -> str:
    command = [os.environ[VARIABLE], "-c", SHOW_VERSION, package]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def reference_logprobs(model: Path, adapter: Path | None, prompts: list[list[int]]) -> list[np.ndarray]:
    """For each prompt [T, vocab]: log-probabilities of the token after each, by transformers, with PEFT's adapter."""
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder, "tasks.json"), Path(folder, "answers.npz")
        task = {"do": "answer", "model": str(model), "adapter": adapter and str(adapter), "prompts": prompts}
        file.write_text(json.dumps([{**task, "new_tokens": 0, "output": str(output)}]))
        command, options = [os.environ[VARIABLE], str(REFERENCE), str(file)], {"capture_output": True, "text": True}
        done = subprocess.run(command, env=os.environ | OFFLINE, timeout=300, **options)
        assert done.returncode == 0, done.stderr
        with np.load(output) as found:
            return [found[f"logprobs_{number}"] for number in range(len(prompts))]
