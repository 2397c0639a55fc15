"""Every operation runs inside a shard_map body, where loops and branches must keep the mesh axes of values."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import pallas_kernels
from pallas_kernels.gated_expand import cases as gated_expand_cases
from pallas_kernels.grouped_lora import cases as grouped_lora_cases
from pallas_kernels.linear_cross_entropy import cases as linear_cross_entropy_cases
from pallas_kernels.lora_expand import cases as lora_expand_cases
from pallas_kernels.page_write import cases as page_write_cases
from pallas_kernels.paged_attention import cases as paged_attention_cases
from pallas_kernels.window_attention_grad import cases as window_attention_grad_cases

CALLS = {
    "paged_attention": (paged_attention_cases.SMALL[1], {"q", "pool"}),
    "mixed_paged_attention": (paged_attention_cases.SMALL_MIXED[0], {"q", "pool"}),
    "page_write": (page_write_cases.SMALL[0], {"pool", "rows"}),
    "window_attention_grad": (
        window_attention_grad_cases.SMALL[3],
        {"q", "out", "lse", "d_out", "pool", "d_k", "d_v"},
    ),
    "gated_expand": (gated_expand_cases.SMALL[1], {"y", "b"}),
    "lora_expand": (lora_expand_cases.SMALL[1], {"y", "b"}),
    "write_pages": (page_write_cases.SMALL_PAGES[0], {"pool", "values"}),
    "write_parts": (page_write_cases.SMALL_PARTS[0], {"pool"}),
    "grouped_lora_grad": (grouped_lora_cases.SMALL[1], {"x", "a"}),
    "linear_cross_entropy": (linear_cross_entropy_cases.SMALL[0], {"head"}),
}
"""A case of every operation, and its arguments that differ from device to device under tensor parallelism."""


@pytest.mark.parametrize("name", sorted(CALLS))
def test_runs_on_a_mesh(name):
    case, sharded = CALLS[name]
    arguments = case.make(seed=0)
    static = {key: value for key, value in arguments.items() if isinstance(value, int | float | tuple)}
    arguments = {key: value for key, value in arguments.items() if key not in static}
    operation = functools.partial(getattr(pallas_kernels, name), **static)
    mesh = jax.make_mesh((2,), ("tp",), (AxisType.Auto,), devices=jax.devices()[:2])
    of_device = lambda device: {key: arguments[key] * np.asarray(1 + device, arguments[key].dtype) for key in sharded}
    stacked = jax.tree.map(lambda *shards: np.stack(shards), of_device(0), of_device(1))

    def body(stacked, arguments):
        local = arguments | {key: value[0] for key, value in stacked.items()}
        return jax.tree.map(lambda result: result[None], operation(**local))

    specs = (PartitionSpec("tp"), PartitionSpec())
    on_mesh = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("tp")))
    replicated = {key: value for key, value in arguments.items() if key not in sharded}
    results = jax.device_get(on_mesh(stacked, replicated))
    compiled = jax.jit(operation)
    for device in range(2):
        alone = compiled(**arguments | of_device(device))
        for got, want in zip(jax.tree.leaves(results), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(got[device], want)


def test_every_public_operation_is_tried():
    """All but what only prepares a call, and what one takes."""
    functions = {name for name in pallas_kernels.__all__ if name.islower()}
    assert set(CALLS) == {name for name in functions if not name.startswith("plan_")}
