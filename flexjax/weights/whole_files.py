"""Files that are written whole or not at all: under another name first, then renamed."""

import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file."""
    unfinished = file.with_name(file.name + ".unfinished")
    unfinished.touch()
    usual = unfinished.stat().st_mode  # the library makes files that only their owner may read
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, unfinished, {"format": "pt"})
    unfinished.chmod(usual)
    os.replace(unfinished, file)


def write_json(file: Path, values: dict) -> None:
    """Writes a JSON object, keys sorted."""
    unfinished = file.with_name(file.name + ".unfinished")
    unfinished.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(unfinished, file)
