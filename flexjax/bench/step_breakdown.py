"""Breakdown: seconds of each finetuning program alone, on a real microbatch, dispatched back to back."""

import time
from collections.abc import Callable

import jax

from flexjax.engine.batch import Training, backward_batch, loss_batch
from flexjax.engine.engine import Engine
from flexjax.layout import PAGE_TOKENS, tiles_for
from flexjax.scheduler import Iteration
from flexjax.scheduler.cursor import Microbatch, MicrobatchCursor
from flexjax.scheduler.output import WindowSegment

REPEATS = 8


def program_seconds(engine: Engine, job: str) -> dict[str, float]:
    """Seconds of one call of every program, and of a microbatch made of them; empty if no microbatch is on its way.

    On the engine's thread. The job's gradients are worth nothing afterwards.
    """
    if not engine.trainer.training:
        return {}
    identifier, training = next(iter(engine.trainer.training.items()))
    runner, dims = engine.loop.runner, engine.loop.runner.programs.dims
    device_job, layers = runner.jobs[job], dims.model.num_layers
    slots = sum(tiles_for(length) for length in training.packed.lengths) * PAGE_TOKENS
    windows, last = -(-slots // dims.window), -(-slots // dims.window) - 1
    forward = whole_forward(engine, job, identifier, training)
    flights = {identifier: training}
    loss = jax.device_put(loss_batch(dims, training, 0))
    backward = [jax.device_put(backward_batch(dims, training, layers // 2, window)) for window in (0, last)]
    seconds = {
        "forward": seconds_of(lambda: runner.dispatch_forward(forward, {}, flights, engine.adapters).fence),
        "loss": seconds_of(lambda: runner.loss(device_job, loss)),
        "backward_first_window": seconds_of(lambda: runner.backward(device_job, layers // 2, backward[0])),
        "backward_last_window": seconds_of(lambda: runner.backward(device_job, layers // 2, backward[1])),
        "update": seconds_of(lambda: runner.update(device_job, 0.0)),
    }
    unit = (seconds["backward_first_window"] + seconds["backward_last_window"]) / 2
    forwards = -(-slots // forward.layout.chunk)
    return seconds | {"microbatch": forwards * seconds["forward"] + windows * (seconds["loss"] + layers * unit)}


def seconds_of(call: Callable) -> float:
    jax.block_until_ready(call())
    started = time.perf_counter()
    for _ in range(REPEATS):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / REPEATS


def whole_forward(engine: Engine, job: str, identifier: int, training: Training) -> Iteration:
    """An iteration with a forward step over as much of a microbatch as the largest chunk holds."""
    dims = engine.loop.runner.programs.dims
    tapes = [each for each in engine.scheduler.layouts if each.tape and not each.dropout]
    layout, lengths = max(tapes, key=lambda each: each.chunk), training.packed.lengths
    sizes = {"window": dims.window, "layers": dims.model.num_layers, "pages_per_block": dims.pages_per_block}
    microbatch = Microbatch(identifier, job, lengths, **sizes, lowest_layer=0, closes_group=False)
    windows, tile = [], 0
    for piece in MicrobatchCursor(microbatch).peek_forward(layout.tiles):
        where = (piece.sequence, tile * PAGE_TOKENS, piece.start, piece.length, piece.block)
        windows.append(WindowSegment(job, identifier, *where))
        tile += tiles_for(piece.length)
    return Iteration(0, layout, (), (), tuple(windows), (), 0.0, None, 0)
