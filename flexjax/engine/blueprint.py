"""Blueprint: all that a program is compiled from, and the compiled program."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PRECISION = {"float32": "highest"}
"""Per dtype of the model: float32 means float32, where a GPU would round operands to 19 bits (TF32) by default."""

KERNEL_CALLS = ("mosaic_gpu_v2",)
"""Targets of custom calls. jax does not promise that a later version knows them; whoever compiles has the same one."""


@dataclass(frozen=True)
class ProgramMemory:
    """What a program takes of a device's memory while it runs, in bytes.

    Attributes:
        alias_size_in_bytes: of arguments that it writes its results into.
        temp_size_in_bytes: beside arguments and results.
    """

    alias_size_in_bytes: int
    temp_size_in_bytes: int


@dataclass
class Compiled:
    """A program that can be called, and how long it took until it could, in seconds.

    Attributes:
        stored: it was on the disk, from an earlier run.
    """

    call: Callable
    seconds: float
    memory: ProgramMemory
    stored: bool = False

    def __call__(self, *args):
        return self.call(*args)


@dataclass(frozen=True)
class Lowered:
    """A program that only has to be compiled. It can be pickled.

    Attributes:
        exported: over those leaves of its arguments that it uses; used: their positions.
        out: its result, with numbers for arrays.
    """

    exported: export.Exported
    used: tuple[int, ...]
    out: Any

    def body(self, *arguments):
        """Body of a `Blueprint` of the same program."""
        leaves = jax.tree.leaves(arguments)
        return jax.tree.unflatten(jax.tree.structure(self.out), self.exported.call(*(leaves[i] for i in self.used)))


@dataclass(frozen=True)
class Blueprint:
    """Attributes:
    body: what is computed; shapes: of its arguments.
    specs, out_specs: how arguments and results are cut over the mesh.
    donated: positions of arguments whose memory the results take.
    partitioned: it has no collectives of its own; the compiler partitions it.
    """

    body: Callable
    shapes: tuple
    specs: Any
    out_specs: Any
    donated: tuple[int, ...]
    partitioned: bool = False

    def compile(self, mesh: Mesh, dtype, options: dict[str, Any]) -> Compiled:
        """Lower and compile ahead of time.

        Args:
            dtype: of the model; options: of the compiler.
        """
        started, body = time.perf_counter(), self.body
        if mesh.size > 1 and not self.partitioned:
            body = jax.shard_map(body, mesh=mesh, in_specs=self.specs, out_specs=self.out_specs, check_vma=False)
        placed = dict(in_shardings=shardings(mesh, self.specs), out_shardings=shardings(mesh, self.out_specs))
        jitted = jax.jit(body, donate_argnums=self.donated, **placed)
        with matmul_precision(dtype):
            call = jitted.lower(*self.shapes).compile(compiler_options=options)
        memory = call.memory_analysis()
        sizes = ProgramMemory(memory.alias_size_in_bytes, memory.temp_size_in_bytes)
        return Compiled(call, time.perf_counter() - started, sizes)

    def lowered(self, dtype, platform: str) -> Lowered:
        """For one device of a platform in jax's words, without such a device; arguments as of `compile`."""
        leaves, tree = jax.tree.flatten(self.shapes)
        results = []

        def flat(*leaves):
            arrays, structure = jax.tree.flatten(self.body(*tree.unflatten(leaves)))
            results.append(structure.unflatten(range(len(arrays))))
            return arrays

        checks = [export.DisabledSafetyCheck.custom_call(target) for target in KERNEL_CALLS]
        with matmul_precision(dtype):
            made = export.export(jax.jit(flat), platforms=(platform,), disabled_checks=checks)(*leaves)
        return Lowered(of_used_arguments(made), made.module_kept_var_idx, results[-1])


def of_used_arguments(exported: export.Exported) -> export.Exported:
    """The same without the arguments that its module left out: whoever calls it would seem to need them. Without its
    derivative too, which is a function and cannot be pickled."""
    used = exported.module_kept_var_idx
    kept = lambda values: tuple(values[i] for i in used)
    return replace(
        exported,
        in_tree=jax.tree.structure((tuple(used), {})),
        in_avals=kept(exported.in_avals),
        in_shardings_hlo=kept(exported.in_shardings_hlo),
        _in_named_shardings=kept(exported._in_named_shardings),
        module_kept_var_idx=tuple(range(len(used))),
        _get_vjp=None,
    )


def matmul_precision(dtype):
    """Context in which programs of a model in this dtype are traced."""
    return jax.default_matmul_precision(PRECISION.get(jnp.dtype(dtype).name))


def shardings(mesh: Mesh, specs):
    """The same tree with a sharding for each spec."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def is_spec(x) -> bool:
    return isinstance(x, P)
