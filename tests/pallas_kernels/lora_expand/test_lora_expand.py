"""The low-rank expansion against one small product per slot and module in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lora_expand
from pallas_kernels.lora_expand import kernel
from pallas_kernels.lora_expand.api import plan_lora_expand
from pallas_kernels.lora_expand.cases import SMALL, TILED
from pallas_kernels.lora_expand.items import Shape
from pallas_kernels.lora_expand.memory import shared_memory
from pallas_kernels.lora_expand.plan import RANK_UNIT
from pallas_kernels.lora_expand.tiling import MAX_RANK, PROCESSORS, Tiling, tiling_for
from pallas_kernels.mosaic import INTERPRETER

KERNEL = pytest.mark.parametrize(
    "implementation", ["mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)

CASES = {case.name: case for case in TILED}


def oracle(y, low, b, layer, indices, owner, scale, widths):
    """Every slot through the columns of its own adapter, taken out of the flat rank axis."""
    y, low, b, scale = (np.asarray(array).astype(np.float64) for array in (y, low, b, scale))
    rank, ends = 8 * len(owner), np.cumsum(widths)
    result = y.copy()
    for slot, adapter in enumerate(indices):
        columns = [8 * unit + i for unit in range(len(owner)) for i in range(8) if adapter and owner[unit] == adapter]
        for module, (end, width) in enumerate(zip(ends, widths, strict=True)):
            own = scale[adapter] * low[slot, [module * rank + column for column in columns]]
            result[slot, end - width : end] += own @ b[layer, columns, end - width : end]
    return result


def run(arguments, implementation, **options):
    arrays = {name: value for name, value in arguments.items() if name != "widths"}
    operation = functools.partial(lora_expand, widths=arguments["widths"], implementation=implementation, **options)
    return jax.jit(operation)(**arrays)


def tolerance(dtype):
    """16-bit dtypes round the up to 24 scaled values of low (near 2, each to half a unit in the last place) and the
    result; bfloat16 has 8 significant bits, float16 11."""
    bits = {"bfloat16": 8, "float16": 11, "float32": 18}[jnp.dtype(dtype).name]
    return {"rtol": 2.0 ** (1 - bits), "atol": 2.0 ** (3 - bits)}


def assert_right(result, arguments):
    assert result.dtype == arguments["y"].dtype
    np.testing.assert_allclose(np.asarray(result, np.float64), oracle(**arguments), **tolerance(result.dtype))
    idle = arguments["indices"] == 0
    assert np.asarray(result)[idle].tobytes() == np.asarray(arguments["y"])[idle].tobytes()


@pytest.mark.parametrize("case", SMALL + TILED, ids=lambda case: case.name)
def test_reference_equals_one_product_per_slot(case):
    arguments = case.make(seed=1)
    assert_right(run(arguments, "reference"), arguments)


@KERNEL
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_kernel_equals_one_product_per_slot(case, implementation, no_races):
    arguments = case.make(seed=1)
    assert_right(run(arguments, implementation), arguments)


@pytest.mark.parametrize(
    "implementation", ["reference", "mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_low_may_lie_behind_y(case, implementation, no_races):
    """As the product with A behind the frozen weights leaves it: in y's dtype, and not to be touched."""
    arguments = case.make(seed=6)
    low = arguments["low"].astype(arguments["y"].dtype)
    joined = np.concatenate([arguments["y"], low], axis=1)
    result = np.asarray(run(arguments | {"y": joined, "low": None}, implementation))
    out = sum(case.widths)
    assert_right(result[:, :out], arguments | {"low": low})
    assert result[:, out:].tobytes() == low.tobytes()


@pytest.mark.parametrize(
    "implementation", ["reference", "mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("behind", [False, True], ids=["low apart", "low behind y"])
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_a_residual_is_added_to_every_slot(case, behind, implementation, no_races):
    """To the bits that the result without one has, and once more rounded; y itself stays as it was."""
    arguments = case.make(seed=7)
    residual = np.random.default_rng(8).standard_normal(arguments["y"].shape).astype(arguments["y"].dtype)
    if behind:
        low = arguments["low"].astype(arguments["y"].dtype)
        arguments |= {"y": np.concatenate([arguments["y"], low], axis=1), "low": None}
    y = arguments["y"].copy()
    result = np.asarray(run(arguments | {"residual": residual}, implementation))
    alone = np.asarray(run(arguments, implementation))[:, : residual.shape[1]]
    expected = (residual.astype(np.float32) + alone.astype(np.float32)).astype(residual.dtype)
    assert result.dtype == residual.dtype
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(arguments["y"], y)


@pytest.mark.parametrize(
    "interpret", [pytest.param(INTERPRETER, id="interpreted"), pytest.param(None, marks=pytest.mark.gpu, id="gpu")]
)
@pytest.mark.parametrize("name", ["an odd row before tiles", "more pieces than are in flight"])
def test_a_thread_block_may_have_many_items(name, interpret, no_races):
    arguments = CASES[name].make(seed=2)
    tiling = Tiling(columns=64, ring=2, blocks=1, stages=2)
    result = kernel.lora_expand(**arguments, tiling=tiling, interpret=interpret)
    assert_right(result, arguments)
    residual = -arguments["y"]
    onto = kernel.lora_expand(**arguments, residual=residual, tiling=tiling, interpret=interpret)
    np.testing.assert_array_equal(onto, jnp.asarray(residual) + result)


@pytest.mark.parametrize(
    "implementation", ["reference", "mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)
def test_only_own_values_matter(implementation, no_races):
    """NaN in low where it is not a slot's own; signed zeros and NaN in y of slots without an adapter."""
    arguments = CASES["mixed rows, three modules"].make(seed=3)
    own = np.repeat(arguments["owner"], 8) == arguments["indices"][:, None]
    own = np.tile(own & (arguments["indices"] > 0)[:, None], len(arguments["widths"]))
    arguments["y"][arguments["indices"] == 0] = np.resize(np.array([-0.0, np.nan, 1.0], jnp.bfloat16), 256)
    arguments["scale"][0] = np.nan
    expected = oracle(**arguments | {"low": np.where(own, arguments["low"], 0), "y": np.nan_to_num(arguments["y"])})
    result = np.asarray(run(arguments | {"low": np.where(own, arguments["low"], np.nan)}, implementation))
    idle = arguments["indices"] == 0
    assert result[idle].tobytes() == arguments["y"][idle].tobytes()
    np.testing.assert_allclose(result[~idle].astype(np.float64), expected[~idle], **tolerance("bfloat16"))


@pytest.mark.parametrize("implementation", ["reference", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
def test_layers_adapters_and_owners_are_data(implementation):
    arguments = CASES["mixed rows, three modules"].make(seed=4)
    traces = []

    @jax.jit
    def product(arrays):
        traces.append(1)
        return lora_expand(**arrays, widths=arguments["widths"], implementation=implementation)

    for layer, owner in ((0, (2, 1, 1, 0, 3)), (1, (1, 1, 0, 0, 2)), (1, (3, 3, 3, 3, 3))):
        changed = arguments | {"owner": np.array(owner, np.int32), "layer": np.int32(layer)}
        assert_right(product({name: value for name, value in changed.items() if name != "widths"}), changed)
    assert len(traces) == 1


@KERNEL
def test_a_plan_serves_all_layers(implementation, no_races):
    arguments = CASES["rows without an adapter beside a tile"].make(seed=5)
    indices, owner, scale = (arguments[name] for name in ("indices", "owner", "scale"))
    plan = plan_lora_expand(indices, owner, scale, implementation=implementation)

    @jax.jit
    def layers(y, low, b, plan):
        def layer_step(y, layer):  # the adapters stand in the plan alone
            nobody = jnp.zeros_like(indices), jnp.zeros_like(owner), jnp.zeros_like(scale)
            options = {"widths": arguments["widths"], "plan": plan, "implementation": implementation}
            return lora_expand(y, low, b, layer, *nobody, **options), None

        return jax.lax.scan(layer_step, y, jnp.arange(2))[0]

    result = layers(arguments["y"], arguments["low"], arguments["b"], plan)
    first = oracle(**arguments | {"layer": 0})
    expected = oracle(**arguments | {"layer": 1, "y": first})
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, **tolerance("bfloat16"))


def test_the_reference_needs_no_plan():
    arguments = SMALL[0].make(seed=5)
    assert plan_lora_expand(*(arguments[name] for name in ("indices", "owner", "scale"))) is None


@KERNEL
@pytest.mark.parametrize("slots", [4, 8, 68])
def test_behind_products_in_a_scan(slots, implementation, no_races):
    """As in a step: the compiler makes y and low itself, pads them if slots is not a multiple of 8, and reuses their
    memory. The layer's output is the next one's input."""
    random, width, owner = np.random.default_rng(6), 64, jnp.array([2, 1, 1], jnp.int32)
    normal = lambda size, *shape: jnp.asarray(random.standard_normal(shape) * size, jnp.bfloat16)
    x, w = normal(1, slots, width), normal(1 / 8, 2, width, width)
    a, b = normal(1 / 8, 2, width, 24), normal(0.4, 2, 24, width)
    indices, scale = random.integers(0, 3, slots, np.int32), jnp.array([0, 0.5, 1.5], jnp.float32)

    @jax.jit
    def layers(x, w, a, b, indices):
        def layer_step(x, scanned):
            w, a, layer = scanned
            low = jnp.dot(x, a, preferred_element_type=jnp.float32)
            adapters = indices, owner, scale
            return lora_expand(x @ w, low, b, layer, *adapters, widths=(width,), implementation=implementation), None

        return jax.lax.scan(layer_step, x, (w, a, jnp.arange(2)))[0]

    expected = np.asarray(x, np.float64)
    for layer in range(2):
        products = (expected @ np.asarray(factor[layer], np.float64) for factor in (w, a))
        expected = oracle(*products, b, layer, indices, owner, scale, (width,))
    # Two layers round x, y and low, each near 1 to 4, to 8 bits, and sum 64 of them with weights of 1/8.
    np.testing.assert_allclose(np.asarray(layers(x, w, a, b, indices), np.float64), expected, rtol=2.0**-5, atol=0.06)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": np.zeros((4, 24), np.float32)}, r"low has shape \(4, 24\); the other arguments need \(4, 72\)"),
        (
            {"b": np.zeros((2, 16, 32), np.float32)},
            r"b has shape \(2, 16, 32\); the other arguments need \(2, 24, 32\)",
        ),
        ({"indices": np.zeros(3, np.int32)}, r"indices has shape \(3,\); the other arguments need \(4,\)"),
        ({"widths": (16, 8)}, r"widths \(16, 8\) add up to 24; y has 32 columns"),
        ({"low": None}, r"y with low behind it has shape \(4, 32\); the other arguments need \(4, 104\)"),
        ({"residual": np.zeros((4, 16), np.float32)}, r"residual has shape \(4, 16\); the other argu.* \(4, 32\)"),
        ({"implementation": "fast"}, "lora_expand: no implementation 'fast'; it has mosaic_gpu"),
        ({"implementation": "mosaic_gpu"}, "y is float32; the kernel takes bfloat16 and float16"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        lora_expand(**SMALL[2].make(seed=0) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": jnp.zeros((2, 8, 64), jnp.float16)}, "b is float16, y is bfloat16"),
        ({"residual": jnp.zeros((1, 64), jnp.float32)}, "residual is float32, y is bfloat16; the kernel takes"),
        ({"widths": (32, 32)}, r"widths \(32, 32\) are not all multiples of 64"),
        ({"low": jnp.zeros((1, 8), jnp.float16)}, "low is float16, y is bfloat16; the kernel takes y's dtype or fl"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(change, message):
    arguments = CASES["one row"].make(seed=0) | change
    if len(arguments["widths"]) == 2:
        arguments["low"] = np.zeros((1, 16), np.float32)
    with pytest.raises(ValueError, match=message):
        lora_expand(**arguments, implementation="mosaic_gpu")


def test_ranks_that_do_not_fit_into_shared_memory_are_refused():
    arguments = CASES["one row"].make(seed=0)
    arguments |= {"low": np.zeros((1, 1032), np.float32), "b": jnp.zeros((1, 1032, 64), jnp.bfloat16)}
    arguments["owner"] = np.zeros(129, np.int32)
    with pytest.raises(ValueError, match="rank axis of 1032 columns; the kernel takes up to 1024"):
        lora_expand(**arguments, implementation="mosaic_gpu")


def shared_bytes(shape, low_dtype) -> int:
    """Of a thread block: buffers each in whole KiB as Mosaic places them, 8 bytes a barrier, 1 KiB of the system."""
    memory = shared_memory(shape, jnp.bfloat16, low_dtype).values()
    barriers = sum(math.prod(each.num_barriers) for each in memory if isinstance(each, plgpu.Barrier))
    buffers = [each for each in memory if not isinstance(each, plgpu.Barrier)]
    sizes = (math.prod(each.shape) * jnp.dtype(each.dtype).itemsize for each in buffers)
    return sum(-(-size // 1024) * 1024 for size in sizes) + 8 * barriers + 1024


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "with a residual"])
@pytest.mark.parametrize("slots", [64, 2112])
@pytest.mark.parametrize("low_dtype", ["float32", "bfloat16"])
def test_every_rank_has_a_tiling_that_fits(low_dtype, slots, residual):
    """As many thread blocks as it promises are together on a multiprocessor, whose shared memory is 228 KiB."""
    for rank in range(RANK_UNIT, MAX_RANK + 1, RANK_UNIT):
        tiling = tiling_for(slots, rank, (4096,), residual)
        shape = Shape(slots, rank, (4096,), tiling, interpreted=False, residual=residual)
        assert tiling.ring >= 2
        assert tiling.blocks // PROCESSORS * shared_bytes(shape, low_dtype) <= 228 * 1024, (rank, tiling)


@pytest.mark.parametrize("rank", [8, 128, 512, MAX_RANK])
def test_a_residual_makes_narrower_items_or_fewer_at_a_time(rank):
    alone, beside = (tiling_for(2112, rank, (4096,), residual) for residual in (False, True))
    assert beside.columns * beside.blocks <= alone.columns * alone.blocks
