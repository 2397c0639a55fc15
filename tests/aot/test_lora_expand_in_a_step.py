"""The low-rank expansion inside a scan over layers, behind the product it adds to: in place, whatever the slots."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import lora_expand, mosaic
from pallas_kernels.lora_expand.api import plan_lora_expand
from tests.aot.hopper import compile_for_h100

LAYERS, WIDTH, RANK = 2, 384, 48
OPTIONS = {"xla_gpu_enable_triton_gemm": False}  # as the engine compiles

expand = functools.partial(lora_expand, widths=(WIDTH,), implementation="mosaic_gpu")


def step(x, w, a, b, indices, owner, scale):
    plan = plan_lora_expand(indices, owner, scale, implementation="mosaic_gpu")

    def layer_step(x, scanned):
        w, a, layer = scanned
        low = jnp.dot(x, a, preferred_element_type=jnp.float32)
        return x + expand(x @ w, low, b, layer, indices, owner, scale, plan=plan), None

    return jax.lax.scan(layer_step, x, (w, a, jnp.arange(LAYERS, dtype=jnp.int32)))[0]


def home_of_kernel(slots: int) -> str:
    """Heading of the computation that calls the kernel."""
    shaped = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    weights = shaped((LAYERS, WIDTH, WIDTH)), shaped((LAYERS, WIDTH, RANK)), shaped((LAYERS, RANK, WIDTH))
    adapters = shaped((slots,), jnp.int32), shaped((RANK // 8,), jnp.int32), shaped((3,), jnp.float32)
    traced_anew = lambda *arguments: step(*arguments)
    text = compile_for_h100(traced_anew, shaped((slots, WIDTH)), *weights, *adapters, options=OPTIONS).as_text()
    (home,) = [part for part in text.split("\n\n") if '"mosaic_gpu_v2"' in part]
    assert not re.search(rf"copy\(.*bf16\[{LAYERS},{RANK},{WIDTH}\]", text)
    return home.strip().splitlines()[0]


@pytest.mark.parametrize("slots", [4, 68, 64])
def test_no_slice_is_fused_into_the_kernel(slots):
    """The compiler pads products of 4 or 68 slots, so that y and low are slices."""
    assert "fusion" not in home_of_kernel(slots)


def test_the_compiler_would_fuse_slices(monkeypatch):
    """If this fails, ``mosaic.whole`` may have become unnecessary."""
    monkeypatch.setattr(mosaic, "whole", lambda *arrays: arrays)
    assert "dynamic-slice-fusion" in home_of_kernel(4)
