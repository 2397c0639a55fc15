"""Cases of gate and up: what adapters add to them and the activation of both, by one kernel or in two steps."""

import functools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from flexjax.bench.device_values import device_normal
from flexjax.bench.kernel_case import Alternative, KernelCase, calls_for
from flexjax.bench.timing import compiled
from pallas_kernels import gated_expand, plan_lora_expand
from pallas_kernels.gated_expand import api, cases

ADAPTERS = ("indices", "owner", "scale")


def gated_case(name: str, case: cases.Case, cold_bytes: float) -> KernelCase:
    """Resident adapters of rank 16; what moves is gate and up of every slot and their product, what is kept of both on
    its way back, low-rank activations of slots with an adapter, and B of the adapters that are used."""
    slots, own = (sum(count for adapter, count in case.tiles if adapter or every) for every in (True, False))
    used, rank, kept = len({adapter for adapter, _ in case.tiles if adapter}), 16, 64 * int(np.sum(case.kept))
    moved = 2 * (3 * slots + kept) * case.width + 4 * own * rank + 4 * used * rank * case.width
    calls = calls_for(moved, cold_bytes)
    return KernelCase(
        name=name,
        operation="gated_expand",
        shape=f"{slots} slots, {own} with one of {used} adapters, 2 x {case.width} columns, {kept} kept",
        bytes=moved,
        flops=4 * own * rank * case.width,
        calls=calls,
        prepare=functools.partial(prepare_gated, replace(case, layers=calls)),
        call=gated_call,
        implementations=tuple(api.IMPLEMENTATIONS),
        alternatives={"lora_expand": Alternative(gated_call("lora_expand"), comparable=False, on_gpu_only=True)},
        beside_reference=False,  # what is added in place adds up: outputs do not compare
    )


def prepare_gated(case: cases.Case, implementation: str):
    """The state is one product for each call, x A behind it, updated in place as a step does it."""
    made = replace(case, width=1, layers=1).make(seed=0)
    given = {name: jnp.asarray(made[name]) for name in (*ADAPTERS, "kept") if name in made}
    rank = given["owner"].size * api.RANK_UNIT
    given["plan"] = plan_lora_expand(*(given[name] for name in ADAPTERS), implementation=implementation)
    given["b"] = device_normal(1, (case.layers, rank, 2 * case.width), case.dtype)
    y = len(given["indices"]), 2 * (case.width + rank)
    return [device_normal(2, y, case.dtype) for _ in range(case.layers)], given


def gated_call(implementation: str):
    run = compiled(gated_expand, implementation=implementation)

    def call(products, given, index):
        adapters = (given[name] for name in ADAPTERS)
        operands = products[index], None, given["b"], np.int32(index), *adapters, given.get("kept")
        h, y = run(*operands, plan=given["plan"])
        return [*products[:index], y, *products[index + 1 :]], h

    return call
