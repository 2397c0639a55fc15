"""Calibration: every program timed once, so that the latency model predicts from the first iteration on."""

import functools
import time
from collections.abc import Callable, Iterable

import numpy as np

from flexjax.engine.batch import SamplingBatch
from flexjax.engine.runner import Runner
from flexjax.layout import PAGE_TOKENS, SlotLayout
from flexjax.request import SamplingLevel
from flexjax.scheduler import LatencyModel
from flexjax.step_batch import backward_fields, forward_fields, host_batch, loss_fields, sampling_fields


def calibrate_forward(runner: Runner, latency: LatencyModel, layouts: Iterable[SlotLayout]) -> None:
    """Time every layout with little and with much context; best of a few, after one that is not counted."""
    dims = runner.programs.dims
    for layout in layouts:
        for context in (1, dims.context // 2):
            packed, batch = host_batch(forward_fields(dims, layout))
            batch.row_position[:] = context - 1
            tokens = layout.rows * context
            if layout.chunk:
                batch.tile_length[:] = PAGE_TOKENS
                batch.tile_position[:] = (context - 1) // PAGE_TOKENS * PAGE_TOKENS
                tokens += layout.tiles * (int(batch.tile_position[0]) + PAGE_TOKENS)
            call = functools.partial(runner.forward, layout, packed, idle_sampling(layout))
            seconds = best_of(lambda call=call: call().tokens)
            latency.calibrate(("forward", layout), seconds, tokens)


def idle_sampling(layout: SlotLayout) -> SamplingBatch:
    """Greedy, and nobody samples: it costs what any greedy batch costs."""
    return SamplingBatch(host_batch(sampling_fields(layout.rows))[0], SamplingLevel.GREEDY)


def calibrate_job(runner: Runner, latency: LatencyModel, name: str) -> None:
    """Time a job's loss and backward programs on an idle window, which adds nothing to its gradients. Requests wait
    meanwhile, so each is timed once."""
    dims, job = runner.programs.dims, runner.jobs[name]
    packed, _ = host_batch(loss_fields(dims))
    latency.calibrate(("loss", dims.window), best_of(lambda: runner.loss(job, packed), 1))
    packed, _ = host_batch(backward_fields(dims))
    latency.calibrate(("backward", dims.window), best_of(lambda: runner.backward(job, 0, packed), 1))


def best_of(call: Callable, repeats: int = 3) -> float:
    """Least seconds of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        np.asarray(call())
        times.append(time.perf_counter() - started)
    return min(times[1:])
