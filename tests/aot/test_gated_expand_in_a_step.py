"""The gated expansion inside a scan over layers, between the product it adds to and a tape's pages: y in place, read by
the pages afterwards, whatever the slots."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import gated_expand, plan_lora_expand, write_pages
from tests.aot.hopper import compile_for_h100
from tests.aot.program_text import forgotten_results, moved

LAYERS, WIDTH, HIDDEN, RANK, PAGES = 2, 384, 320, 48, 40
OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_disable_hlo_passes": "rematerialization"}  # as the engine compiles

expand = functools.partial(gated_expand, implementation="mosaic_gpu")
write = functools.partial(write_pages, implementation="mosaic_gpu", columns=2 * WIDTH)


def step(first_row, pool, x, matrix, b, down, indices, owner, scale, pages):
    """One page of 384 values for gate and one for up."""
    plan = plan_lora_expand(indices, owner, scale, implementation="mosaic_gpu")
    kept = jnp.pad(pages >= 0, ((-(-first_row // 64), 0), (0, 0)))

    def layer_step(carry, _):
        pool, x, layer = carry
        of_layer = lambda stacked: jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)
        y = jnp.dot(x, of_layer(matrix))
        h, y = expand(y, None, b, layer, indices, owner, scale, kept, plan=plan)
        pool = write(pool, layer, y, pages, first_row=first_row)
        return (pool, x + jnp.dot(h, of_layer(down)), layer + 1), None

    return jax.lax.scan(layer_step, (pool, x, jnp.int32(0)), length=LAYERS)[0][:2]


@pytest.mark.parametrize("first_row", [4, 64, 70])
def test_gate_and_up_stay_where_the_product_left_them(first_row):
    slots, shaped = first_row + 128, lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    words = functools.partial(shaped, dtype=jnp.int32)
    arguments = (
        *(shaped((LAYERS, PAGES, 64, WIDTH)), shaped((slots, HIDDEN))),
        *(shaped((LAYERS, HIDDEN, 2 * WIDTH + 2 * RANK)), shaped((LAYERS, RANK, 2 * WIDTH))),
        *(shaped((LAYERS, WIDTH, HIDDEN)), words((slots,)), words((RANK // 8,)), shaped((3,), jnp.float32)),
        words((2, 2)),
    )
    traced = functools.partial(step, first_row)
    text = compile_for_h100(traced, *arguments, donate=(0,), options=OPTIONS).as_text()
    calls = [line for line in text.splitlines() if "mosaic_gpu_v2" in line and f"bf16[{slots},{WIDTH}]" in line]
    assert len(calls) == 1 and "output_to_operand_aliasing" in calls[0]
    assert forgotten_results(text) == []
    assert not re.search(rf"= bf16\[{slots},{2 * (WIDTH + RANK)}\]\S* copy\(", text)
    assert moved(text, [(LAYERS, PAGES, 64, WIDTH)]) == []
