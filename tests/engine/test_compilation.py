"""Compiling side by side on a device that has memory for one program that measures, not for several."""

import subprocess
import sys
import threading
import time

import jax
import pytest

from flexjax.engine.compilation import side_by_side
from flexjax.memory import OutOfMemory

NO_MEMORY = "NOT_FOUND: All configs failed\nRESOURCE_EXHAUSTED: Out of memory while trying to allocate 329.12MiB"

MEASURES = """
import jax, jax.numpy as jnp, numpy as np
from dataclasses import replace
from jax.sharding import Mesh, PartitionSpec as P
from flexjax.engine.blueprint import Blueprint
from flexjax.engine.programs import COMPILER_OPTIONS
from flexjax.engine.program_store import ProgramStore
from flexjax.memory import measuring_bytes
from pathlib import Path
from tests.test_memory import DIMS

dims, folder = replace(DIMS, max_rows=768), Path({folder!r})
mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
options = COMPILER_OPTIONS["gpu"] | ProgramStore(folder, mesh).measured()
x = jax.ShapeDtypeStruct((768, 4096), jnp.bfloat16)
head = jax.ShapeDtypeStruct((128256, 4096), jnp.bfloat16)
logits = lambda x, head: jax.lax.dot_general(x, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
Blueprint(logits, (x, head), (P(), P()), P(), ()).compile(mesh, dims.dtype, options)
peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
print(peak, measuring_bytes(dims), len(list(folder.glob("measured-*/*"))))
"""


class Task:
    """Fails for want of memory as often as it is told to, and counts who runs with it."""

    running: set["Task"] = set()
    lock = threading.Lock()

    def __init__(self, number: int, failures: int, message: str = NO_MEMORY):
        self.number, self.failures, self.message = number, failures, message
        self.beside: list[int] = []

    def __call__(self) -> int:
        with self.lock:
            self.running.add(self)
            self.beside.append(len(self.running) - 1)
        try:
            time.sleep(0.01)  # the others have begun
            if len(self.beside) <= self.failures:
                raise jax.errors.JaxRuntimeError(self.message)
            return self.number
        finally:
            with self.lock:
                self.running.remove(self)


def test_those_without_memory_beside_others_are_done_again_one_by_one():
    tasks = [Task(number, failures=number % 2) for number in range(8)]
    ended = list(side_by_side(tasks))
    assert sorted(ended) == list(range(8)) and ended[4:] == [each for each in ended[4:] if each % 2]
    assert [len(task.beside) for task in tasks] == [1, 2] * 4
    assert all(task.beside[1] == 0 for task in tasks if task.failures)


def test_without_memory_for_one_alone_the_knob_is_named():
    with pytest.raises(OutOfMemory, match=r"lower pages.*(?s:.)*329.12MiB"):
        list(side_by_side([Task(0, failures=2)]))


def test_another_error_is_raised_at_once():
    task = Task(0, failures=1, message="INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        list(side_by_side([task]))
    assert len(task.beside) == 1


@pytest.mark.gpu
def test_measuring_the_largest_product_takes_what_the_plan_counts_and_is_kept(tmp_path):
    """768 rows and the head of Llama-3.1-8B."""
    command = [sys.executable, "-c", MEASURES.format(folder=str(tmp_path))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    peak, counted, files = map(int, ended.stdout.split())
    assert 0.5 * counted < peak <= counted, f"{peak:,} bytes were in use, {counted:,} are counted"
    assert files, "nothing that was measured is kept"
