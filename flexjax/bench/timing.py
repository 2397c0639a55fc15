"""Timing: how long one call of an operation keeps the device busy. It knows no operation.

A program holds several calls, unrolled as the layers of a step are, each on data of its own so that no cache holds it;
several rounds of the program are dispatched one behind the other, and the host waits for the last. So the time of a
call includes what the device spends between calls, and its share of one dispatch. Nothing is subtracted.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import jax

from flexjax.engine.programs import COMPILER_OPTIONS

LAUNCHES = {"gpu": ({"xla_gpu_enable_command_buffer": ""}, {}), "cpu": ({},)}
"""Compiler options: kernels launched one by one; or as a CUDA graph, whose nodes may have to be updated before every
launch. Neither is always the faster."""

SHORT = 70e-6
"""Seconds of a call below which launches may show, so that a graph is tried too."""

WARM_UPS = 2
"""Rounds before the clock runs."""

SECONDS, REPEATS, MOST_ROUNDS = 0.02, 5, 200
"""A repeat takes about so many seconds."""

Call = Callable[[Any, Any, int], tuple[Any, Any]]
"""(state, arguments, index) -> (state, output). ``index``, a Python integer, names the data of this call."""


@dataclass(frozen=True)
class Timed:
    """Attributes:
    state: what the calls left of it; output: of the call with index 0.
    best, median: seconds of one call, over the repeats.
    """

    state: Any
    output: Any
    best: float
    median: float


def time_calls(call: Call, calls: int, state: Any, arguments: Any, engine_options: bool = False) -> Timed:
    """Time ``call`` with the indices 0 .. calls - 1, by the faster way to launch it. The state is donated.

    Args:
        engine_options: compile as the engine does; otherwise with the compiler's own choices.
    """
    platform = jax.default_backend()
    options = COMPILER_OPTIONS[platform] if engine_options else {}
    timed = None
    for launch in LAUNCHES[platform]:
        if timed is None or timed.best < SHORT:
            program = functools.partial(unrolled, call, calls)
            jitted = jax.jit(program, donate_argnums=0, compiler_options={**options, **launch})
            other = time_program(jitted, calls, state, arguments)
            timed = other if timed is None or other.best < timed.best else replace(timed, state=other.state)
            state = timed.state
    return timed


def time_program(program: Callable, calls: int, state: Any, arguments: Any) -> Timed:
    for _ in range(WARM_UPS):
        state, outputs, seconds = timed_rounds(program, 1, state, arguments)
    rounds = max(1, min(MOST_ROUNDS, math.ceil(SECONDS / seconds)))
    times = []
    for _ in range(REPEATS):
        del outputs  # the next round's need the room
        state, outputs, seconds = timed_rounds(program, rounds, state, arguments)
        times.append(seconds / (rounds * calls))
    return Timed(state, outputs[0], min(times), median(times))


def unrolled(call: Call, calls: int, state: Any, arguments: Any) -> tuple[Any, list]:
    outputs = []
    for index in range(calls):
        state, output = call(state, arguments, index)
        outputs.append(output)
    return state, outputs


def timed_rounds(program: Callable, rounds: int, state: Any, arguments: Any) -> tuple[Any, list, float]:
    started = time.perf_counter()
    for _ in range(rounds):
        state, outputs = program(state, arguments)
    jax.block_until_ready((state, outputs))
    return state, outputs, time.perf_counter() - started


@functools.cache
def compiled(function: Callable, **static: Any) -> Callable:
    """``function`` with these arguments fixed, as one program; or, called inside another, lowered once for all calls (a
    kernel takes about a second each)."""
    return jax.jit(functools.partial(function, **static))
