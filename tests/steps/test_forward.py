"""Paged = dense: whatever the chunks, pages, neighbours and adapters, the logits are those of the dense model."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.engine.batch import SamplingBatch
from flexjax.finetuning.packing import pack_group
from flexjax.request import SamplingLevel
from flexjax.step_batch import forward_fields, host_batch, sampling_fields
from flexjax.steps.forward import read_final, write_final
from flexjax.steps.kernels import Kernels
from tests.ladder import (
    DECODE,
    LLAMA,
    MICROBATCH,
    MIXED,
    PROMPT,
    QWEN,
    Model,
    Rig,
    assert_close,
    assert_likeliest,
    example,
)

TOLERANCE = 2e-4
"""Of log-probabilities of order one to ten, float32 against float64 through two layers."""


@pytest.fixture(scope="module", params=[LLAMA, QWEN], ids=["llama", "qwen2"])
def model(request) -> Model:
    return Model.random(request.param)


@pytest.fixture(scope="module")
def llama() -> Model:
    return Model.random(LLAMA)


def chunks_of(number: int, length: int, chunk: int) -> list[tuple[int, int, int]]:
    return [(number, start, min(chunk, length - start)) for start in range(0, length, chunk)]


@pytest.mark.parametrize("chunk", [64, 128, 256])
def test_prompt_in_chunks_is_the_dense_model(model, chunk):
    """Prompt log-probabilities position by position, for every split of 200 tokens and 64-token decode after it."""
    rig, tokens = Rig(model), model.tokens(200, seed=2)
    rig.seat(0, row=2, tokens=tokens, room=3)
    expected = model.dense.logprobs(tokens)
    for _, start, length in chunks_of(0, 200, chunk):
        output = rig.step(PROMPT, prompts=[(0, start, length)])
        own, ids, values = (part[:length] for part in output.prompt_logprobs)
        assert_likeliest(ids, values, expected[start : start + length], TOLERANCE)
        before = np.arange(start, min(start + length, 199))  # nothing follows the last token of the prompt
        np.testing.assert_allclose(own[: len(before)], expected[before, tokens[before + 1]], atol=TOLERANCE)
    assert output.tokens[2] == expected[-1].argmax()


def test_decode_is_the_dense_model_over_a_page_boundary(model):
    rig = Rig(model)
    for number, length in enumerate((62, 1, 130)):
        rig.seat(number, row=3 - number, tokens=model.tokens(length, seed=number), room=6)
    outputs = [rig.step(PROMPT, prompts=[(0, 0, 62), (1, 0, 1)]), rig.step(PROMPT, prompts=[(2, 0, 130)])]
    steps = [rig.step(DECODE, decode=(0, 1, 2)) for _ in range(5)]
    for number, length in enumerate((62, 1, 130)):
        row = 3 - number
        outputs_of_row = [outputs[number == 2], *steps]
        expected = model.dense.logprobs(np.array(rig.serving[number].tokens))[length - 1 : -1]
        own, ids, values = (np.stack([each.logprobs[part][row] for each in outputs_of_row]) for part in range(3))
        assert_likeliest(ids, values, expected, TOLERANCE)
        np.testing.assert_allclose(own, expected.max(axis=-1), atol=TOLERANCE)


def test_pages_may_lie_anywhere(llama):
    """To the bit: which pages hold a sequence changes no sum."""
    results = []
    for turn in (1, -1):
        rig = Rig(llama)
        rig.free = rig.free[::turn]
        rig.seat(0, row=0, tokens=llama.tokens(130, seed=5))
        results.append(rig.step(PROMPT, prompts=[(0, 0, 130)]))
    jax.tree.map(np.testing.assert_array_equal, *results)


ADAPTER_RANKS = {"small": (8, 2.0, 1), "large": (20, 0.5, 2)}


@pytest.fixture(scope="module")
def adapters(llama):
    return {name: (llama.factors(rank, seed), scale) for name, (rank, scale, seed) in ADAPTER_RANKS.items()}


@pytest.fixture(scope="module")
def mixed(llama, adapters):
    """(rig, output of the mixed step): rows 0 to 2 decode with "small", no adapter and "large"; row 3 begins a
    prompt with "large"; and two sequences of one microbatch train "small"."""
    rig = Rig(llama)
    versions = {name: rig.load(name, *adapters[name]) for name in adapters} | {None: rig.table.find(None)}
    for number, name in enumerate(("small", None, "large")):
        rig.seat(number, row=number, tokens=llama.tokens(50 + 10 * number, seed=number), adapter=versions[name], room=4)
        rig.step(PROMPT, prompts=[(number, 0, 50 + 10 * number)])
    rig.seat(3, row=3, tokens=llama.tokens(101, seed=3), adapter=versions["large"])
    rig.version = versions["small"]
    group = [example(llama.tokens(length, seed=length)) for length in (131, 60)]
    (packed,) = pack_group(group, MICROBATCH, 0, 0)
    rig.hold(0, packed)
    output = rig.step(MIXED, decode=(0, 1, 2), prompts=[(3, 0, 64)], windows=[(0, 0, 0, 130), (0, 1, 0, 59)])
    return rig, output


@pytest.mark.parametrize("row, name", [(0, "small"), (1, None), (2, "large")])
def test_decode_rows_of_a_mixed_step_are_as_alone(llama, adapters, mixed, row, name):
    rig, output = mixed
    tokens = np.array(rig.serving[row].tokens)
    expected = llama.dense.logprobs(tokens, *adapters.get(name, ()))[-2]
    _, ids, values = (part[row : row + 1] for part in output.logprobs)
    assert_likeliest(ids, values, expected[None], TOLERANCE)


def test_prompt_of_a_mixed_step_goes_on_in_another(llama, adapters, mixed):
    rig, _ = mixed
    output = rig.step(PROMPT, prompts=[(3, 64, 37)])
    expected = llama.dense.logprobs(rig.serving[3].request.prompt, *adapters["large"])
    assert_likeliest(*(part[:37] for part in output.prompt_logprobs[1:]), expected[64:], TOLERANCE)


@pytest.mark.parametrize("sequence", [0, 1])
def test_finetuning_windows_of_a_mixed_step_are_as_alone(llama, adapters, mixed, sequence):
    rig, _ = mixed
    training = rig.training[0]
    start, length = training.packed.starts[sequence], training.packed.lengths[sequence]
    places, width = np.array(training.pages.final_places), llama.config.hidden_size
    final = np.asarray(read_final(rig.pool, rig.dims, places, width))[start : start + length]
    expected = llama.dense.final_states(training.packed.input_ids[start : start + length], *adapters["small"])
    assert_close(final, expected, 1e-5, "final hidden state")


def test_final_states_share_pages():
    """Of 16 values in rows of 8 two lie on a page of four layers: place 5 is the second one on page 2. The middle tile
    has no place."""
    dims = SimpleNamespace(finals_per_page=2, final_rows=2)
    random = np.random.default_rng(5)
    pool, x = (random.standard_normal(shape).astype(np.float32) for shape in ((4, 6, 64, 8), (3 + 3 * 64, 16)))
    places = jnp.array([5, -1, 4])
    written = np.asarray(write_final(jnp.asarray(pool), dims, jnp.asarray(x), places, 3, Kernels()))
    expected = pool.copy()
    for tile, layer in ((0, 2), (2, 0)):
        own = x[3 + 64 * tile :][:64]
        expected[layer, 2], expected[layer + 1, 2] = own[:, :8], own[:, 8:]
    np.testing.assert_array_equal(written, expected)
    for width in (8, 12, 16):
        got = read_final(jnp.asarray(written), dims, places, width)
        np.testing.assert_array_equal(got, np.concatenate([x[3:67], 0 * x[:64], x[131:]])[:, :width])


def test_requests_without_an_adapter_do_not_notice_resident_ones(llama):
    """To the bit, although the low-rank products are computed for a neighbour in the same step."""
    outputs = []
    for resident in (False, True):
        rig = Rig(llama)
        rig.seat(0, row=0, tokens=llama.tokens(70, seed=1))
        prompts = [(0, 0, 70)]
        if resident:
            rig.seat(1, row=1, tokens=llama.tokens(20, seed=2), adapter=rig.load("x", llama.factors(8, 1), 2.0))
            prompts.append((1, 0, 20))
        output = rig.step(PROMPT, prompts=prompts)
        outputs.append([part[:70] for part in output.prompt_logprobs])
    jax.tree.map(np.testing.assert_array_equal, *outputs)


@pytest.mark.parametrize("layout", [DECODE, MIXED], ids=["decode", "mixed"])
def test_an_idle_step_changes_nothing(llama, layout):
    rig = Rig(llama)
    rig.seat(0, row=1, tokens=llama.tokens(70, seed=1), room=8)
    rig.step(PROMPT, prompts=[(0, 0, 70)])
    before = jax.tree.map(np.array, (rig.pool, rig.rows))
    idle, _ = host_batch(forward_fields(rig.dims, layout))
    rig.run(layout, idle, SamplingBatch(host_batch(sampling_fields(layout.rows))[0], SamplingLevel.GREEDY))
    jax.tree.map(np.testing.assert_array_equal, (rig.pool, rig.rows), before)


def test_a_step_writes_its_own_pages_and_row_only(llama):
    rig = Rig(llama)
    for number in range(2):
        rig.seat(number, row=number, tokens=llama.tokens(70, seed=number), room=8)
        rig.step(PROMPT, prompts=[(number, 0, 70)])
    pool, rows = jax.tree.map(np.array, (rig.pool, rig.rows))
    token = int(rig.step(DECODE, decode=(1,)).tokens[1])
    changed = np.argwhere((np.asarray(rig.pool) != pool).any(axis=(0, 3)))
    assert changed.tolist() == [[rig.seats[1][1][1], 70 - 64]]  # second page of the sequence, position 70
    expected = rows.history.copy()
    expected[1, 71] = token
    np.testing.assert_array_equal(rig.rows.history, expected)
    np.testing.assert_array_equal(rig.rows.last_token, [rows.last_token[0], token, 0, 0])


def test_a_model_whose_pages_cannot_hold_its_final_state_is_refused():
    """Two columns and one layer: the second column would have nowhere to go."""
    pool, x = np.zeros((1, 4, 64, 32), np.float32), np.zeros((64, 48), np.float32)
    with pytest.raises(ValueError, match="48 values takes 2 rows of 32, one a layer, but the model has 1 layers"):
        write_final(pool, SimpleNamespace(finals_per_page=1, final_rows=2), x, np.array([0]), 0, Kernels())
