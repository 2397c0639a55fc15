"""Windowed backward = `jax.grad` over whole sequences: loss and LoRA gradients against the dense model in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.finetuning.packing import pack_group
from flexjax.models import resident_adapters
from flexjax.models.dropout import Dropout
from flexjax.models.lora import MODULES, module_widths
from flexjax.steps.forward import tile_seeds
from pallas_kernels import gated_expand
from tests.ladder import (
    DECODE,
    FULL,
    LEAN,
    LLAMA,
    MICROBATCH,
    PAGES,
    PROMPT,
    QWEN,
    TAPED,
    WIDE,
    Model,
    Rig,
    assert_trees_close,
    example,
)

TOLERANCE = 2e-5
"""Relative to the largest gradient of a factor: float32 against float64 through two layers."""

SCALE, RATE = 1.5, 0.3


@functools.cache
def group(config, lengths=(180, 66, 40)) -> tuple:
    """Packed they take 3, 2 and 1 tiles: windows of 128 slots cut the first sequence and hold two others together.
    The prompts (the first third) are not trained; nor is the last token of the second, which cuts its last tile off."""
    model = Model.random(config)
    examples = []
    for index, length in enumerate(lengths):
        trained = np.arange(length) > length // 3
        trained[-1] &= index != 1
        examples.append(example(model.tokens(length, seed=100 + index), trained))
    return tuple(examples)


def dense_gradients(config, examples, factors, scale=SCALE, multipliers=()):
    tokens, trained = [each.input_ids for each in examples], [each.loss_mask for each in examples]
    return Model.random(config).dense.loss_and_gradients(tokens, trained, factors, scale, multipliers)


@functools.cache
def factors_of(config) -> dict:
    """Rank 4: half of each unit of the rank axis is padding."""
    return Model.random(config).factors(rank=4, seed=7)


@functools.cache
def expected_of(config) -> tuple[float, dict]:
    return dense_gradients(config, group(config), factors_of(config))


def packed_rig(config=LLAMA, factors=None, dropout=0.0, **shape) -> Rig:
    """A rig whose microbatch 0 holds the group."""
    rig = Rig(Model.random(config), **shape)
    rig.begin(factors or factors_of(config), SCALE, dropout=dropout > 0)
    (packed,) = pack_group(group(config), MICROBATCH, 0, 0)
    rig.hold(0, packed, dropout)
    return rig


@pytest.mark.parametrize("tape, window", [(LEAN, 128), (WIDE, 64), (FULL, 384)], ids=["lean", "wide", "full"])
def test_every_tape_and_window(tape, window):
    rig = packed_rig(tape=tape, window=window)
    loss = rig.train(0)
    expected_loss, expected = expected_of(LLAMA)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_trees_close(rig.factor_gradients(), expected, TOLERANCE)


@pytest.mark.parametrize("tape", [LEAN, ("x", "mid", "gate")], ids=",".join)
def test_what_of_gate_and_up_is_not_kept_may_be_anything(tape, monkeypatch):
    """A forward step tells apart what a tape keeps, tile by tile, and reads nothing else of them."""

    def poisoned(*operands, **options):
        *_, y = results = gated_expand(*operands, **options)
        width, kept = results[0].shape[1], operands[-1]
        kept = jnp.zeros((-(-len(y) // 64), 2), bool) if kept is None else kept
        kept = jnp.repeat(jnp.repeat(kept, 64, axis=0)[-len(y) :], width, axis=1)
        return results[0], y.at[:, : 2 * width].set(jnp.where(kept, y[:, : 2 * width], jnp.nan))

    monkeypatch.setattr(resident_adapters, "gated_expand", poisoned)
    rig = packed_rig(tape=tape, pages=PAGES + 1)  # programs of its own
    assert rig.train(0) == pytest.approx(expected_of(LLAMA)[0], rel=1e-6)
    assert_trees_close(rig.factor_gradients(), expected_of(LLAMA)[1], TOLERANCE)


@pytest.mark.parametrize("tape", [LEAN, FULL], ids=["lean", "full"])
def test_biases_tied_embeddings_and_grouped_queries(tape):
    rig = packed_rig(QWEN, tape=tape)
    loss = rig.train(0)
    expected_loss, expected = expected_of(QWEN)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_trees_close(rig.factor_gradients(), expected, TOLERANCE)


MODULE_SETS = [("down_proj",), ("q_proj", "v_proj"), ("k_proj", "o_proj", "gate_proj")]


@pytest.mark.parametrize("modules", MODULE_SETS, ids=",".join)
def test_every_set_of_target_modules(modules):
    """An absent module is one whose factors are zero, and has no gradient to compare."""
    chosen = {k: {name: factors_of(LLAMA)[k][name] for name in modules} for k in ("a", "b")}
    nulled = {k: {name: f * (name in modules) for name, f in factors_of(LLAMA)[k].items()} for k in ("a", "b")}
    rig = packed_rig(factors=chosen)
    loss = rig.train(0)
    expected_loss, expected = dense_gradients(LLAMA, group(LLAMA), nulled)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    got = rig.factor_gradients()
    assert got["a"].keys() == set(modules)
    assert_trees_close(got, {k: {name: expected[k][name] for name in modules} for k in ("a", "b")}, TOLERANCE)


@pytest.mark.parametrize(
    "steps",
    [
        [[(0, 2, 0, 39), (0, 0, 0, 64)], [(0, 0, 64, 115)], [(0, 1, 0, 64)]],
        [[(0, 1, 0, 64), (0, 0, 0, 128)], [(0, 2, 0, 39), (0, 0, 128, 51)]],
    ],
    ids=["three", "two"],
)
def test_forward_windows_may_be_cut_anywhere(steps):
    """Into other steps, in another order of sequences, beside requests."""
    rig = packed_rig()
    rig.seat(0, row=1, tokens=rig.model.tokens(30, seed=1), room=8)
    rig.step(PROMPT, prompts=[(0, 0, 30)])
    for windows in steps:
        rig.step(TAPED, decode=(0,), windows=windows)
    assert rig.loss(0) == pytest.approx(expected_of(LLAMA)[0], rel=1e-6)
    rig.backward(0)
    assert_trees_close(rig.factor_gradients(), expected_of(LLAMA)[1], TOLERANCE)


def test_requests_between_units_change_nothing():
    """To the bit: gradients with a decode or a prompt step between any two units equal those without."""
    results = []
    for interleaved in (False, True):
        rig = packed_rig()
        rig.seat(0, row=1, tokens=rig.model.tokens(30, seed=1), adapter=rig.version, room=40)
        rig.step(PROMPT, prompts=[(0, 0, 30)])
        rig.step(TAPED, windows=rig.whole_windows(0))
        loss = rig.loss(0)
        rig.backward(0, between=(lambda rig=rig: rig.step(DECODE, decode=(0,))) if interleaved else lambda: None)
        results.append((loss, rig.factor_gradients()))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_microbatches_of_a_group_add_up():
    """Two microbatches, each divided by the targets of both, and held at the same time."""
    examples = group(LLAMA, lengths=(180, 70, 131))
    microbatches = pack_group(examples, MICROBATCH, 0, 0)
    assert len(microbatches) == 2
    rig = Rig(Model.random(LLAMA))
    rig.begin(factors_of(LLAMA), SCALE)
    for number, packed in enumerate(microbatches):
        rig.hold(number, packed)
        rig.step(TAPED, windows=rig.whole_windows(number))
    loss = 0
    for number in range(2):
        loss += rig.loss(number)
        rig.backward(number)
    expected_loss, expected = dense_gradients(LLAMA, examples, factors_of(LLAMA))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_trees_close(rig.factor_gradients(), expected, TOLERANCE)


def test_what_a_microbatch_given_up_has_left_changes_nothing():
    """Its share of the keys' and values' gradients, that is: the loss clears them, and a whole pass leaves none."""
    rig = packed_rig()
    left = dict(d_k=rig.gradients.d_k + 3.0, d_v=rig.gradients.d_v - 5.0)
    rig.gradients = dataclasses.replace(rig.gradients, **left)
    rig.train(0)
    assert_trees_close(rig.factor_gradients(), expected_of(LLAMA)[1], TOLERANCE)
    assert not np.any(rig.gradients.d_k)
    assert not np.any(rig.gradients.d_v)


def kept_inputs(rig: Rig) -> list[dict[str, np.ndarray]]:
    """Per sequence: what the dropout of microbatch 0 multiplies LoRA inputs by, module -> [layers, T, in]."""
    packed, widths = rig.training[0].packed, module_widths(rig.dims.model)
    seeds = tile_seeds(jnp.array([rig.training[0].tile_seed(block) for block in range(6)], jnp.uint32))
    mask = lambda name, layer: Dropout(seeds, jnp.full(len(seeds), RATE), layer)(name, jnp.ones((1, widths[name][0])))
    layers = jnp.arange(rig.dims.model.num_layers)
    whole = {name: np.asarray(jax.vmap(functools.partial(mask, name))(layers)) for name in MODULES}
    places = [slice(start, start + length) for start, length in zip(packed.starts, packed.lengths, strict=True)]
    return [{name: mask[:, place] for name, mask in whole.items()} for place in places]


@pytest.fixture(scope="module")
def dropped():
    rig = packed_rig(dropout=RATE)
    return rig, rig.train(0)


def test_dropout_is_the_dense_model_with_its_mask(dropped):
    rig, loss = dropped
    assert abs(loss / expected_of(LLAMA)[0] - 1) > 1e-3  # the mask matters
    examples, kept = rig.training[0].packed.examples, kept_inputs(rig)
    expected_loss, expected = dense_gradients(LLAMA, examples, factors_of(LLAMA), multipliers=kept)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_trees_close(rig.factor_gradients(), expected, TOLERANCE)


def test_dropout_drops_the_same_in_forward_and_backward(dropped):
    """The slope of the forward loss along the gradient, by central differences, is the squared norm of the gradient."""
    rig, _ = dropped
    gradients = rig.factor_gradients()
    gradients = {
        "a": {name: g[:, :, :4] for name, g in gradients["a"].items()},
        "b": {name: g[:, :4] for name, g in gradients["b"].items()},
    }
    squared = sum(float(np.sum(np.square(g, dtype=np.float64))) for g in jax.tree.leaves(gradients))
    step, losses = 2e-3 / squared**0.5, []
    for sign in (1, -1):
        moved = jax.tree.map(lambda f, g, sign=sign: f + np.float32(sign * step) * g, factors_of(LLAMA), gradients)
        probe = packed_rig(factors=moved, dropout=RATE)
        losses.append(probe.train(0))
    # float32 losses near 5 are exact to 5e-7, a tenth of a percent of their difference
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(squared, rel=1e-2)


@pytest.mark.parametrize("layers", [2, 3])
def test_bfloat16_stays_near(layers):
    """Eight bits of mantissa through a few layers: gradients point the same way. The final page of three layers has
    room for the two halves of the log-sum-exps, that of two has not."""
    config = dataclasses.replace(LLAMA, num_layers=layers)
    rig = packed_rig(config, tape=FULL, dtype=jnp.bfloat16)
    assert rig.dims.lse_follows_final == (layers == 3)
    assert rig.train(0) == pytest.approx(expected_of(config)[0], rel=1e-2)
    got, (_, expected) = rig.factor_gradients(), expected_of(config)
    for name in MODULES:
        for g, e in ((got["a"][name][:, :, :4], expected["a"][name]), (got["b"][name][:, :4], expected["b"][name])):
            assert np.vdot(g, e) / (np.linalg.norm(g) * np.linalg.norm(e)) > 0.995
            assert np.linalg.norm(g) == pytest.approx(np.linalg.norm(e), rel=0.05)
