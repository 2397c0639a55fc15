"""SafetensorsFiles: arrays by name from one or several safetensors files. It knows no model."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsFiles:
    """Headers of safetensors files, read at once; arrays are read when asked for.

    Args:
        files: paths, each existing.

    Attributes:
        shapes: name -> shape of every array in the files.

    Raises:
        ValueError: a file is truncated or is no safetensors file, an array is in two files, or is not of floats.
    """

    def __init__(self, files: list[Path]):
        self._open = {file: open_file(file) for file in files}
        self._home: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file, handle in self._open.items():
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                self._add(file, name, handle.get_slice(name))

    def _add(self, file: Path, name: str, header) -> None:
        if name in self._home:
            raise ValueError(f"tensor {name} is in {self._home[name]} and in {file}; it must be in one file")
        if header.get_dtype() not in FLOATS:
            raise ValueError(
                f"tensor {name} in {file} has dtype {header.get_dtype()}; supported are {', '.join(FLOATS)} "
                "(quantised weights are read from GGUF files)"
            )
        self._home[name], self.shapes[name] = file, tuple(header.get_shape())

    def read(self, name: str) -> np.ndarray:
        """One array, in the dtype of the file."""
        return self._open[self._home[name]].get_tensor(name)


def open_file(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise ValueError(f"{file} ({size} bytes) is truncated or is no safetensors file: {error}") from error


def find_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: those of the index, else ``model.safetensors``.

    Raises:
        FileNotFoundError: there are none, or the index names files that are absent.
        ValueError: the index is not valid.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is not a safetensors index: {error!r}") from error
        absent = [name for name in names if not (directory / name).is_file()]
        if absent:
            raise FileNotFoundError(f"{index} names files that are not there: {', '.join(absent)}")
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = sorted(file.name for file in directory.glob("*.bin"))
    reason = f"; it has {', '.join(pickled)}, but pickled torch weights are not read" if pickled else ""
    raise FileNotFoundError(f"no model.safetensors or model.safetensors.index.json in {directory}{reason}")
