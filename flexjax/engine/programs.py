"""Programs: which steps are compiled, and what of each is static, donated and sharded, in a table one can read."""

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexjax.engine.blueprint import Blueprint, Compiled, is_spec, shardings
from flexjax.engine.layer_views import layer_views
from flexjax.engine.lowering import LoweringProcesses
from flexjax.engine.program_store import ProgramStore
from flexjax.engine.specs import (
    POOL_SPEC,
    WEIGHT_SPECS,
    factor_specs,
    gradient_specs,
    master_specs,
    stack_specs,
    weight_specs,
)
from flexjax.layout import SlotLayout
from flexjax.models.bits import bits_dtype
from flexjax.models.lora import MODULES, PRODUCTS
from flexjax.models.matrices import matrices_of, with_matrices, with_room
from flexjax.request import SamplingLevel
from flexjax.state import (
    AdapterStack,
    Dimensions,
    Master,
    RowState,
    adapter_shapes,
    gradient_shapes,
    pool_shape,
    row_shapes,
    stack_shapes,
)
from flexjax.step_batch import backward_fields, forward_fields, loss_fields, packed_words, sampling_fields
from flexjax.steps.backward import backward_window
from flexjax.steps.forward import forward
from flexjax.steps.kernels import Kernels
from flexjax.steps.loss import loss_window
from flexjax.steps.row_sampling import sample_rows
from flexjax.steps.update import OptimizerSpec, new_master, publish, update

COMPILER_OPTIONS = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_disable_hlo_passes": "rematerialization"},
    "cpu": {},
}
"""Per platform. With Triton products a scan over stacked weights copies every layer's slice on the GPU. XLA's own
rematerialization counts the pool once for every kernel that writes into it, believes memory exhausted, and then
computes the large products of a step with a tape three times."""

WITH_KERNELS = ("forward", "loss", "backward", "lean_backward", "update", "_publish")
"""Programs that take long to lower. The others are small, and some are made of functions that have no name."""


@dataclass(frozen=True)
class JobShape:
    """What of a finetuning job decides a program's shape.

    Attributes:
        rank: columns of the master, a multiple of 8.
    """

    rank: int
    modules: tuple[str, ...] = MODULES
    dropout: bool = False


def looked_up(blueprint: Callable[..., Blueprint]) -> Callable[..., Compiled]:
    """A program that is there is found by its arguments alone: describing it, for which its shapes and shardings are
    made, takes the host longer than packing its batch, and once per backward unit nearly as long as the unit."""

    @functools.wraps(blueprint)
    def lookup(self: "Programs", *arguments) -> Compiled:
        key = (blueprint.__name__, *arguments)
        found = self.compiled.get(key)
        return self._looked_up(key, lambda: blueprint(self, *arguments)) if found is None else found

    return lookup


class Programs:
    """Compiles each program on first use and keeps it; `forward` layouts are compiled at start.

    Args:
        definition: graph definition of the decoder.
        weights: its state, or the shapes of it, without room for adapters.
        mesh: one axis, ``tp``.
        folder: where compiled programs are kept between runs; None: nowhere.
        lowering: processes that lower; None: this one lowers everything.
    """

    def __init__(
        self,
        definition: nnx.GraphDef,
        weights: nnx.State,
        dims: Dimensions,
        kernels: Kernels,
        mesh: Mesh,
        folder: Path | None = None,
        lowering: LoweringProcesses | None = None,
    ):
        self.definition, self.dims, self.kernels, self.mesh = definition, dims, kernels, mesh
        self.frozen = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), weights)
        self.weights = jax.eval_shape(self.joined, self.frozen)
        self.options = dict(COMPILER_OPTIONS[mesh.devices.flat[0].platform])
        self.compiled: dict[tuple, Compiled] = {}
        self._store = None if folder is None else ProgramStore(folder, mesh)
        self._measured = {} if self._store is None else self._store.measured()
        self.lowering = lowering or LoweringProcesses(mesh.devices.flat[0].platform, 0)
        self._levels, self._logprobs = {SamplingLevel.GREEDY}, False
        self._offering = threading.RLock()
        self._turns: dict[tuple, threading.Lock] = {}

    #            program                                  called per
    @looked_up
    def forward(self, layout: SlotLayout) -> Blueprint:  # iteration
        body = functools.partial(forward, self.definition, self.dims, layout, self.kernels)
        shapes = (self.weights, stack_shapes(self.dims), pool_shape(self.dims), row_shapes(self.dims))
        batch = self._batch(forward_fields(self.dims, layout))
        specs = (weight_specs(self.weights), stack_specs(), POOL_SPEC, RowState(P(), P()), P())
        out = (POOL_SPEC, RowState(P(), P()), P())
        return Blueprint(body, (*shapes, batch), specs, out, donated=(2, 3))

    @looked_up
    def sample(self, rows: int, level: SamplingLevel, logprobs: bool) -> Blueprint:  # iteration
        body = functools.partial(sample_rows, rows, level, logprobs)
        logits = jax.ShapeDtypeStruct((rows, self.dims.model.vocab_size), jnp.float32)
        shapes = (row_shapes(self.dims), logits, self._batch(sampling_fields(rows)))
        specs = (RowState(P(), P()), P(), P())
        return Blueprint(body, shapes, specs, (specs[0], P()), donated=(0,))

    def offer_sampling(self, row_sizes: Iterable[int], level: SamplingLevel, logprobs: bool) -> None:
        """Compile what batches need that hold a request of this level, alone and mixed with all that came before.

        Called for every request: what is there already waits neither for a lock nor for a job that is being compiled.
        """
        if level in self._levels and self._logprobs >= logprobs:
            return
        with self._offering:
            levels, logprobs = self._levels | {level}, self._logprobs or logprobs
            for each in levels:
                for rows in row_sizes:
                    self.sample(rows, each, False)
                if logprobs:
                    self.sample(max(row_sizes), each, True)
            self._levels, self._logprobs = levels, logprobs

    @looked_up
    def loss(self, job: JobShape) -> Blueprint:  # window of a finished forward
        body = functools.partial(loss_window, self.definition, self.dims, self.kernels)
        gradients = gradient_shapes(self.dims, job.rank, job.modules)
        shapes = (self.weights, pool_shape(self.dims), gradients, self._batch(loss_fields(self.dims)))
        specs = (weight_specs(self.weights), POOL_SPEC, gradient_specs(job.modules), P())
        return Blueprint(body, shapes, specs, (gradient_specs(job.modules), P()), donated=(2,))

    @looked_up
    def backward(self, job: JobShape) -> Blueprint:  # layer and window
        return self._backward(job, self.dims)

    @looked_up
    def lean_backward(self, job: JobShape) -> Blueprint:  # the same, of a lean tape
        return self._backward(job, self.dims.lean)

    def _backward(self, job: JobShape, dims: Dimensions) -> Blueprint:
        definition, stacked = self._layer_stack(self.frozen)
        body = functools.partial(backward_window, definition, dims, self.kernels_of(job), job.dropout)
        bits = lambda w: jax.ShapeDtypeStruct(w.shape[1:], bits_dtype(w.dtype))
        layer_specs = jax.tree.map(lambda spec: P(*spec[1:]), weight_specs(stacked), is_leaf=is_spec)
        gradients = gradient_shapes(self.dims, job.rank, job.modules)
        master = Master(**adapter_shapes(self.dims, job.rank, job.modules, jnp.float32), optimizer=None)
        state = (master, pool_shape(dims), gradients, self._batch(backward_fields(dims)))
        shapes = (jax.tree.map(bits, stacked), *state)
        master_spec = Master(**factor_specs(job.modules), optimizer=None)
        specs = (layer_specs, master_spec, POOL_SPEC, gradient_specs(job.modules), P())
        return Blueprint(body, shapes, specs, (gradient_specs(job.modules), P()), donated=(3,))

    @looked_up
    def update(self, job: JobShape, spec: OptimizerSpec) -> Blueprint:  # accumulation boundary
        body = functools.partial(update, spec, self.dims)
        factors = adapter_shapes(self.dims, job.rank, job.modules, jnp.float32)
        master = jax.eval_shape(functools.partial(new_master, spec), factors)
        gradients = gradient_shapes(self.dims, job.rank, job.modules)
        scalars = (jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))
        ratios = {name: jax.ShapeDtypeStruct((self.dims.model.num_layers, 1, 1), jnp.float32) for name in job.modules}
        shapes = (master, gradients, stack_shapes(self.dims), *scalars, ratios)
        states = (master_specs(master, job.modules), gradient_specs(job.modules), stack_specs())
        specs = (*states, P(), P(), {name: P() for name in job.modules})
        out = (*specs[:3], P())
        return Blueprint(body, shapes, specs, out, donated=(0, 1, 2), partitioned=True)

    def publish(self, job: JobShape) -> Compiled:  # adapter loaded or handed over
        return self._publish(job.rank, job.modules)

    @looked_up
    def _publish(self, rank: int, modules: tuple[str, ...]) -> Blueprint:
        factors = adapter_shapes(self.dims, rank, modules, jnp.float32)
        shapes = (stack_shapes(self.dims), factors, jax.ShapeDtypeStruct((), jnp.int32))
        specs = (stack_specs(), factor_specs(modules), P())
        body = functools.partial(publish, self.dims)
        return Blueprint(body, shapes, specs, stack_specs(), donated=(0,), partitioned=True)

    def blueprint(self, key: tuple) -> Blueprint:
        """What a program is compiled from: its name, and its arguments."""
        name, *arguments = key
        return getattr(type(self), name).__wrapped__(self, *arguments)

    def kernels_of(self, job: JobShape) -> Kernels:
        return self.kernels.for_job(job.rank, self.dims.window)

    def layer_views(self, weights: nnx.State) -> list[nnx.State]:
        """The weights of every layer as `backward` takes them, without adapters, in the memory of the stacked ones."""
        _, stacked = self._layer_stack(weights)
        leaves, tree = jax.tree.flatten(stacked)
        shardings = jax.tree.leaves(self._shardings(weight_specs(stacked)))
        shapes = jax.tree.leaves(self._layer_stack(self.frozen)[1])
        parts = zip(leaves, shardings, shapes, strict=True)
        views = [layer_views(leaf, sharding, frozen.shape[1]) for leaf, sharding, frozen in parts]
        return [tree.unflatten(layer) for layer in zip(*views, strict=True)]

    def joined(self, weights: nnx.State) -> nnx.State:
        """The weights with room for adapters behind the matrices of products."""
        room = lambda name, matrix: with_room(name, matrix, self.dims.rank_capacity, self.dims.tp)
        return with_matrices(weights, {name: room(name, matrix) for name, matrix in matrices_of(weights).items()})

    def new_stack(self, weights: nnx.State) -> AdapterStack:
        """Of no adapters yet, on the matrices of these weights, made by `joined`."""
        return AdapterStack(a=matrices_of(weights), b=self.zeros(stack_shapes(self.dims).b, "stack"))

    def _layer_stack(self, weights: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.merge(self.definition, weights).layer_stack()

    def zeros(self, shapes, kind: str):
        """Zeroed arrays of these shapes, made where they live. ``kind``: "pool", "rows", "stack" or "gradients"."""
        specs = {"pool": lambda: POOL_SPEC, "rows": lambda: RowState(P(), P()), "stack": lambda: stack_specs().b}
        spec = gradient_specs(tuple(shapes.a)) if kind == "gradients" else specs[kind]()
        make = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        sizes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(shapes))
        return self._looked_up(("zeros", kind, sizes), lambda: Blueprint(make, (), (), spec, (), partitioned=True))()

    def place_master(self, master: Master, job: JobShape) -> Master:
        return jax.device_put(master, self._shardings(master_specs(master, job.modules)))

    def place_factors(self, factors: dict, job: JobShape) -> dict:
        return jax.device_put(factors, self._shardings(factor_specs(job.modules)))

    def place_weight(self, name: str, value) -> jax.Array:
        """One loaded weight ("layers.qkv") on its device or devices, with room for adapters."""
        product = name.rpartition(".")[2]
        sharding = NamedSharding(self.mesh, WEIGHT_SPECS.get(product, P()))
        placed = jax.device_put(value, sharding)
        if product not in PRODUCTS:
            return placed
        room = functools.partial(with_room, product, rank=self.dims.rank_capacity, tp=self.dims.tp)
        shape, spec = jax.ShapeDtypeStruct(placed.shape, placed.dtype), WEIGHT_SPECS[product]
        blueprint = lambda: Blueprint(room, (shape,), (spec,), spec, (), partitioned=True)
        return self._looked_up(("room", product, shape.shape), blueprint)(placed)

    def weight_shardings(self):
        return self._shardings(weight_specs(self.weights))

    def _shardings(self, specs):
        return shardings(self.mesh, specs)

    def _batch(self, fields) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((packed_words(fields),), jnp.int32)

    def _looked_up(self, key: tuple, describe: Callable[[], Blueprint]) -> Compiled:
        """Threads that ask for the same program wait for the first of them; different ones compile at the same time."""
        with self._turns.setdefault(key, threading.Lock()):
            if key not in self.compiled:
                self.compiled[key] = self._made(key, describe())
            return self.compiled[key]

    def _made(self, key: tuple, blueprint: Blueprint) -> Compiled:
        """From the disk, or compiled."""
        settings = self.dims, self.kernels, self.options
        found = None if self._store is None else self._store.load(key, blueprint, settings)
        if found is not None:
            return found
        made = self._lowered(key, blueprint).compile(self.mesh, self.dims.dtype, self.options | self._measured)
        if self._store is not None:
            self._store.keep(key, blueprint, settings, made)
        return made

    def _lowered(self, key: tuple, blueprint: Blueprint) -> Blueprint:
        """The same program, with most of what is left to do done by another process, if there is one."""
        if key[0] not in WITH_KERNELS:
            return blueprint
        body = self.lowering.lowered(self.definition, self.frozen, self.dims, self.kernels, key)
        return blueprint if body is None else replace(blueprint, body=body)
