"""Two and four shards = one: logits, tokens, loss, gradients and an optimizer step on virtual CPU devices."""

import functools
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from flexjax.engine.runner import StepOutput
from flexjax.finetuning.packing import pack_group
from flexjax.layout import SlotLayout
from flexjax.models.lora import MODULES
from flexjax.request import MAX_LOGPROBS
from flexjax.steps.update import OptimizerSpec
from tests.ladder import (
    DROPOUT,
    FULL,
    LEAN,
    LLAMA,
    MICROBATCH,
    QWEN,
    ROWS,
    Model,
    Rig,
    assert_close,
    example,
    factors_in,
)

TAPES = {1: LEAN, 2: FULL, 4: LEAN}
"""Recomputed by one and four shards, read from the tape by two."""

TOLERANCE = 2e-5
"""Sums over shards are taken in another order; float32."""

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices: jax_num_cpu_devices")


@dataclass
class Results:
    """What one climb saw, whole whatever the shards.

    Attributes:
        prompts, decode: outputs of a step with two prompts beside finetuning windows, and of a decode step.
        gradients: of the loss, by factor and module.
        master, served: after one optimizer step; served by factor and module.
    """

    prompts: StepOutput
    decode: StepOutput
    loss: float
    gradients: dict
    norm: float
    master: dict
    served: dict


@functools.cache
def climb(tp: int) -> Results:
    """Serve two adapters (one of them just loaded) while training one with dropout."""
    model = Model.random(LLAMA)
    rig = Rig(model, tp=tp, tape=TAPES[tp])
    rig.begin(model.factors(rank=4, seed=7), 1.5, dropout=True, spec=OptimizerSpec(weight_decay=0.1, max_grad_norm=0.5))
    other = rig.load("other", model.factors(rank=20, seed=8), 0.5)
    rig.seat(0, row=2, tokens=model.tokens(60, seed=0), adapter=rig.version, room=8)
    rig.seat(1, row=0, tokens=model.tokens(70, seed=1), adapter=other, room=8)
    (packed,) = pack_group([example(model.tokens(180, seed=2)), example(model.tokens(30, seed=3))], MICROBATCH, 0, 0)
    rig.hold(0, packed, dropout=0.2)
    rig.step(DROPOUT, windows=[(0, 0, 0, 128)])
    prompts = rig.step(DROPOUT, prompts=[(0, 0, 60), (1, 0, 70)], windows=[(0, 0, 128, 51), (0, 1, 0, 29)])
    decode = rig.step(DROPOUT, decode=(0, 1))
    loss = rig.loss(0)
    rig.backward(0)
    gradients = rig.factor_gradients()
    norm = rig.update(0.01)
    master = jax.tree.map(np.asarray, {"a": rig.master.a, "b": rig.master.b})
    served = {name: factors_in(rig.stack, name, LLAMA, tp) for name in MODULES}
    by_factor = {factor: {name: each[index] for name, each in served.items()} for index, factor in enumerate("ab")}
    return Results(prompts, decode, loss, gradients, norm, master, by_factor)


@pytest.fixture(scope="module")
def one() -> Results:
    return climb(1)


@pytest.fixture(scope="module", params=[2, 4])
def several(request) -> Results:
    return climb(request.param)


@pytest.mark.parametrize("step", ["prompts", "decode"])
def test_logits_and_tokens(one, several, step):
    got, expected = getattr(several, step), getattr(one, step)
    sampled = [0, 2]
    np.testing.assert_array_equal(got.tokens[sampled], expected.tokens[sampled])
    for part in (0, 2):
        assert_close(got.logprobs[part][sampled], expected.logprobs[part][sampled], TOLERANCE, "log-probabilities")


def test_loss(one, several):
    assert several.loss == pytest.approx(one.loss, rel=1e-6)


@pytest.mark.parametrize("factor", ["a", "b"])
def test_gradients(one, several, factor):
    for name, expected in one.gradients[factor].items():
        assert_close(several.gradients[factor][name], expected, TOLERANCE, f"{factor} of {name}")


def test_update(one, several):
    """The first step of Adam is the sign of a gradient, so only where that is clear of rounding do masters agree."""
    assert several.norm == pytest.approx(one.norm, rel=1e-5)
    for factor, modules in one.gradients.items():
        for name, gradient in modules.items():
            clear = np.abs(gradient) > 1e-4 * np.abs(gradient).max()
            got, expected = several.master[factor][name], one.master[factor][name]
            np.testing.assert_allclose(got[clear], expected[clear], atol=1e-5)
            columns = np.s_[:, :, :8] if factor == "a" else np.s_[:, :8]
            np.testing.assert_array_equal(several.served[factor][name][columns], got)


def test_biases_are_cut_with_their_heads():
    model = Model.random(QWEN)
    rig, tokens = Rig(model, tp=2), model.tokens(100, seed=0)
    rig.seat(0, row=1, tokens=tokens)
    output = rig.step(SlotLayout(ROWS, 128, logprobs=True), prompts=[(0, 0, 100)])
    expected = np.sort(model.dense.logprobs(tokens)[-1])[::-1]
    assert_close(output.logprobs[2][1], expected[:MAX_LOGPROBS], TOLERANCE, "log-probabilities")
