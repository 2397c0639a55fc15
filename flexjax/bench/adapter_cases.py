"""Cases of adapters: the gradients of one, and what many add to a frozen product."""

import functools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from flexjax.bench.device_values import device_normal
from flexjax.bench.kernel_case import Alternative, KernelCase, calls_for
from flexjax.bench.timing import compiled
from pallas_kernels import grouped_lora_grad, lora_expand
from pallas_kernels.grouped_lora import api as lora_api
from pallas_kernels.grouped_lora import cases as lora_cases
from pallas_kernels.lora_expand import api as expand_api
from pallas_kernels.lora_expand import cases as expand_cases
from pallas_kernels.lora_expand.api import plan_lora_expand

Tiles = tuple[tuple[int, int], ...]
"""(adapter, slots) of each run of slots."""


def lora_grad_case(name: str, case: lora_cases.Case, cold_bytes: float) -> KernelCase:
    """Gradients of one adapter: x, d_y and d_x move, and the smaller factors, gradients and low-rank activations."""
    wide = case.slots * (2 * case.inputs + case.outputs + (case.inputs if case.has_base else 0))
    modules = len(case.widths or (case.outputs,))
    factors = case.rank * (modules * case.inputs + case.outputs)
    moved = 2 * wide + 6 * factors + (2 * case.slots * modules * case.rank if case.keeps_h else 0)
    products = (2 if case.keeps_h else 3) * modules * case.inputs + 2 * case.outputs
    calls = calls_for(moved, cold_bytes)
    named = ", ".join(["h kept"] * case.keeps_h + ["d_x added"] * case.has_base) or "h computed"
    return KernelCase(
        name=name,
        operation="grouped_lora_grad",
        shape=f"{case.slots} slots, {case.inputs} to {case.outputs}, {modules} x rank {case.rank}, {named}",
        bytes=moved,
        flops=2 * case.slots * case.rank * products,
        calls=calls,
        prepare=functools.partial(prepare_gradients, case, calls),
        call=functools.partial(lora_grad_call, case),
        implementations=tuple(lora_api.IMPLEMENTATIONS),
        alternatives={"xla, transposed": Alternative(transposed_lora_grad)}
        if modules == 1 and not case.has_base
        else {},
        beside_reference=False,
    )


def prepare_gradients(case: lora_cases.Case, calls: int, implementation: str):
    """Arguments once for each call, in memory of their own; the state is what d_x is added to, if anything."""
    ranks = case.rank * len(case.widths or (1,))
    shapes = dict(x=(case.slots, case.inputs), d_y=(case.slots, case.outputs))
    shapes |= dict(a=(case.inputs, ranks), b=(case.rank, case.outputs))
    shapes |= dict(h=(case.slots, ranks)) if case.keeps_h else {}
    deviations = dict(a=case.inputs**-0.5, b=case.rank**-0.5)
    one = lambda: {name: device_normal(1, shapes[name], case.dtype, deviations.get(name, 1.0)) for name in shapes}
    bases = [device_normal(2, shapes["x"], case.dtype) for _ in range(calls if case.has_base else 0)]
    return bases, [one() | {"scale": jnp.float32(1.5)} for _ in range(calls)]


def lora_grad_call(case: lora_cases.Case, implementation: str):
    run = compiled(grouped_lora_grad, widths=case.widths, implementation=implementation)

    def call(bases, given, index):
        if not case.has_base:
            return bases, run(**given[index])
        d_a, d_b, d_x = run(**given[index], d_x_base=bases[index])
        return [*bases[:index], d_x, *bases[index + 1 :]], (d_a, d_b)

    return call


def transposed_lora_grad(state, given, index):
    """Sums over the slots as [rank, wide] products, where XLA may find a better kernel than for [wide, rank]."""
    x, d_y, a, b, scale = (given[index][name] for name in ("x", "d_y", "a", "b", "scale"))
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    h = given[index]["h"] if "h" in given[index] else (einsum("ti,ir->tr", x, a) * scale).astype(x.dtype)
    d_h = (einsum("to,ro->tr", d_y, b) * scale).astype(x.dtype)
    d_x = einsum("tr,ir->ti", d_h, a).astype(x.dtype)
    return state, (einsum("tr,ti->ri", d_h, x).T, einsum("tr,to->ro", h, d_y), d_x)


def expand_case(
    name: str, widths: tuple[int, ...], tiles: Tiles, cold_bytes: float, residual: bool = False
) -> KernelCase:
    """Eight resident adapters of rank 16 added to a frozen product; what moves is the product's output for slots with
    an adapter, there and back, their low-rank activations, and B of the adapters that are used. With a residual it is
    output and residual of every slot, and their sum."""
    case = expand_cases.Case(name, widths, expand_cases.EIGHT, tiles)
    slots, own = sum(count for _, count in tiles), sum(count for adapter, count in tiles if adapter)
    used, rank = len({adapter for adapter, _ in tiles if adapter}), 16
    out = sum(widths)
    moved = (6 * slots if residual else 4 * own) * out + 4 * own * len(widths) * rank + 2 * used * rank * out
    calls = calls_for(moved, cold_bytes)
    apart = Alternative(expand_then_add("mosaic_gpu", widths), comparable=False, on_gpu_only=True, engine_options=True)
    return KernelCase(
        name=name,
        operation="lora_expand",
        shape=f"{slots} slots, {own} with one of {used} adapters, {out} columns" + ", onto a residual" * residual,
        bytes=moved,
        flops=2 * own * rank * out,
        calls=calls,
        prepare=functools.partial(prepare_expand, replace(case, layers=calls), residual),
        call=functools.partial(expand_onto_call if residual else expand_call, widths=widths),
        implementations=tuple(expand_api.IMPLEMENTATIONS),
        alternatives={"lora_expand, then added": apart} if residual else {},
    )


ADAPTERS = ("indices", "owner", "scale")


def prepare_expand(case: expand_cases.Case, residual: bool, implementation: str):
    """The state is one output for each call, updated in place as a step does it."""
    made = replace(case, widths=(1,) * len(case.widths), layers=1).make(seed=0)
    given = {name: jnp.asarray(made[name]) for name in ADAPTERS}
    given["low"] = [device_normal(seed, made["low"].shape, "float32") for seed in range(case.layers)]
    out = sum(case.widths)
    given["plan"] = plan_lora_expand(*(given[name] for name in ADAPTERS), implementation=implementation)
    given["b"] = device_normal(1, (case.layers, given["owner"].size * expand_api.RANK_UNIT, out), case.dtype)
    outputs = lambda seed: [device_normal(seed, (len(given["indices"]), out), case.dtype) for _ in range(case.layers)]
    return outputs(2), given | ({"residual": outputs(3)} if residual else {})


def expand_call(implementation: str, widths: tuple[int, ...]):
    run = compiled(lora_expand, widths=widths, implementation=implementation)

    def call(outputs, given, index):
        new = run(*expand_operands(outputs, given, index), plan=given["plan"])
        return [*outputs[:index], new, *outputs[index + 1 :]], ()

    return call


def expand_operands(outputs, given, index):
    return outputs[index], given["low"][index], given["b"], np.int32(index), *(given[name] for name in ADAPTERS)


def expand_onto_call(implementation: str, widths: tuple[int, ...]):
    """The sum is an array of its own; the state stays as it was."""
    run = compiled(lora_expand, widths=widths, implementation=implementation)

    def call(outputs, given, index):
        operands = expand_operands(outputs, given, index)
        return outputs, run(*operands, residual=given["residual"][index], plan=given["plan"])

    return call


def expand_then_add(implementation: str, widths: tuple[int, ...]):
    """The same sum by two launches, the second the compiler's. What is added in place adds up over calls."""
    expand = expand_call(implementation, widths)

    def call(outputs, given, index):
        outputs, _ = expand(outputs, given, index)
        return outputs, given["residual"][index] + outputs[index]

    return call
