"""Lowering: programs are traced and lowered in processes of their own, side by side, and only compiled here.

Tracing and lowering is Python's work, most of it inside the kernels: 2 to 4 seconds a program with a tape, one after
the other however many threads ask. What comes back is a `jax.export.Exported`, which is lowered again in a hundredth of
a second; it compiles to the same program.

The processes run `flexjax.engine.lowering_process`.
"""

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from flexjax.engine.blueprint import Lowered
from flexjax.engine.jax_settings import jax_settings
from flexjax.state import Dimensions
from flexjax.steps.kernels import Kernels
from pallas_kernels.paged_attention.tiling import multiprocessors

logger = logging.getLogger(__name__)

MOST_PROCESSES = 8
PLATFORMS = {"gpu": "cuda", "cpu": "cpu"}


@dataclass(frozen=True)
class Order:
    """A program to lower, as it is sent.

    Attributes:
        definition, frozen, dims, kernels: what `Programs` is made of.
        key: of the program there.
        platform: that it is for, in jax's words; multiprocessors: of that device.
        settings: of `jax_settings`, in the process that asks.
    """

    definition: nnx.GraphDef
    frozen: nnx.State
    dims: Dimensions
    kernels: Kernels
    key: tuple
    platform: str
    multiprocessors: int
    settings: dict[str, Any]


class LoweringProcesses:
    """Processes that lower, while this is entered; started when a program is asked for. Any thread may ask.

    Args:
        platform: of the device that programs are for, in jax's words.
        count: of processes; 0: all is lowered by who asks.
    """

    def __init__(self, platform: str, count: int):
        self._platform, self._count = platform, count
        self._processes: list[LoweringProcess] = []
        self._idle: SimpleQueue[LoweringProcess] = SimpleQueue()
        self._users, self._lock = 0, threading.Lock()

    def __enter__(self) -> "LoweringProcesses":
        """May be entered several times, by several threads."""
        with self._lock:
            self._users += 1
        return self

    def __exit__(self, *_) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            ended, self._processes, self._idle = self._processes, [], SimpleQueue()
        for process in ended:
            process.close()

    def lowered(self, definition, frozen, dims: Dimensions, kernels: Kernels, key: tuple) -> Callable | None:
        """A body for the `Blueprint` of this program; None if it is to be lowered here."""
        if not self._users or not self._count:
            return None
        with self:
            if not self._start():
                return None
            process = self._idle.get()
            try:
                device = PLATFORMS[self._platform], multiprocessors()
                return process.lowered(Order(definition, frozen, dims, kernels, key, *device, jax_settings())).body
            except LoweringFailed as error:
                logger.warning("%s is lowered in this process: %s", key[0], error)
                return None
            finally:
                self._idle.put(process)

    def _start(self) -> bool:
        """As many as can be; whether there is any."""
        with self._lock:
            try:
                for _ in range(self._count - len(self._processes)):
                    self._processes.append(process := LoweringProcess())
                    self._idle.put(process)
            except OSError as error:
                logger.warning("programs are lowered by %d processes: %s", len(self._processes), error)
                self._count = len(self._processes)
            return bool(self._processes)


class LoweringFailed(Exception):
    """The process has ended, or could not do it."""


class LoweringProcess:
    """One such process, from the side of who asks; one thread at a time."""

    def __init__(self):
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        own = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        command = [sys.executable, "-P", "-m", "flexjax.engine.lowering_process"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        environment = os.environ | own | {"PYTHONPATH": paths}
        self._process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    def lowered(self, order: Order) -> Lowered:
        """Raises LoweringFailed."""
        try:
            pickle.dump(order, self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise LoweringFailed(f"the process for it ended with {self._process.poll()}") from error
        if isinstance(answer, str):
            raise LoweringFailed(answer)
        return answer

    def close(self) -> None:
        """It has answered all that it was asked."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def processes_for(mesh: Mesh) -> LoweringProcesses:
    """As many as pay: none without kernels to lower, and none for several devices, whose collectives are lowered for
    the devices themselves."""
    platform = mesh.devices.flat[0].platform
    pays = platform == "gpu" and mesh.size == 1
    return LoweringProcesses(platform, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2) if pays else 0)
