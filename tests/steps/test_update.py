"""The update = AdamW with clipping written out in float64; padding stays zero; publishing writes its own range only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexjax.models.lora import MODULES as ALL_MODULES
from flexjax.state import summed_over_shards
from flexjax.steps.update import OPTIMIZERS, OptimizerSpec
from tests.ladder import LLAMA, RANK_CAPACITY, Model, Rig, assert_trees_close, factors_in, padded

MODULES = ("q_proj", "o_proj", "down_proj")
SPEC = OptimizerSpec("adamw", weight_decay=0.1, max_grad_norm=0.5)


@pytest.fixture
def rig() -> Rig:
    """A job of rank 4 on three modules, in columns 8 to 15 of the rank axis, between two other adapters."""
    model = Model.random(LLAMA)
    rig = Rig(model)
    rig.load("before", model.factors(8, seed=1), 1.0)
    rig.begin(model.factors(4, seed=2, modules=MODULES), 1.0, spec=SPEC)
    rig.load("after", model.factors(16, seed=3), 1.0)
    return rig


def set_gradients(rig: Rig, gradients: dict) -> None:
    """As a backward pass leaves them: padded, and with an axis over shards where those are to be summed."""
    shaped = lambda name, factor, value: value[None] if summed_over_shards(name, factor) else value
    for factor, modules in padded(gradients).items():
        getattr(rig.gradients, factor).update({name: shaped(name, factor, v) for name, v in modules.items()})


class AdamW:
    """torch.nn.utils.clip_grad_norm_ and torch.optim.AdamW as their documentation has them."""

    def __init__(self, params: dict, spec: OptimizerSpec):
        self.params, self.spec, self.step = jax.tree.map(np.float64, params), spec, 0
        self.first = jax.tree.map(np.zeros_like, self.params)
        self.second = jax.tree.map(np.zeros_like, self.params)

    def update(self, gradients: dict, learning_rate: float) -> float:
        self.step += 1
        norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(gradients)))
        factor = min(1.0, self.spec.max_grad_norm / (norm + 1e-6))
        gradients = jax.tree.map(lambda g: np.float64(g) * factor, gradients)
        decayed = jax.tree.map(lambda p: p * (1 - learning_rate * self.spec.weight_decay), self.params)
        self.first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, self.first, gradients)
        self.second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, self.second, gradients)
        corrected = jax.tree.map(lambda v: np.sqrt(v / (1 - 0.999**self.step)) + 1e-8, self.second)
        size = learning_rate / (1 - 0.9**self.step)
        self.params = jax.tree.map(lambda p, m, d: p - size * m / d, decayed, self.first, corrected)
        return norm


def test_adamw_with_and_without_clipping(rig):
    """The first gradient is far above the norm to clip to, the second below it; the third step has another rate."""
    reference = AdamW(rig.model.factors(4, seed=2, modules=MODULES), SPEC)
    for seed, size, learning_rate in ((5, 1.0, 1e-2), (6, 1e-3, 1e-2), (7, 1.0, 3e-3)):
        gradients = jax.tree.map(lambda g, s=size: g * np.float32(s), rig.model.factors(4, seed, MODULES))
        set_gradients(rig, gradients)
        norm = rig.update(learning_rate)
        assert norm == pytest.approx(reference.update(gradients, learning_rate), rel=1e-5)
        assert_trees_close({"a": rig.master.a, "b": rig.master.b}, reference.params, 1e-6)
    assert not any(np.any(sums) for sums in jax.tree.leaves((rig.gradients.a, rig.gradients.b)))


def test_folded_scales_are_invisible_to_the_optimizer():
    """B is kept times a ratio of scales; weights, gradients and norm are as if it were not."""
    model = Model.random(LLAMA)
    ratios = {name: np.float32([[[0.5]], [[3.0 + index]]]) for index, name in enumerate(MODULES)}
    fold = lambda factors, power: factors | {"b": {name: b * ratios[name] ** power for name, b in factors["b"].items()}}
    plain, gradients = model.factors(4, seed=2, modules=MODULES), model.factors(4, seed=5, modules=MODULES)
    rig, reference = Rig(model), AdamW(plain, SPEC)
    rig.begin(fold(plain, 1), 1.0, spec=SPEC, ratios=ratios)
    for _ in range(2):
        set_gradients(rig, fold(gradients, -1))
        assert rig.update(1e-2) == pytest.approx(reference.update(gradients, 1e-2), rel=1e-5)
    assert_trees_close({"a": rig.master.a, "b": rig.master.b}, fold(reference.params, 1), 1e-6)


def test_publishing_writes_its_own_range_only(rig):
    before = jax.tree.map(np.array, rig.stack)
    set_gradients(rig, rig.model.factors(4, seed=5, modules=MODULES))
    rig.update(1e-2)
    others = np.delete(np.arange(RANK_CAPACITY), np.arange(8, 16))
    for name in ALL_MODULES:
        (a, b), (a_before, b_before) = (factors_in(stack, name, LLAMA) for stack in (rig.stack, before))
        np.testing.assert_array_equal(a[:, :, others], a_before[:, :, others])
        np.testing.assert_array_equal(b[:, others], b_before[:, others])
        served = a[:, :, 8:16], b[:, 8:16]
        if name in MODULES:
            np.testing.assert_array_equal(served[0], rig.master.a[name])
            np.testing.assert_array_equal(served[1], rig.master.b[name])
        else:
            assert not served[0].any() and not served[1].any()


def test_a_gradient_that_is_not_finite_leaves_the_adapter_alone(rig):
    before = jax.tree.map(np.array, (rig.master.a, rig.master.b, rig.stack))
    gradients = rig.model.factors(4, seed=5, modules=MODULES)
    gradients["b"]["o_proj"][0, 0, 0] = np.inf
    set_gradients(rig, gradients)
    assert np.isnan(rig.update(1e-2))
    jax.tree.map(np.testing.assert_array_equal, (rig.master.a, rig.master.b, rig.stack), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_linear_in_the_rate_and_leave_padding_zero(name):
    """The update takes steps at a rate of one times the rate: what optax does with that rate from the beginning."""
    options = {"adamw": {"weight_decay": 0.1}, "lion": {"weight_decay": 0.1}}
    options |= {"adafactor": {"multiply_by_parameter_scale": False}}
    transform = OptimizerSpec(name, weight_decay=0.1).transform()
    direct = getattr(optax, name)(0.03, **options.get(name, {}))
    random = np.random.default_rng(0)
    draw = lambda: jnp.float32(random.standard_normal((2, 3, 8)) * (np.arange(8) < 4))
    params = draw()
    state, direct_state = transform.init(params), direct.init(params)
    for gradients in (draw(), draw()):
        steps, state = transform.update(gradients, state, params)
        direct_steps, direct_state = direct.update(gradients, direct_state, params)
        np.testing.assert_allclose(0.03 * steps, direct_steps, rtol=1e-5)
        assert not np.any(steps[..., 4:]) and np.all(steps[..., :4] != 0)


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer is 'adamw8'; it must be one of adamw, adam, sgd"):
        OptimizerSpec("adamw8").transform()
