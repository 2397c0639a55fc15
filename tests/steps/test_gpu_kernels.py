"""The steps with the GPU's kernels, together, are as near to float64 as with the references, at head sizes that the
kernels take: prompts, decode rows, two adapters in one batch, and the gradients of packed sequences."""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.finetuning.packing import pack_group
from flexjax.layout import SlotLayout
from flexjax.models.config import ModelConfig
from flexjax.steps.kernels import Kernels
from pallas_kernels import lora_expand
from tests.ladder import (
    DECODE,
    FULL,
    LEAN,
    MICROBATCH,
    PROMPT,
    TAPED,
    Model,
    Rig,
    assert_trees_close,
    example,
)

CONFIG = ModelConfig(
    **dict(model_type="llama", vocab_size=512, hidden_size=384, intermediate_size=512, num_layers=2, num_heads=6),
    **dict(num_kv_heads=2, head_dim=64, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False),
    **dict(attention_bias=False, max_position_embeddings=512, rope_scaling=None),
)
"""Three query heads to each key/value head; gate and up each fill two pages of a tape, hidden one and a half."""

KERNELS = Kernels.for_model("gpu", CONFIG, jnp.bfloat16)
GATED = "lora_expand", "mosaic_gpu"
ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in GATED]
SCALE = 0.25
SLACK = 1.3
"""How much worse than the references' the kernels' largest error may be: both round to bfloat16, in other places."""


@functools.cache
def model() -> Model:
    return Model.random(CONFIG)


@pytest.fixture(params=["random", "real"])
def served(request) -> Model:
    """The random model, and the first layers of a real one."""
    if request.param == "random":
        return model()
    folder = os.environ.get("FLEXJAX_FIRST_LAYERS")
    if not folder:
        pytest.skip("FLEXJAX_FIRST_LAYERS names no model: see scripts/first_layers.py")
    return Model.from_directory(Path(folder))


def rig_with(kernels: Kernels, model: Model, **options) -> Rig:
    return Rig(model, dtype=jnp.bfloat16, kernels=kernels, pages=200, **options)


def test_which_kernels_are_used():
    """The text is what the engine prints at start."""
    assert str(KERNELS) == (
        "paged_attention mosaic_gpu, page_write mosaic_gpu, window_attention_grad mosaic_gpu, "
        "lora_expand mosaic_gpu, gated_expand mosaic_gpu, grouped_lora_grad mosaic_gpu, linear_cross_entropy reference"
    )
    assert Kernels.for_model("gpu", CONFIG, jnp.float32) == Kernels(head_chunk=32768)
    assert Kernels.for_model("cpu", CONFIG, jnp.bfloat16) == Kernels()
    narrow = dataclasses.replace(CONFIG, intermediate_size=480)
    refused = Kernels.for_model("gpu", narrow, jnp.bfloat16)
    assert refused.lora_expand == refused.gated_expand == "reference"
    assert Kernels.for_model("gpu", CONFIG, jnp.bfloat16, tp=4).grouped_lora_grad == "reference"
    assert Kernels.for_model("gpu", CONFIG, jnp.bfloat16, rank_capacity=1032) == dataclasses.replace(
        KERNELS, lora_expand="reference", gated_expand="reference"
    )


def test_a_rank_that_does_not_fit_takes_the_reference():
    """At rank 128, three modules' gradients do not fit into a multiprocessor."""
    assert KERNELS.for_job(rank=64, window=2048) == KERNELS
    assert KERNELS.for_job(rank=128, window=2048) == dataclasses.replace(KERNELS, grouped_lora_grad="reference")
    assert Kernels().for_job(rank=128, window=2048) == Kernels()


def serving_error(kernels: Kernels, model: Model) -> float:
    """Largest error of a log-probability of two prompts of different adapters and of six tokens decoded after each;
    what is exact is computed on the CPU."""
    rig, factors = rig_with(kernels, model), [model.factors(rank, seed) for rank, seed in ((8, 1), (16, 2))]
    errors, cpu = [], jax.devices("cpu")[0]
    for number, name in enumerate(("one", "two")):
        version = rig.load(name, factors[number], SCALE)
        rig.seat(number, row=number, tokens=model.tokens(150, seed=number), adapter=version, room=8)
    for number in range(2):
        output = rig.step(PROMPT, prompts=[(number, 0, 150)])
        with jax.default_device(cpu):
            exact = model.dense.logprobs(rig.serving[number].tokens[:150], factors[number], SCALE)
        _, ids, values = (array[:149] for array in output.prompt_logprobs)
        errors.append(np.abs(values - np.take_along_axis(exact[:149], ids, axis=1)).max())
    for _ in range(6):
        output = rig.step(DECODE, decode=(0, 1))
        for number in range(2):
            with jax.default_device(cpu):
                exact = model.dense.logprobs(rig.serving[number].tokens[:-1], factors[number], SCALE)[-1]
            _, ids, values = (array[number] for array in output.logprobs)
            errors.append(np.abs(values - exact[ids]).max())
    return float(max(errors))


@pytest.mark.gpu
@pytest.mark.parametrize("gated", GATED)
def test_serving(served, gated):
    kernels = dataclasses.replace(Kernels.for_model("gpu", served.config, jnp.bfloat16), gated_expand=gated)
    ours = serving_error(kernels, served)
    assert ours < SLACK * serving_error(Kernels(), served)


@functools.cache
def gradient_errors(kernels: Kernels, tape: tuple[str, ...], rank: int) -> dict[tuple[str, str], float]:
    """Error of every factor's gradient relative to its norm; two packed sequences, windows that cut the first. The
    references' are compiled once for all kernels that they are compared with: that takes most of these tests' time."""
    rig, factors = rig_with(kernels, model(), tape=tape), model().factors(rank, seed=7)
    tokens = [model().tokens(length, seed=length) for length in (180, 100)]
    rig.begin(factors, SCALE)
    rig.hold(0, *pack_group([example(each) for each in tokens], MICROBATCH, 0, 0))
    rig.train(0)
    trained = [np.arange(len(each)) > 0 for each in tokens]
    _, exact = model().dense.loss_and_gradients(tokens, trained, factors, SCALE)
    got = rig.factor_gradients()
    error = lambda one, two: np.linalg.norm(np.float64(one) - two) / np.linalg.norm(two)
    return {(f, name): error(got[f][name], exact[f][name]) for f in ("a", "b") for name in exact[f]}


@pytest.mark.gpu
@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("tape, rank", [(FULL, 16), (("x", "gate"), 16), (LEAN, 8)])
def test_gradients(tape, rank, gated):
    kernels = dataclasses.replace(KERNELS, gated_expand=gated)
    ours, references = (gradient_errors(each, tape, rank) for each in (kernels, Kernels()))
    assert max(references.values()) < 0.2
    for key, reference in references.items():
        assert ours[key] < SLACK * reference + 0.002, key


def narrow(layers: int) -> Model:
    small = dict(hidden_size=64, intermediate_size=128, num_heads=2, num_kv_heads=1)
    return Model.random(dataclasses.replace(CONFIG, **small, num_layers=layers))


@functools.cache
def stepped(kernels: Kernels, tape: tuple[str, ...] = ("x", "gate")) -> tuple[np.ndarray, np.ndarray]:
    """What a step of a prompt and a window that keeps a tape, each with its adapter, changed in the pool; and
    log-probabilities of the prompt's row in that step and in the next, which decodes it."""
    served, layout = narrow(layers=1), SlotLayout(4, 192, tape=True, logprobs=True)
    rig = rig_with(kernels, served, tape=tape)
    rig.begin(served.factors(rank=16, seed=7), SCALE)
    rig.hold(0, *pack_group([example(served.tokens(100, seed=1))], MICROBATCH, 0, 0))
    version, before = rig.load("two", served.factors(rank=8, seed=2), SCALE), np.float32(rig.pool)
    rig.seat(0, row=1, tokens=served.tokens(50, seed=2), adapter=version, room=1)
    outputs = rig.step(layout, prompts=[(0, 0, 50)], windows=rig.whole_windows(0)), rig.step(DECODE, decode=(0,))
    return np.float32(rig.pool) - before, np.stack([output.logprobs[2][1] for output in outputs])


@pytest.mark.parametrize("gated", [*(f"{name}_interpreted" for name in GATED), *ON_GPU])
def test_forward_steps_agree_whatever_expands_gate_and_up(gated):
    """But for places in which they round to 8 bits."""
    for one, two in zip(stepped(Kernels(gated_expand=gated)), stepped(Kernels()), strict=True):
        assert np.linalg.norm(one - two) < 2**-8 * np.linalg.norm(two)


@pytest.mark.parametrize("page_write", ["mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tape", [("x", "gate"), FULL], ids=" ".join)
def test_forward_steps_agree_whatever_writes_pages(tape, page_write, capfd):
    """To the bit; and nothing that one launch writes lies where something else of it does."""
    for one, two in zip(stepped(Kernels(page_write=page_write), tape), stepped(Kernels(), tape), strict=True):
        np.testing.assert_array_equal(one, two)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def gradients_with(kernels: Kernels) -> dict[str, dict[str, np.ndarray]]:
    """Of one layer and a tape without q, mid and up, by backward units with these kernels: all else uses references.
    Neither k nor down is adapted."""
    trained = narrow(layers=1)
    rigs = [rig_with(each, trained, tape=("x", "gate"), window=64) for each in (Kernels(), kernels)]
    modules = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    rig, tokens = rigs[0], trained.tokens(60, seed=1)
    rig.begin(trained.factors(rank=16, seed=7, modules=modules), SCALE)
    rig.hold(0, *pack_group([example(tokens)], MICROBATCH, 0, 0))
    rig.step(TAPED, windows=rig.whole_windows(0))
    rig.loss(0)
    rig.programs = rigs[1].programs
    rig.backward(0)
    return rig.factor_gradients()


def test_the_interpreted_expansion_in_a_backward_unit(monkeypatch):
    """It makes q (with k and v), mid and up again, where gate is on the tape; sums of 16 products are in another order
    than the reference's, which rounding to bfloat16 may show."""
    calls = []

    def expand(*arrays, widths, implementation, **options):
        calls.append((implementation, widths))
        return lora_expand(*arrays, widths=widths, implementation=implementation, **options)

    monkeypatch.setattr("flexjax.models.trained_adapter.lora_expand", expand)
    kernels = Kernels(lora_expand="mosaic_gpu_interpreted")
    got, expected = gradients_with(kernels), gradients_with(Kernels())
    assert {widths for name, widths in calls if name == kernels.lora_expand} >= {(128, 64, 64), (64,), (128,)}
    assert_trees_close(got, expected, 2**-8)
