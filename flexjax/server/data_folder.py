"""DataFolder: where the service keeps what it is given and what it makes. One process has a folder at a time.

    state.sqlite  files/FILE-ID  checkpoints/JOB-NAME/  adapters/MODEL-NAME/  jobs/JOB-ID/step-00000012/
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from flexjax.fields import ConfigError
from flexjax.weights.adapter import LoraAdapter
from flexjax.weights.peft import write_adapter
from flexjax.weights.verified_folder import flush, publish

PARTIAL = ".partial"
"""Ends the names of what is being written; a killed process leaves them."""

CHECKPOINTS = "checkpoints"
"""Folder that jobs resume from, where the engine's configuration names no other."""

DATABASE = "state.sqlite"


class DataFolder:
    """Args:
    root: made if it does not exist.

    Raises:
        ConfigError: it cannot be made, or another process uses it.
    """

    def __init__(self, root: Path):
        self.root = root
        try:
            for name in ("files", "adapters", "jobs"):
                (root / name).mkdir(parents=True, exist_ok=True)
            self._lock = open(root / "lock", "a")  # noqa: SIM115 (held until close)
        except OSError as error:
            raise ConfigError(f"data_dir is {root}, which cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ConfigError(f"data_dir is {root}, which another server uses; choose another") from error

    def close(self) -> None:
        self._lock.close()

    def file(self, identifier: str) -> Path:
        return self.root / "files" / identifier

    def adapter(self, name: str) -> Path:
        return self.root / "adapters" / name

    def checkpoint(self, job: str, step: int) -> Path:
        """Folder of the adapter as it was after a step."""
        return self.root / "jobs" / job / f"step-{step:08d}"

    def checkpoints(self, job: str) -> list[Path]:
        """Those of a job that are there."""
        return sorted((self.root / "jobs" / job).glob("step-*"))

    def write_file(self, identifier: str, write: Callable[[Path], None]) -> None:
        """Have ``write`` fill a file, which is there with all its bytes on the disk or not at all."""
        file = self.file(identifier)
        partial = file.with_name(file.name + PARTIAL)
        try:
            write(partial)
            flush(partial)
            os.replace(partial, file)
            flush(file.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def write_adapter(self, folder: Path, adapter: LoraAdapter) -> None:
        """In PEFT's format, whole or not at all; a folder that is there was written by the same step before."""
        if folder.exists():
            return
        partial = folder.with_name(folder.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        write_adapter(partial, adapter)
        publish(partial, folder)

    def sweep(self, files: Collection[str], folders: Collection[Path]) -> None:
        """Delete what a killed process left: files that were never acknowledged, and folders that are not needed. What
        the service did not make is not touched, whatever folder it was given.

        Args:
            files: identifiers of those to keep; folders: to delete, such as jobs that have ended would resume from.
        """
        for file in (self.root / "files").glob("file-*"):
            if file.name not in files:
                file.unlink()
        for folder in [*(self.root / "adapters").glob(f"*{PARTIAL}"), *(self.root / "jobs").glob(f"*/*{PARTIAL}")]:
            shutil.rmtree(folder)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
