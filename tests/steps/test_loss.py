"""The loss of a window and the cotangent it leaves, against formulas in float64."""

import jax
import numpy as np
import pytest

from flexjax.engine.batch import loss_batch
from flexjax.finetuning.packing import pack_group
from tests.ladder import LLAMA, MICROBATCH, TAPED, Model, Rig, example


@pytest.fixture(scope="module")
def rig() -> Rig:
    """Sequences of 150 and 60 tokens, one token in three a target, after their forward pass."""
    model = Model.random(LLAMA)
    rig = Rig(model)
    rig.begin(model.factors(4, seed=7), 1.0)
    examples = [example(model.tokens(n, seed=n), (np.arange(n) % 3 == 1) & (np.arange(n) > 20)) for n in (150, 60)]
    rig.hold(0, *pack_group(examples, MICROBATCH, 0, 0))
    rig.step(TAPED, windows=rig.whole_windows(0))
    return rig


def dense_loss(model: Model, x: np.ndarray, targets: np.ndarray) -> float:
    """Sum of cross entropies at slots with a target, from final states before the norm; float64 numpy and no jax."""
    norm, head = (np.float64(model.tensors[name]) for name in ("model.norm.weight", "lm_head.weight"))
    logits = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + model.config.rms_norm_eps) * norm @ head.T
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -logprobs[np.arange(len(x)), targets][targets >= 0].sum()


@pytest.mark.parametrize("window", [0, 1])
def test_loss_and_its_slope(rig, window):
    """The cotangent by central differences, along random directions at every slot of the window."""
    packed = rig.training[0].packed
    states = np.zeros((MICROBATCH, LLAMA.hidden_size))
    for start, length in zip(packed.starts, packed.lengths, strict=True):
        tokens = packed.input_ids[start : start + length]
        states[start : start + length] = rig.model.dense.final_states(tokens, rig.model.factors(4, seed=7), 1.0)
    grid = slice(128 * window, 128 * window + 128)
    x, targets = states[grid] + 1e-30, packed.targets[grid]
    batch = loss_batch(rig.dims, rig.training[0], window)
    before = jax.tree.map(np.array, rig.gradients)
    rig.gradients, loss = rig.programs.loss(rig.job)(rig.weights, rig.pool, rig.gradients, batch)
    normaliser = 1 / packed.trained_tokens
    assert float(loss) == pytest.approx(dense_loss(rig.model, x, targets) * normaliser, rel=1e-5)
    d_x = np.float64(rig.gradients.hidden)[grid]
    direction = np.random.default_rng(0).standard_normal(x.shape)
    step = 1e-5
    for slot in np.flatnonzero(targets >= 0)[::8]:
        at = lambda moved, slot=slot: dense_loss(rig.model, moved[None], targets[slot : slot + 1])
        rise = at(x[slot] + step * direction[slot]) - at(x[slot] - step * direction[slot])
        slope = rise / (2 * step) * normaliser
        assert d_x[slot] @ direction[slot] == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert not d_x[targets < 0].any()
    other = np.delete(np.arange(MICROBATCH), np.arange(grid.start, grid.stop))
    np.testing.assert_array_equal(np.asarray(rig.gradients.hidden)[other], before.hidden[other])
    for name in ("a", "b", "d_k", "d_v"):
        jax.tree.map(np.testing.assert_array_equal, getattr(rig.gradients, name), getattr(before, name))
