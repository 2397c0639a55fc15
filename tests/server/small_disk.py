"""A small file system in memory, mounted in a namespace of its own: nothing outside sees it, and no rights are needed
where the kernel lets users make namespaces."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.server.processes import ROOT


@dataclass
class SmallDisk:
    """Attributes:
    holder: process that keeps the namespace.
    folder: where it is mounted, as those inside see it; seen: as we do.
    """

    holder: int
    folder: Path

    @property
    def seen(self) -> Path:
        return Path(f"/proc/{self.holder}/root{self.folder}")

    @property
    def inside(self) -> list[str]:
        """Words that run a command in the namespace, from the repository's root."""
        enter = ["nsenter", "--target", str(self.holder), "--user", "--mount", "--preserve-credentials"]
        return [*enter, "env", "-C", str(ROOT)]

    @contextmanager
    def full(self) -> Iterator[None]:
        """Not a byte is free at first; what those inside delete or leave free, they can have again."""
        ballast = self.seen / "ballast"
        try:
            with open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError as error:
            assert "No space left" in str(error)
        try:
            yield
        finally:
            ballast.unlink()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[SmallDisk]:
    """Mount ``size`` ("16m") over a folder. Skips the test where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    script = f"mount -t tmpfs -o size={size} tmpfs '{folder}' && echo mounted && exec sleep infinity"
    try:
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        pytest.skip("there is no program unshare, which makes the namespace of a small disk")
    try:
        said = holder.stdout.readline()
        if said != "mounted\n":
            pytest.skip(f"a small disk cannot be mounted in a namespace here: {said.strip()}")
        yield SmallDisk(holder.pid, folder)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
