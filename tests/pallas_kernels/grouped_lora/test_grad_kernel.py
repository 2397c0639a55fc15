"""The Mosaic kernel of the low-rank gradients against its closed form, in the interpreter and on a GPU."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_lora import grad_kernel
from pallas_kernels.grouped_lora.api import grouped_lora_grad
from pallas_kernels.grouped_lora.cases import Case
from pallas_kernels.grouped_lora.grad_meeting import Meeting
from pallas_kernels.grouped_lora.grad_tiling import RANK_STEP, SHARED_BYTES, GradTiling, grad_tiling, takes
from pallas_kernels.grouped_lora.grad_worker import Worker
from pallas_kernels.mosaic import INTERPRETER

implementations = pytest.mark.parametrize(
    "implementation", ["mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)

CASES = (
    Case("one module", 128, 192, 384, 16),
    Case("rank 8, fewer pieces than warpgroups", 64, 64, 64, 8, keeps_h=True),
    Case("three modules into one sum", 64, 128, 256, 16, widths=(128, 64, 64), keeps_h=True, has_base=True),
    Case("rank 32", 64, 128, 64, 32),
)
LARGER = (
    Case("rank 64", 1024, 4096, 4096, 64, keeps_h=True),
    Case("rank 128, odd number of tiles", 192, 4096, 1024, 128),
    Case("sixteen blocks a tile", 512, 4096, 6144, 16, widths=(4096, 1024, 1024), keeps_h=True),
    Case("all multiprocessors", 2048, 4096, 5120, 16, widths=(4096, 1024), keeps_h=True, has_base=True),
)


def closed_form(x, d_y, a, b, scale, widths=None, h=None, d_x_base=None):
    """In float64, module by module, rounding h and d_h to the dtype of x where the specification does."""
    wide = lambda v: np.asarray(v).astype(np.float64)
    rounded = lambda v: wide(v.astype(x.dtype))
    scale, start, rank = float(scale), 0, b.shape[0]
    d_a, d_b, d_x = np.zeros(a.shape), np.zeros(b.shape), np.zeros(x.shape)
    for module, width in enumerate(widths or b.shape[1:]):
        out, low = slice(start, start + width), slice(module * rank, (module + 1) * rank)
        d_h = rounded(scale * wide(d_y)[:, out] @ wide(b)[:, out].T)
        own_h = rounded(scale * wide(x) @ wide(a)[:, low]) if h is None else wide(h)[:, low]
        d_a[:, low], d_b[:, out] = wide(x).T @ d_h, own_h.T @ wide(d_y)[:, out]
        d_x += d_h @ wide(a)[:, low].T
        start += width
    return d_a, d_b, d_x if d_x_base is None else d_x + wide(d_x_base)


def assert_close(got, want, dtype):
    """d_a and d_b are float32 sums of the same products as the closed form's but for values of h and d_h that round
    the other way, each off by 2**-8 of itself; d_x is rounded to 8 bits, twice where there is a base."""
    d_a, d_b, d_x = want
    for sums, exact in zip(got[:2], (d_a, d_b), strict=True):
        assert sums.dtype == np.float32
        np.testing.assert_allclose(sums, exact, rtol=0, atol=2e-3 * np.abs(exact).max())
    assert got[2].dtype == dtype
    np.testing.assert_allclose(np.asarray(got[2], np.float64), d_x, rtol=0, atol=2.0**-7 * np.abs(d_x).max())


@implementations
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_its_closed_form(case, implementation, no_races):
    arguments = case.make(seed=1)
    run = jax.jit(functools.partial(grouped_lora_grad, implementation=implementation), static_argnames="widths")
    assert_close(run(**arguments), closed_form(**arguments), case.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", (*CASES, *LARGER), ids=lambda case: case.name)
@pytest.mark.parametrize("in_order", [False, True])
def test_larger_cases_and_ranks_come_out_the_same_every_time(case, in_order):
    """d_x has no sum whose order is open; d_a and d_b have none where they are added in order."""
    arguments = {"h": None, "d_x_base": None, "widths": (case.outputs,)} | case.make(seed=2)
    tiling = grad_tiling(case.slots, len(arguments["widths"]), -(-case.rank // 16) * 16)
    run = functools.partial(grad_kernel.grouped_lora_grad, in_order=in_order, tiling=tiling)
    run = jax.jit(run, static_argnames="widths")
    got, want = run(**arguments), closed_form(**arguments)
    assert_close(got, want, case.dtype)
    for _ in range(5):
        again = run(**arguments)
        for first, second in list(zip(got, again, strict=True))[0 if in_order else 2 :]:
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "tiling",
    [
        GradTiling(tokens=64, workers=2, slots=2, staged=1, shares=1),
        GradTiling(tokens=128, workers=1, slots=3, staged=2, shares=2),
        GradTiling(tokens=128, workers=2, slots=4, staged=2, shares=1, rotates=False),
        GradTiling(tokens=64, workers=1, slots=2, staged=1, shares=2, shares_rows=True),
        GradTiling(tokens=128, workers=2, slots=2, staged=1, shares=1, shares_rows=True),
    ],
    ids=str,
)
def test_every_tiling_gives_the_same(tiling, no_races):
    """Two warpgroups each, whether of one block or of two; some have more slots than pieces."""
    widths = (128, 64, 64) if tiling.shares_rows else (256,)
    arguments = {"h": None, "d_x_base": None} | Case("", 128, 320, 256, 16, widths=widths).make(seed=3)
    run = functools.partial(grad_kernel.grouped_lora_grad, tiling=tiling, interpret=INTERPRETER)
    got = jax.jit(run, static_argnames="widths")(**arguments)
    assert_close(got, closed_form(**arguments), "bfloat16")


class Alone(Meeting):
    """The interpreter has no semaphores to tell others with."""

    def tell_cleared(self):
        pass


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_first_blocks_clear_every_sum(blocks, no_races):
    """Results of interpreted kernels start as NaN. 3 and 5 pieces of 64 columns, for 2 or 6 warpgroups."""
    tiling, shape = GradTiling(tokens=64, workers=2, slots=2, staged=1), jax.ShapeDtypeStruct
    sums = (shape((1, 192, 16), np.float32), shape((1, 16, 320), np.float32))

    def body(x, b, d_a, d_b, tiles, d_b_tiles):
        block = jax.lax.axis_index("block")
        refs = SimpleNamespace(x=x, b=b, d_a_sum=d_a, d_b_sum=d_b, tiles=tiles, d_b_tiles=d_b_tiles)
        place = Alone(block, block, 0, (2, 2 * blocks), None, None)
        worker = Worker(refs, place, (320,), tiling, adding=True, adds_to_base=False, interpreted=True)
        worker.clear()
        worker.tell_cleared()

    tiles = [plgpu.SMEM((2, 1, *tile), np.float32) for tile in ((64, 16), (16, 64))]
    options = dict(grid=(blocks,), grid_names=("block",), num_threads=2, thread_name="worker", interpret=INTERPRETER)
    clear = plgpu.kernel(body, out_type=sums, scratch_types=tiles, **options)
    for zeros in jax.jit(clear)(np.zeros((64, 192), np.float32), np.zeros((16, 320), np.float32)):
        np.testing.assert_array_equal(zeros, 0)


def test_slots_without_a_cotangent_contribute_nothing(no_races):
    arguments = CASES[2].make(seed=4)
    arguments["d_y"][32:] = 0
    arguments["x"][32:] = 1e30
    run = functools.partial(grouped_lora_grad, implementation="mosaic_gpu_interpreted")
    d_a, d_b, d_x = jax.jit(run, static_argnames="widths")(**arguments)
    assert np.abs(d_a).max() < 1e3
    assert np.abs(d_b).max() < 1e3
    np.testing.assert_array_equal(d_x[32:], arguments["d_x_base"][32:])


@pytest.mark.parametrize("tokens", [64, 192, 512, 1024, 2048, 2112])
@pytest.mark.parametrize("modules", [1, 2, 3])
@pytest.mark.parametrize("rank", [16, 32, 64])
def test_tilings_fit(tokens, modules, rank):
    tiling = grad_tiling(tokens, modules, rank)
    assert tokens % tiling.tokens == rank % RANK_STEP == 0
    assert tiling.slots > tiling.staged
    assert tiling.shared_bytes(modules, rank) <= SHARED_BYTES


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(64, 16), (512, 128), (1024, 128), (2048, 128), (2112, 132), (4096, 128), (16384, 128)]
)
def test_all_blocks_run_at_once_and_fill_the_gpu(tokens, blocks):
    tiling = grad_tiling(tokens, 1, 16)
    assert tokens // tiling.tokens * tiling.shares == blocks


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 modules of rank 128 do not fit into 232448 bytes of shared memory"):
        grad_tiling(2048, 3, 128)
    assert not takes(2048, 3, 128)
    assert not takes(64, 17, 16)
    assert takes(2048, 1, 120)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("", 64, 64, 64, 8, dtype="float32"), "takes 16-bit types, not float32"),
        (Case("", 65, 64, 64, 8), "takes multiples of 64 slots, not 65"),
        (Case("", 64, 72, 64, 8), "takes multiples of 64 inputs, not 72"),
        (Case("", 64, 64, 128, 8, widths=(96, 32)), "takes multiples of 64 outputs, not 96"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(case, message):
    with pytest.raises(ValueError, match=f"grouped_lora_grad: the Mosaic GPU kernel {message}"):
        grouped_lora_grad(**case.make(seed=0), implementation="mosaic_gpu")
