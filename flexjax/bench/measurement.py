"""Measurement: on what a figure was measured, and how fast the chip was clocked meanwhile."""

import importlib.metadata
import os
import platform
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import jax

PACKAGES = ("flexjax", "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "nvidia-cublas")
"""Whose versions a figure depends on; those not installed are left out."""

CLOCK_PERIOD = 0.5
"""Seconds between two readings of the clock; one takes some 20 ms of another core."""


class ClockWatch:
    """Readings of the SM clock.

    Attributes:
        readings: MHz, one every `CLOCK_PERIOD` seconds.
    """

    def __init__(self) -> None:
        self.readings: list[float] = []

    @property
    def mean_mhz(self) -> float | None:
        """Mean of the readings; None where no GPU was read."""
        return fmean(self.readings) if self.readings else None


@contextmanager
def clock_watch() -> Iterator[ClockWatch]:
    """Reads the SM clock of the GPU that jax computes on, beside what runs in the body; without a GPU nothing."""
    watch, done = ClockWatch(), threading.Event()
    if jax.default_backend() != "gpu":
        yield watch
        return

    def read_until_done() -> None:
        while not done.wait(CLOCK_PERIOD):
            reading = query_gpu("clocks.sm")
            if reading is not None:
                watch.readings.append(float(reading))

    thread = threading.Thread(target=read_until_done, name="flexjax-clock", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join()


def device_facts() -> dict:
    """{"device": name, "versions": {package or part: version}, "commit": of this checkout, or None}."""
    return {"device": device_name(), "versions": versions(), "commit": commit()}


def device_name() -> str:
    device = jax.devices()[0]
    return f"{platform.machine()} CPU, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    driver = query_gpu("driver_version") if jax.default_backend() == "gpu" else None
    return found | ({"driver": driver} if driver else {})


def commit() -> str | None:
    """Commit of the checkout that this package lies in, with "-dirty" where files differ from it; None without git."""
    package = Path(__file__).parents[1]
    if output_of("git", "-C", str(package), "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # installed, perhaps inside somebody else's checkout
    return output_of("git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def query_gpu(field: str) -> str | None:
    """A field of nvidia-smi for the first GPU of this process; None if it cannot be read."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return output_of("nvidia-smi", f"--id={first}", f"--query-gpu={field}", "--format=csv,noheader,nounits")


def output_of(*command: str) -> str | None:
    """What a command prints; None if there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
