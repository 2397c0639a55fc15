"""Calibration: every program timed once, so that the latency model predicts from the first iteration on."""

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from flexjax.engine.batch import SamplingBatch
from flexjax.engine.runner import Runner
from flexjax.layout import PAGE_TOKENS, SlotLayout, tiles_for
from flexjax.request import SamplingLevel
from flexjax.scheduler import LatencyModel, UnitKind
from flexjax.scheduler.terms import unit_term
from flexjax.state import Dimensions, gradient_shapes
from flexjax.step_batch import backward_fields, forward_fields, host_batch, loss_fields, sampling_fields

MUCH_CONTEXT = 1024
"""Positions of a long conversation; the price of one is that of most that are served, where sixteen times as many would
be cheaper each, and take the start-up longer."""


def calibrate_forward(runner: Runner, latency: LatencyModel, layouts: Iterable[SlotLayout]) -> None:
    """Time every layout with little context, with much in its rows, and with much in its tiles."""
    much = max(1, min(runner.programs.dims.context // 2, MUCH_CONTEXT))
    for layout in layouts:
        for rows, tiles in [(1, 1), (much, 1)] + [(1, much)] * (layout.chunk > 0):
            packed, context = filled(runner.programs.dims, layout, rows, tiles)
            call = functools.partial(runner.forward, layout, packed, idle_sampling(layout))
            seconds = seconds_of(lambda call=call: call().tokens)
            latency.calibrate(("forward", layout), seconds, layout.rows * rows + context, context)


def use_first(runner: Runner, layout: SlotLayout) -> None:
    """Run a layout with nothing in it, which changes nothing, and wait for it. By its first use a program is brought to
    the device, which takes the host 38 ms on a GPU."""
    packed, _ = host_batch(forward_fields(runner.programs.dims, layout))
    np.asarray(runner.forward(layout, packed, idle_sampling(layout)).tokens)


def filled(dims: Dimensions, layout: SlotLayout, rows: int, tiles: int) -> tuple[np.ndarray, int]:
    """A batch whose rows attend to so many positions each and whose tiles, all full, to as many rounded up to whole
    pages; and the positions of all tiles.

    Rows have pages of their own as far as there are, as when they serve: pages that many read would come from the
    device's cache. Tiles have theirs in common, as those of a prompt do. Both may write one page:
    nobody needs what it holds.
    """
    packed, batch = host_batch(forward_fields(dims, layout))
    batch.row_position[:] = rows - 1
    batch.row_pages[:] = np.arange(batch.row_pages.size).reshape(batch.row_pages.shape) % dims.pages
    if layout.chunk:
        batch.tile_pages[:] = np.arange(dims.context_pages) % dims.pages
        batch.tile_length[:] = PAGE_TOKENS
        batch.tile_position[:] = (tiles - 1) // PAGE_TOKENS * PAGE_TOKENS
    return packed, layout.tiles * tiles_for(tiles) * PAGE_TOKENS


def idle_sampling(layout: SlotLayout) -> SamplingBatch:
    """Greedy, and nobody samples: it costs what any greedy batch costs."""
    return SamplingBatch(host_batch(sampling_fields(layout.rows))[0], SamplingLevel.GREEDY)


def calibrate_job(runner: Runner, latency: LatencyModel, name: str) -> None:
    """Time a job's loss and backward programs on idle windows, the backward one at the beginning and at the end of a
    sequence that fills the microbatch. Requests wait meanwhile, some tens of milliseconds; of one call alone the times
    of a GPU say little, and a price of positions that comes out as nothing is not corrected later.

    The windows have no tokens, but a cotangent: the gradient of attention leaves out queries without one. Gradients are
    zero again afterwards.
    """
    dims, job = runner.programs.dims, runner.jobs[name]
    packed, _ = host_batch(loss_fields(dims))
    latency.calibrate(unit_term(UnitKind.LOSS, dims.window), seconds_of(lambda: runner.loss(job, packed), 2))
    for lean in [False, True][: 1 + (dims.lean_tape is not None)]:
        for start in sorted({0, dims.microbatch - dims.window}):
            packed, context = idle_backward(dims.lean if lean else dims, start)
            job.gradients = replace(job.gradients, hidden=jnp.ones_like(job.gradients.hidden))
            seconds = seconds_of(lambda packed=packed, lean=lean: runner.backward(job, 0, packed, lean), 5)
            latency.calibrate(unit_term(UnitKind.BACKWARD, dims.window, lean), seconds, context)
    job.gradients = None
    job.gradients = runner.programs.zeros(gradient_shapes(dims, job.shape.rank, job.shape.modules), "gradients")


def idle_backward(dims: Dimensions, start: int) -> tuple[np.ndarray, int]:
    """A backward window without tokens that begins at a slot of the microbatch, and the positions it attends to."""
    packed, batch = host_batch(backward_fields(dims))
    first, tiles = start // PAGE_TOKENS, dims.window // PAGE_TOKENS
    batch.start[...] = start
    batch.block_start[:] = 0
    batch.tile_position[:] = start + PAGE_TOKENS * np.arange(tiles)
    return packed, PAGE_TOKENS * sum(range(first + 1, first + tiles + 1))


def seconds_of(call: Callable, repeats: int = 3) -> float:
    """Seconds of a call after one that is not counted: several one behind the other, as when the engine serves, whose
    host prepares a step while the device computes the one before."""
    np.asarray(call())
    started = time.perf_counter()
    results = [call() for _ in range(repeats)]
    np.asarray(results[-1])
    return (time.perf_counter() - started) / repeats
