"""The gated expansion against one small product per slot and module in float64, and against the compiler's order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_expand, plan_lora_expand
from pallas_kernels.gated_expand import compute, kernel
from pallas_kernels.gated_expand.cases import BOTH, GATE, SMALL, TILED, UP, Case
from pallas_kernels.gated_expand.tiling import Tiling
from pallas_kernels.mosaic import INTERPRETER

ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("mosaic_gpu", "lora_expand")]
KERNEL = pytest.mark.parametrize("implementation", ["mosaic_gpu_interpreted", *ON_GPU])
EACH = pytest.mark.parametrize("implementation", ["reference", "mosaic_gpu_interpreted", *ON_GPU])
INTERPRETED_BOTH = "mosaic_gpu_interpreted", "lora_expand_interpreted"
plan_of = functools.partial(plan_lora_expand, implementation="mosaic_gpu")
INTERPRETED = pytest.mark.parametrize(
    "interpret", [pytest.param(INTERPRETER, id="interpreted"), pytest.param(None, marks=pytest.mark.gpu, id="gpu")]
)

CASES = {case.name: case for case in TILED}
TILES, PIECES = "an odd row before tiles", "more pieces than are in flight"
NARROW = Tiling(columns=64, part=32, stages=2, ring=2, b_places=1, blocks=1)
CUTS = {
    "one place for B, two workers": NARROW,
    "two places for B": Tiling(columns=64, part=32, stages=3, ring=2, b_places=2, blocks=1),
    "one worker": Tiling(columns=32, part=32, stages=2, ring=3, b_places=2, blocks=2),
    "wide parts": Tiling(columns=64, part=64, stages=2, ring=2, b_places=1, blocks=1),
}


def expanded(y, low, b, layer, indices, owner, scale, kept=None):
    """Gate and up in float64, every slot through the columns of its own adapter, taken out of the flat rank axis."""
    y, low, b, scale = (np.asarray(array).astype(np.float64) for array in (y, low, b, scale))
    rank, width = 8 * len(owner), y.shape[1] // 2
    result = y.copy()
    for slot, adapter in enumerate(indices):
        columns = [8 * unit + i for unit in range(len(owner)) for i in range(8) if adapter and owner[unit] == adapter]
        for module in range(2):
            of_module = slice(module * width, (module + 1) * width)
            own = scale[adapter] * low[slot, [module * rank + column for column in columns]]
            result[slot, of_module] += own @ b[layer, columns, of_module]
    return result


def gated(gate_up):
    gate, up = np.split(gate_up, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def run(arguments, implementation):
    return jax.jit(functools.partial(gated_expand, implementation=implementation))(**arguments)


def error(dtype):
    """16-bit dtypes round the up to 24 scaled values of low (near 2, each to half a unit in the last place), gate and
    up (near 3), and each step of silu; bfloat16 has 8 significant bits, float16 11."""
    bits = {"bfloat16": 8, "float16": 11, "float32": 18}[jnp.dtype(dtype).name]
    return {"rtol": 2.0 ** (1 - bits), "atol": 2.0 ** (3 - bits)}


def kept_of(arguments):
    """What of y is wanted, a mask of its shape: tiles end where the slots end."""
    slots, width = len(arguments["indices"]), arguments["y"].shape[1] // 2
    kept = arguments.get("kept")
    kept = np.zeros((slots, 2), bool) if kept is None else np.repeat(kept, 64, axis=0)[-slots:]
    return np.repeat(kept, width, axis=1)


def assert_right(result, arguments):
    h, y = (np.asarray(each) for each in result)
    assert h.dtype == y.dtype == arguments["y"].dtype
    exact, kept, idle = expanded(**arguments), kept_of(arguments), arguments["indices"] == 0
    np.testing.assert_allclose(y[kept].astype(np.float64), exact[kept], **error(y.dtype))
    unchanged = kept & idle[:, None]
    np.testing.assert_array_equal(y[unchanged], np.asarray(arguments["y"])[unchanged])
    # An error of gate or up comes into h times the other, up to 6.
    loose = {name: 4 * bound for name, bound in error(y.dtype).items()}
    np.testing.assert_allclose(h.astype(np.float64), gated(exact), **loose)
    whole = kept.all(axis=1)
    assert_near(h[whole], step_by_step(*np.split(y[whole], 2, axis=1)))


def step_by_step(gate, up):
    """silu(gate) * up, each step rounded to the dtype."""
    with np.errstate(all="ignore"):
        sigmoid = (1 / (np.exp(-gate) + np.ones_like(gate)).astype(np.float32)).astype(gate.dtype)
        return gate * sigmoid * up


def assert_near(h, expected):
    """Six roundings apart at most: a CPU's compiler leaves some of them out, and a GPU's exp has an error."""
    rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-20}[expected.dtype.name]
    np.testing.assert_allclose(h.astype(np.float32), expected.astype(np.float32), rtol=6 * rounding, atol=1e-6)


@pytest.mark.parametrize("case", SMALL + TILED, ids=lambda case: case.name)
def test_reference_equals_one_product_per_slot(case):
    arguments = case.make(seed=1)
    assert_right(run(arguments, "reference"), arguments)


@KERNEL
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_kernel_equals_one_product_per_slot(case, implementation, no_races):
    arguments = case.make(seed=1)
    assert_right(run(arguments, implementation), arguments)


@pytest.mark.parametrize("implementation", ["reference", *INTERPRETED_BOTH, *ON_GPU])
@pytest.mark.parametrize("name", [TILES, PIECES])
def test_low_may_lie_behind_y(name, implementation, no_races):
    """As the product with A behind the frozen weights leaves it: in y's dtype, and not to be touched."""
    case, arguments = CASES[name], CASES[name].make(seed=6)
    low = arguments["low"].astype(arguments["y"].dtype)
    joined = np.concatenate([arguments["y"], low], axis=1)
    h, y = run(arguments | {"y": joined, "low": None}, implementation)
    assert_right((h, y[:, : 2 * case.width]), arguments | {"low": low})
    assert np.asarray(y)[:, 2 * case.width :].tobytes() == low.tobytes()


@INTERPRETED
@pytest.mark.parametrize(("name", "cut"), [*((TILES, cut) for cut in CUTS), *((PIECES, cut) for cut in list(CUTS)[:2])])
def test_a_thread_block_may_have_many_items(name, cut, interpret, no_races):
    arguments = CASES[name].make(seed=2)
    arguments = {"kept": None, **arguments}
    assert_right(kernel.gated_expand(**arguments, tiling=CUTS[cut], interpret=interpret), arguments)


@EACH
def test_only_own_values_matter(implementation, no_races):
    """NaN in low where it is not a slot's own; zeros, infinities and NaN in y of slots without an adapter."""
    arguments = CASES["mixed rows"].make(seed=3)
    own = np.repeat(arguments["owner"], 8) == arguments["indices"][:, None]
    own = np.tile(own & (arguments["indices"] > 0)[:, None], 2)
    idle = arguments["indices"] == 0
    odd = np.array([-0.0, np.nan, 1.0, np.inf, -200.0, -3.0e38], jnp.bfloat16)
    arguments["y"][idle] = np.resize(odd, arguments["y"].shape[1])
    arguments["scale"][0] = np.nan
    poisoned = arguments | {"low": np.where(own, arguments["low"], np.nan)}
    h, y = (np.asarray(each) for each in run(poisoned, implementation))
    np.testing.assert_array_equal(y[idle].astype(np.float32), arguments["y"][idle].astype(np.float32))
    assert_near(h[idle], step_by_step(*np.split(arguments["y"][idle], 2, axis=1)))
    only = {name: arguments[name][~idle] for name in ("y", "indices")}
    only |= {"low": np.where(own, arguments["low"], 0)[~idle]}
    assert_right((h[~idle], y[~idle]), arguments | only)


GATES = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16).reshape(64, 1024)
"""Every bfloat16 once."""


@EACH
def test_silu_of_every_gate(implementation, no_races):
    case = Case("every gate", 1024, (1,), ((0, 64),))
    h, _ = run(case.make(seed=0) | {"y": np.concatenate([GATES, np.ones_like(GATES)], axis=1)}, implementation)
    assert_near(np.asarray(h), step_by_step(GATES, np.ones_like(GATES)))


def test_the_kernel_rounds_where_the_compiler_does():
    """Operation by operation, of every gate: the square of a reciprocal root rounds as the quotient. (A CPU
    takes numbers below 2^-126 for 0.)"""
    up = np.resize(np.array([1.0, -0.7, 3.0], jnp.bfloat16), GATES.shape)
    got = np.asarray(compute.gated(jnp.asarray(GATES), jnp.asarray(up))).astype(np.float32)
    expected = step_by_step(GATES, up).astype(np.float32)
    normal = ~(np.abs(expected) < 2.0**-110)
    np.testing.assert_array_equal(got[normal], expected[normal])


@KERNEL
def test_where_nothing_is_kept_only_h_is_promised(implementation, no_races):
    arguments = CASES[TILES].make(seed=7)
    del arguments["kept"]
    assert_right(run(arguments, implementation), arguments)


@pytest.mark.parametrize("implementation", [*INTERPRETED_BOTH, *ON_GPU])
def test_a_plan_is_used(implementation, no_races):
    """One made of other scales, without which the kernel would make one of the scales it is given."""
    arguments = CASES["mixed rows"].make(seed=5)
    doubled = arguments | {"scale": 2 * arguments["scale"]}
    plan = plan_of(*(doubled[name] for name in ("indices", "owner", "scale")))
    assert_right(run(arguments | {"plan": plan}, implementation), doubled)


@pytest.mark.parametrize("implementation", ["reference", *ON_GPU])
def test_layers_adapters_and_owners_are_data(implementation):
    arguments = CASES["mixed rows"].make(seed=4)
    traces = []

    @jax.jit
    def product(arrays):
        traces.append(1)
        return gated_expand(**arrays, implementation=implementation)

    for layer, owner, kept in ((0, (2, 1, 1, 0, 3), BOTH), (1, (1, 1, 0, 0, 2), UP), (1, (3, 3, 3, 3, 3), GATE)):
        changed = {"owner": np.array(owner, np.int32), "layer": np.int32(layer), "kept": np.array([kept], bool)}
        assert_right(product(arguments | changed), arguments | changed)
    assert len(traces) == 1


@KERNEL
@pytest.mark.parametrize("slots", [4, 8, 68])
def test_behind_products_in_a_scan(slots, implementation, no_races):
    """As in a step: the compiler makes y itself, low behind it, pads it if slots is not a multiple of 8, and reuses its
    memory; one plan serves all layers, and kept gate and up are read afterwards. The layer's output is the next one's
    input."""
    random, width, owner = np.random.default_rng(6), 64, jnp.array([2, 1, 1], jnp.int32)
    normal = lambda size, *shape: jnp.asarray(random.standard_normal(shape) * size, jnp.bfloat16)
    x, w, b = normal(1, slots, width), normal(1 / 16, 2, width, 2 * width + 48), normal(0.4, 2, 24, 2 * width)
    indices, scale = random.integers(0, 3, slots, np.int32), jnp.array([0, 0.5, 1.5], jnp.float32)
    kept = jnp.tile(jnp.array([True, False]), (-(-slots // 64), 1))

    @jax.jit
    def layers(x, w, b, indices):
        plan = plan_of(indices, owner, scale)

        def layer_step(x, scanned):
            w, layer = scanned
            adapters = indices, owner, scale, kept
            h, y = gated_expand(x @ w, None, b, layer, *adapters, plan=plan, implementation=implementation)
            return h + y[:, :width] * 0.5, None

        return jax.lax.scan(layer_step, x, (w, jnp.arange(2)))[0]

    expected = np.asarray(x, np.float64)
    for layer in range(2):
        y, low = np.split(expected @ np.asarray(w[layer], np.float64), [2 * width], axis=1)
        gate_up = expanded(y, low, b, layer, indices, owner, scale)
        expected = gated(gate_up) + gate_up[:, :width] * 0.5
    # Two layers round x, y, low and h, each below 4, to 8 bits, and sum 64 of them with weights of 1/16.
    got = np.asarray(layers(x, w, b, indices), np.float64)
    np.testing.assert_allclose(got, expected, rtol=2.0**-5, atol=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": np.zeros((4, 24), np.float32)}, r"low has shape \(4, 24\); the other arguments need \(4, 48\)"),
        ({"b": np.zeros((2, 16, 32), np.float32)}, r"b has shape \(2, 16, 32\); the other arguments need \(2, 24"),
        ({"b": np.zeros((2, 24, 33), np.float32)}, "b has 33 columns, which are not gate and up of one width"),
        ({"indices": np.zeros(3, np.int32)}, r"indices has shape \(3,\); the other arguments need \(4,\)"),
        ({"kept": np.zeros(1, bool)}, r"kept has shape \(1,\); the other arguments need \(1, 2\)"),
        ({"y": np.zeros((4, 40), np.float32)}, r"y has shape \(4, 40\); the other arguments need \(4, 32\)"),
        ({"low": None}, r"y with low behind it has shape \(4, 32\); the other arguments need \(4, 80\)"),
        ({"implementation": "fast"}, "gated_expand: no implementation 'fast'; it has lora_expand, "),
        ({"implementation": "mosaic_gpu"}, "y is float32; the kernel takes bfloat16 and float16"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gated_expand(**SMALL[2].make(seed=0) | change)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (TILED[0], {"b": jnp.zeros((2, 8, 128), jnp.float16)}, "b is float16, y is bfloat16"),
        (TILED[0], {"low": jnp.zeros((1, 16), jnp.float16)}, "low is float16, y is bfloat16; the kernel takes"),
        (SMALL[0], {}, "a width of 40; the kernel takes multiples of 64"),
        (Case("high", 64, (1,) * 129, ((1, 1),)), {}, "rank axis of 1032 columns; the kernel takes up to 1024"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(case, change, message):
    with pytest.raises(ValueError, match=message):
        gated_expand(**case.make(seed=0) | change, implementation="mosaic_gpu")
