"""Programs: the only place where steps are compiled. What is static, donated and sharded is a table one can read."""

import functools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexjax.engine.layer_views import layer_views
from flexjax.layout import SlotLayout
from flexjax.models.bits import bits_dtype
from flexjax.models.lora import MODULES, PRODUCTS, ROW_PARALLEL
from flexjax.models.matrices import matrices_of, with_matrices, with_room
from flexjax.models.sharding import TP_AXIS
from flexjax.request import SamplingLevel
from flexjax.state import (
    AdapterStack,
    Dimensions,
    Gradients,
    Master,
    RowState,
    adapter_shapes,
    gradient_shapes,
    pool_shape,
    row_shapes,
    stack_shapes,
    summed_over_shards,
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

PRECISION = {"float32": "highest"}
"""Per dtype of the model: float32 means float32, where a GPU would round operands to 19 bits (TF32) by default."""

WEIGHT_SPECS = {
    "qkv": P(None, TP_AXIS, None),
    "qkv_bias": P(None, TP_AXIS),
    "o": P(None, None, TP_AXIS),
    "gate_up": P(None, TP_AXIS, None),
    "down": P(None, None, TP_AXIS),
}
POOL_SPEC = P(None, None, None, TP_AXIS)


@dataclass(frozen=True)
class JobShape:
    """What of a finetuning job decides a program's shape.

    Attributes:
        rank: columns of the master, a multiple of 8.
    """

    rank: int
    modules: tuple[str, ...] = MODULES
    dropout: bool = False


@dataclass
class Compiled:
    """A compiled program and how long compiling took, in seconds."""

    call: Callable
    seconds: float
    memory: object

    def __call__(self, *args):
        return self.call(*args)


def looked_up(program: Callable[..., Compiled]) -> Callable[..., Compiled]:
    """A program that is there is found by its arguments alone: describing it, for which its shapes and shardings are
    made, takes the host longer than packing its batch, and once per backward unit nearly as long as the unit."""

    @functools.wraps(program)
    def lookup(self: "Programs", *arguments) -> Compiled:
        key = (program.__name__, *arguments)
        found = self.described.get(key)
        if found is None:
            found = self.described[key] = program(self, *arguments)
        return found

    return lookup


class Programs:
    """Compiles each program on first use and keeps it; `forward` layouts are compiled at start.

    Args:
        definition: graph definition of the decoder.
        weights: its state, or the shapes of it, without room for adapters.
        mesh: one axis, ``tp``.
    """

    def __init__(self, definition: nnx.GraphDef, weights: nnx.State, dims: Dimensions, kernels: Kernels, mesh: Mesh):
        self.definition, self.dims, self.kernels, self.mesh = definition, dims, kernels, mesh
        self.frozen = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), weights)
        self.weights = jax.eval_shape(self.joined, self.frozen)
        self.options = dict(COMPILER_OPTIONS[mesh.devices.flat[0].platform])
        self.compiled: dict[tuple, Compiled] = {}
        self.described: dict[tuple, Compiled] = {}
        self._levels, self._logprobs = {SamplingLevel.GREEDY}, False
        self._offering = threading.RLock()
        self._turns: dict[tuple, threading.Lock] = {}

    #            program                                  called per
    @looked_up
    def forward(self, layout: SlotLayout) -> Compiled:  # iteration
        body = functools.partial(forward, self.definition, self.dims, layout, self.kernels)
        shapes = (self.weights, stack_shapes(self.dims), pool_shape(self.dims), row_shapes(self.dims))
        batch = self._batch(forward_fields(self.dims, layout))
        specs = (weight_specs(self.weights), stack_specs(), POOL_SPEC, RowState(P(), P()), P())
        out = (POOL_SPEC, RowState(P(), P()), P())
        return self._compile(("forward", layout), body, (*shapes, batch), specs, out, donated=(2, 3))

    @looked_up
    def sample(self, rows: int, level: SamplingLevel, logprobs: bool) -> Compiled:  # iteration
        body = functools.partial(sample_rows, rows, level, logprobs)
        logits = jax.ShapeDtypeStruct((rows, self.dims.model.vocab_size), jnp.float32)
        shapes = (row_shapes(self.dims), logits, self._batch(sampling_fields(rows)))
        specs = (RowState(P(), P()), P(), P())
        return self._compile(("sample", rows, level, logprobs), body, shapes, specs, (specs[0], P()), donated=(0,))

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
    def loss(self, job: JobShape) -> Compiled:  # window of a finished forward
        body = functools.partial(loss_window, self.definition, self.dims, self.kernels)
        gradients = gradient_shapes(self.dims, job.rank, job.modules)
        shapes = (self.weights, pool_shape(self.dims), gradients, self._batch(loss_fields(self.dims)))
        specs = (weight_specs(self.weights), POOL_SPEC, gradient_specs(job.modules), P())
        return self._compile(("loss", job), body, shapes, specs, (gradient_specs(job.modules), P()), donated=(2,))

    @looked_up
    def backward(self, job: JobShape) -> Compiled:  # layer and window
        definition, stacked = self._layer_stack(self.frozen)
        body = functools.partial(backward_window, definition, self.dims, self.kernels_of(job), job.dropout)
        bits = lambda w: jax.ShapeDtypeStruct(w.shape[1:], bits_dtype(w.dtype))
        layer_specs = jax.tree.map(lambda spec: P(*spec[1:]), weight_specs(stacked), is_leaf=is_spec)
        gradients = gradient_shapes(self.dims, job.rank, job.modules)
        master = Master(**adapter_shapes(self.dims, job.rank, job.modules, jnp.float32), optimizer=None)
        state = (master, pool_shape(self.dims), gradients, self._batch(backward_fields(self.dims)))
        shapes = (jax.tree.map(bits, stacked), *state)
        master_spec = Master(**factor_specs(job.modules), optimizer=None)
        specs = (layer_specs, master_spec, POOL_SPEC, gradient_specs(job.modules), P())
        return self._compile(("backward", job), body, shapes, specs, (gradient_specs(job.modules), P()), donated=(3,))

    @looked_up
    def update(self, job: JobShape, spec: OptimizerSpec) -> Compiled:  # accumulation boundary
        body = functools.partial(update, spec, self.dims)
        factors = adapter_shapes(self.dims, job.rank, job.modules, jnp.float32)
        master = jax.eval_shape(functools.partial(new_master, spec), factors)
        gradients = gradient_shapes(self.dims, job.rank, job.modules)
        scalars = (jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))
        ratios = {name: jax.ShapeDtypeStruct((self.dims.model.num_layers, 1, 1), jnp.float32) for name in job.modules}
        shapes = (master, gradients, stack_shapes(self.dims), *scalars, ratios)
        key = ("update", job, spec)
        states = (master_specs(master, job.modules), gradient_specs(job.modules), stack_specs())
        specs = (*states, P(), P(), {name: P() for name in job.modules})
        out = (*specs[:3], P())
        return self._compile(key, body, shapes, specs, out, donated=(0, 1, 2), partitioned=True)

    @looked_up
    def publish(self, job: JobShape) -> Compiled:  # adapter loaded or handed over
        factors = adapter_shapes(self.dims, job.rank, job.modules, jnp.float32)
        shapes = (stack_shapes(self.dims), factors, jax.ShapeDtypeStruct((), jnp.int32))
        specs = (stack_specs(), factor_specs(job.modules), P())
        key = ("publish", job.rank, job.modules)
        body = functools.partial(publish, self.dims)
        return self._compile(key, body, shapes, specs, stack_specs(), donated=(0,), partitioned=True)

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
        return jax.jit(make, out_shardings=self._shardings(spec))()

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
        return jax.jit(room, out_shardings=sharding)(placed)

    def weight_shardings(self):
        return self._shardings(weight_specs(self.weights))

    def _shardings(self, specs):
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=is_spec)

    def _batch(self, fields) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((packed_words(fields),), jnp.int32)

    def _compile(self, key, body, shapes, specs, out_specs, donated, partitioned=False) -> Compiled:
        """Lower and compile ahead of time, different programs at the same time if several threads ask. ``partitioned``:
        no collectives of its own, the compiler partitions it."""
        with self._turns.setdefault(key, threading.Lock()):
            if key not in self.compiled:
                self.compiled[key] = self._built(body, shapes, specs, out_specs, donated, partitioned)
            return self.compiled[key]

    def _built(self, body, shapes, specs, out_specs, donated, partitioned) -> Compiled:
        started = time.perf_counter()
        if self.dims.tp > 1 and not partitioned:
            body = jax.shard_map(body, mesh=self.mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
        shardings = dict(in_shardings=self._shardings(specs), out_shardings=self._shardings(out_specs))
        jitted = jax.jit(body, donate_argnums=donated, **shardings)
        with jax.default_matmul_precision(PRECISION.get(jnp.dtype(self.dims.dtype).name)):
            compiled = jitted.lower(*shapes).compile(compiler_options=self.options)
        return Compiled(compiled, time.perf_counter() - started, compiled.memory_analysis())


def is_spec(x) -> bool:
    return isinstance(x, P)


def weight_specs(weights: nnx.State) -> nnx.State:
    """How each weight is cut over shards, by its name; what the table does not list is replicated."""
    return jax.tree_util.tree_map_with_path(lambda path, _: WEIGHT_SPECS.get(weight_name(path), P()), weights)


def weight_name(path) -> str:
    """Last attribute name on a state path, "qkv" for layers.qkv."""
    return [str(getattr(k, "key", "")) for k in path if isinstance(getattr(k, "key", None), str)][-1]


def factor_specs(modules=MODULES) -> dict[str, dict[str, P]]:
    """Each LoRA factor follows the backbone's sharding at its outer end and is whole at its rank end."""
    a = {name: P(None, TP_AXIS, None) if name in ROW_PARALLEL else P() for name in modules}
    b = {name: P() if name in ROW_PARALLEL else P(None, None, TP_AXIS) for name in modules}
    return {"a": a, "b": b}


def stack_specs() -> AdapterStack:
    """As the frozen matrices, and as B of a product's modules, which agree."""
    specs = factor_specs()["b"]
    b = {product: specs[modules[0]] for product, modules in PRODUCTS.items()}
    return AdapterStack(a={product: WEIGHT_SPECS[product] for product in PRODUCTS}, b=b)


def gradient_specs(modules) -> Gradients:
    partial = {
        factor: {name: P(TP_AXIS) if summed_over_shards(name, factor) else spec for name, spec in specs.items()}
        for factor, specs in factor_specs(modules).items()
    }
    return Gradients(**partial, hidden=P(), d_k=P(None, TP_AXIS, None), d_v=P(None, TP_AXIS, None))


def master_specs(master: Master, modules) -> Master:
    """Moments are sharded as the factor they belong to; counters and factored statistics are replicated."""
    specs = factor_specs(modules)
    shapes = {(f, n): getattr(master, f)[n].shape for f in ("a", "b") for n in modules}

    def moment_spec(path, leaf):
        keys = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))[-2:]
        return specs[keys[0]][keys[1]] if shapes.get(keys) == leaf.shape else P()

    return Master(**specs, optimizer=jax.tree_util.tree_map_with_path(moment_spec, master.optimizer))
