"""Runner: owns the arrays on the device and turns an iteration into program calls. It decides nothing.

Used from one thread only, the engine's. Programs are enqueued; `InFlight.wait` waits for their results.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax
import numpy as np

from flexjax.engine.adapters import AdapterTable, AdapterVersion
from flexjax.engine.batch import (
    SamplingBatch,
    Serving,
    Training,
    backward_batch,
    forward_batch,
    loss_batch,
    sampling_batch,
)
from flexjax.engine.layer_views import places
from flexjax.engine.programs import JobShape, Programs
from flexjax.layout import SlotLayout
from flexjax.models.lora import products_of
from flexjax.models.matrices import with_matrices
from flexjax.scheduler.output import Completion, Iteration, Unit, UnitKind
from flexjax.state import AdapterStack, Gradients, Master, gradient_shapes, pool_shape, row_shapes
from flexjax.steps.update import OptimizerSpec


class DeviceLost(BaseException):
    """A program failed that had been given arrays which everybody needs: nothing can go on. Not an Exception: whoever
    deals with the faults of one job or one adapter must not take it for one."""


@dataclass
class DeviceJob:
    """A finetuning job's arrays and programs.

    Attributes:
        version: the private version whose range of the rank axis takes every update.
        ratios: module -> [layers, 1, 1] float32, see `flexjax.steps.update.update`.
    """

    shape: JobShape
    optimizer: OptimizerSpec
    version: AdapterVersion
    master: Master
    gradients: Gradients
    ratios: dict[str, np.ndarray]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What an iteration's forward and sampling steps return to the host, on the device until they are read; see their
    outputs."""

    tokens: jax.Array | np.ndarray
    logprobs: tuple | None
    prompt_logprobs: tuple | None


@dataclass
class InFlight:
    """An iteration on the device.

    Attributes:
        losses: (unit, float32 scalar) per loss window; norms: job -> gradient norm of its update.
        fence: done when the last program of the iteration is; fences: those of units, by job, with its last unit.
        faults: units that failed, when they were dispatched or later.
        completion: what the scheduler made of its tokens, once they are read.
        ended: seconds on the engine's clock, once the host has noticed; seconds: what it took, set by `wait`.
    """

    iteration: Iteration
    started: float
    output: StepOutput | None = None
    losses: list[tuple[Unit, jax.Array]] = field(default_factory=list)
    norms: dict[str, jax.Array] = field(default_factory=dict)
    fence: jax.Array | None = None
    fences: dict[str, tuple[Unit, jax.Array]] = field(default_factory=dict)
    faults: list[tuple[Unit, Exception]] = field(default_factory=list)
    completion: Completion | None = None
    ended: float | None = None
    seconds: float = 0.0

    def wait_forward(self) -> dict[int, int]:
        """Block until the forward step is done and its output is on the host; row -> sampled token, of all rows."""
        if self.output is None:
            return {}
        self.output = jax.tree.map(np.asarray, self.output)
        return dict(enumerate(self.output.tokens.tolist()))

    def look(self, now: float) -> bool:
        """Whether everything is done. ``now`` counts as the end if that was not known before."""
        if self.ended is None and (self.fence is None or self.fence.is_ready()):
            self.ended = now
        return self.ended is not None

    def wait(self, previous_end: float, clock: Callable[[], float]) -> float:
        """Block until everything is done; returns the end on the engine's clock. What a unit raises is a fault of its
        job; what the forward step raises is everybody's."""
        for unit, fence in self.fences.values():
            try:
                fence.block_until_ready()
            except Exception as error:  # whatever the device says
                self.faults.append((unit, error))
        if self.ended is None:
            if self.fence is not None and not self.fences:
                self.fence.block_until_ready()
            self.ended = clock()
        self.seconds = self.ended - max(self.started, previous_end)
        return self.ended


class Runner:
    """Device state and its programs.

    Args:
        weights: the base model's state, on the device, with room for adapters. Those of its matrices that adapters lie
            behind are donated to what writes adapters, so that no one else may hold them.
        clock: seconds, the engine's.
    """

    def __init__(self, programs: Programs, weights, clock: Callable[[], float] = time.perf_counter):
        self.programs, self.weights, self.clock = programs, weights, clock
        self.layers = programs.layer_views(weights)
        dims = programs.dims
        self.stack = programs.new_stack(weights)
        on_gpu = programs.mesh.devices.flat[0].platform == "gpu"
        self.place = places(self.stack.a) if on_gpu else None
        self.pool = programs.zeros(pool_shape(dims), "pool")
        self.rows = programs.zeros(row_shapes(dims), "rows")
        self.jobs: dict[str, DeviceJob] = {}

    def dispatch_forward(
        self,
        iteration: Iteration,
        serving: Mapping[int, Serving],
        training: Mapping[int, Training],
        adapters: AdapterTable,
    ) -> InFlight:
        """Enqueue the iteration's forward step, if it has one."""
        flight = InFlight(iteration, started=self.clock())
        if iteration.layout is not None:
            batch = forward_batch(self.programs.dims, iteration, serving, training, adapters)
            flight.output = self.forward(iteration.layout, batch, sampling_batch(iteration, serving))
            flight.fence = flight.output.tokens
        return flight

    def dispatch_units(
        self, flight: InFlight, training: Mapping[int, Training], learning_rates: Mapping[str, float]
    ) -> None:
        """Enqueue the iteration's units, but those of jobs that have ended since it was scheduled, or that follow a
        fault of theirs.

        Args:
            learning_rates: job -> rate of its next update.

        Raises:
            DeviceLost: see there.
        """
        faulty = set()
        for unit in flight.iteration.units:
            if unit.job in self.jobs and unit.job not in faulty:
                try:
                    fence = self._dispatch_unit(flight, unit, training.get(unit.microbatch), learning_rates)
                    flight.fences[unit.job] = unit, fence
                except Exception as error:  # whatever its program, or what it is told, raises
                    faulty.add(unit.job)
                    flight.faults.append((unit, error))

    def forward(self, layout: SlotLayout, batch: np.ndarray, sampling: SamplingBatch) -> StepOutput:
        """The forward step and, behind it, the sampling step."""
        program = self.programs.forward(layout)
        self.pool, self.rows, output = program(self.weights, self.stack, self.pool, self.rows, batch)
        program = self.programs.sample(layout.rows, sampling.level, layout.logprobs)
        self.rows, sampled = program(self.rows, output.logits, sampling.packed)
        output = StepOutput(sampled.tokens, sampled.logprobs, output.prompt_logprobs)
        for array in jax.tree.leaves(output):
            array.copy_to_host_async()  # behind the step, so that reading it later waits for no transfer
        return output

    def _dispatch_unit(self, flight: InFlight, unit: Unit, training: Training | None, learning_rates) -> jax.Array:
        job = self.jobs[unit.job]
        if unit.kind is UnitKind.LOSS:
            flight.fence = self.loss(job, loss_batch(self.programs.dims, training, unit.window))
            flight.losses.append((unit, flight.fence))
        elif unit.kind is UnitKind.BACKWARD:
            batch = backward_batch(self.programs.dims, training, unit.layer, unit.window)
            flight.fence = self.backward(job, unit.layer, batch, training.lean)
        else:
            flight.fence = flight.norms[unit.job] = self.update(job, learning_rates[unit.job])
        return flight.fence

    def loss(self, job: DeviceJob, batch: np.ndarray) -> jax.Array:
        program = self.programs.loss(job.shape)
        job.gradients, loss = program(self.weights, self.pool, job.gradients, batch)
        return loss

    def backward(self, job: DeviceJob, layer: int, batch: np.ndarray, lean: bool = False) -> jax.Array:
        program = (self.programs.lean_backward if lean else self.programs.backward)(job.shape)
        master = Master(job.master.a, job.master.b, None)
        job.gradients, fence = program(self.layers[layer], master, self.pool, job.gradients, batch)
        return fence

    def update(self, job: DeviceJob, learning_rate: float) -> jax.Array:
        program = self.programs.update(job.shape, job.optimizer)
        scalars = np.float32(learning_rate), np.int32(job.version.first_column)
        states = job.master, job.gradients, self.stack
        with self._lending_stack():
            job.master, job.gradients, stack, norm = program(*states, *scalars, job.ratios)
        self._take_stack(stack)
        return norm

    def add_job(
        self, name: str, shape: JobShape, optimizer: OptimizerSpec, version, master: Master, ratios: dict
    ) -> DeviceJob:
        """Give a job its arrays and publish its starting point into its version's range."""
        gradients = self.programs.zeros(gradient_shapes(self.programs.dims, shape.rank, shape.modules), "gradients")
        master = self.programs.place_master(master, shape)
        self.jobs[name] = DeviceJob(shape, optimizer, version, master, gradients, ratios)
        self.publish({"a": master.a, "b": master.b}, shape, version)
        return self.jobs[name]

    def publish(self, factors: dict, shape: JobShape, version: AdapterVersion) -> None:
        """Write adapter factors, {"a": module -> [layers, in, r], "b": ...} float32, where the version lies."""
        program, version.products = self.programs.publish(shape), products_of(shape.modules)
        with self._lending_stack():
            stack = program(self.stack, factors, np.int32(version.first_column))
        self._take_stack(stack)

    @contextmanager
    def _lending_stack(self) -> Iterator[None]:
        """Around a program that is given the stack, on the matrices of the base model. One that fails before it runs
        leaves it; one that fails on the device takes it along. Raises DeviceLost."""
        try:
            yield
        except Exception as error:
            if any(array.is_deleted() for array in jax.tree.leaves(self.stack)):
                raise DeviceLost(f"what writes adapters failed on the device and took the weights: {error}") from error
            raise

    def _take_stack(self, stack: AdapterStack) -> None:
        """What a program that wrote adapters gave back, in the memory that it was given: views of layers lie there.

        Raises:
            RuntimeError: it lies elsewhere.
        """
        self.stack, self.weights = stack, with_matrices(self.weights, stack.a)
        if self.place is not None and places(stack.a) != self.place:
            raise RuntimeError("publishing an adapter moved the frozen weights, which backward units read in place")

    def drop_job(self, name: str) -> None:
        del self.jobs[name]
