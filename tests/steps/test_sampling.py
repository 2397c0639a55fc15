"""Sampling against an independent float64 implementation that counts, sorts and normalises the plain way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from flexjax.request import SamplingLevel, SamplingParams
from flexjax.steps.sampling import SamplingBatch, gumbel_noise, prompt_logprobs, sample, top_logprobs

VOCABULARY = 61
HISTORY = 24
IDLE = {
    "temperature": np.float32(1),
    "top_p": np.float32(1),
    "min_p": np.float32(0),
    "top_k": np.int32(0),
    "repetition": np.float32(1),
    "presence": np.float32(0),
    "frequency": np.float32(0),
    "seed": np.uint32(0),
    "position": np.int32(0),
    "prompt_length": np.int32(0),
    "banned": np.full(8, -1, np.int32),
    "active": np.bool_(True),
}
sample_compiled = jax.jit(functools.partial(sample, level=SamplingLevel.PENALISED))


def batch_of(rows: list[dict]) -> SamplingBatch:
    """One row per dict; what a dict leaves out is off."""
    return SamplingBatch(
        **{name: jnp.asarray([row.get(name, idle) for row in rows], idle.dtype) for name, idle in IDLE.items()}
    )


def penalised(logits, row: dict, tokens) -> np.ndarray:
    """float64 logits of one row after held-back ids and penalties, from counts over the vocabulary."""
    row = IDLE | row
    logits = np.array(logits, np.float64)
    logits[[token for token in row["banned"] if token >= 0]] = -np.inf
    known = tokens[: row["position"]]
    anywhere = np.bincount(known, minlength=len(logits)) > 0
    counts = np.bincount(known[row["prompt_length"] :], minlength=len(logits))
    factor = np.where(anywhere, float(row["repetition"]), 1.0)
    logits = np.where(logits > 0, logits / factor, logits * factor)
    return logits - counts * float(row["frequency"]) - (counts > 0) * float(row["presence"])


def distribution(logits, row: dict, tokens) -> np.ndarray:
    """float64 probabilities that one row samples from: filters by sorting, the likeliest first."""
    row = IDLE | row
    logits = penalised(logits, row, tokens) / float(row["temperature"])
    logits[logits < logits.max() + np.log(max(float(row["min_p"]), 1e-300))] = -np.inf
    if row["top_k"] > 0:
        logits[logits < np.sort(logits)[-min(row["top_k"], len(logits))]] = -np.inf
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    if row["top_p"] < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= float(row["top_p"])]] = 0
    return probabilities / probabilities.sum()


def random_rows(generator, count: int) -> list[dict]:
    """Rows with everything in use now and then."""

    def one():
        position = int(generator.integers(1, HISTORY + 1))
        banned = np.full(8, -1, np.int32)
        banned[: generator.integers(0, 4)] = generator.integers(VOCABULARY)
        return {
            "temperature": generator.choice([0.0, 0.3, 1.0, 1.7]),
            "top_p": generator.choice([1.0, 0.87, 0.31]),
            "min_p": generator.choice([0.0, 0.043]),
            "top_k": generator.choice([-1, 0, 1, 7, 20, 500]),
            "repetition": generator.choice([1.0, 1.3, 0.8]),
            "presence": generator.choice([0.0, 1.1, -0.6]),
            "frequency": generator.choice([0.0, 0.7, -0.4]),
            "seed": generator.integers(2**32),
            "position": position,
            "prompt_length": int(generator.integers(0, position + 1)),
            "banned": banned,
        }

    return [one() for _ in range(count)]


def random_case(seed: int, count: int):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, VOCABULARY)).astype(np.float32) * 3
    history = generator.integers(0, 12, size=(count, HISTORY)).astype(np.int32)  # few ids: many occur repeatedly
    return logits, random_rows(generator, count), history


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_those_of_the_float64_implementation_under_the_same_noise(seed):
    logits, rows, history = random_case(seed, 128)
    tokens = np.asarray(sample_compiled(logits, batch_of(rows), history))
    for index, row in enumerate(rows):
        if row["temperature"] == 0:
            expected = np.argmax(penalised(logits[index], row, history[index]))
        else:
            noise = np.asarray(gumbel_noise(np.uint32(row["seed"]), np.int32(row["position"]), VOCABULARY), np.float64)
            with np.errstate(divide="ignore"):
                expected = np.argmax(np.log(distribution(logits[index], row, history[index])) + noise)
        assert tokens[index] == expected, row


FILTERS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.4, "top_k": 9, "top_p": 0.85, "min_p": 0.02},
    "penalties": {"repetition": 1.5, "presence": 0.5, "frequency": 0.4},
}


@pytest.mark.parametrize("row", FILTERS.values(), ids=FILTERS)
def test_draws_follow_the_distribution(row):
    """Pearson's chi-square over 12,000 draws; 60 with at most 11 degrees of freedom happens once in 10^8."""
    draws, vocabulary = 12_000, 12
    generator = np.random.default_rng(5)
    logits = generator.normal(size=vocabulary).astype(np.float32)
    history = np.array([1, 1, 2, 3, 3, 3], np.int32)
    row = row | {"position": 6, "prompt_length": 2}
    one = batch_of([row])
    many = jax.tree.map(lambda leaf: jnp.repeat(leaf, draws, axis=0), one)
    many = dataclasses.replace(many, seed=jnp.arange(draws, dtype=jnp.uint32))
    tokens = sample_compiled(np.tile(logits, (draws, 1)), many, np.tile(history, (draws, 1)))
    counts = np.bincount(np.asarray(tokens), minlength=vocabulary)
    expected = distribution(logits, row, history) * draws
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 60


def test_draws_along_one_sequence_follow_the_distribution():
    """The other way a row draws repeatedly: one seed, one position after another."""
    draws = 4_000
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf, draws, axis=0), batch_of([{"seed": 77}]))
    batch = dataclasses.replace(batch, position=jnp.arange(draws, dtype=jnp.int32))
    tokens = np.asarray(sample_compiled(np.tile(logits, (draws, 1)), batch, np.zeros((draws, 1), np.int32)))
    expected = np.array([0.6, 0.3, 0.1]) * draws
    assert ((np.bincount(tokens, minlength=3) - expected) ** 2 / expected).sum() < 30
    agreement = (tokens[1:] == tokens[:-1]).mean()
    assert abs(agreement - 0.46) < 0.05  # 0.6² + 0.3² + 0.1²: neighbours along the sequence are independent


def test_a_row_depends_neither_on_its_neighbours_nor_on_its_place():
    logits, rows, history = random_case(9, 32)
    together = np.asarray(sample_compiled(logits, batch_of(rows), history))
    order = np.random.default_rng(1).permutation(32)
    shuffled = np.asarray(sample_compiled(logits[order], batch_of([rows[i] for i in order]), history[order]))
    np.testing.assert_array_equal(shuffled, together[order])
    for index in range(32):
        alone = sample_compiled(logits[index : index + 1], batch_of([rows[index]]), history[index : index + 1])
        assert alone[0] == together[index]


def test_seed_and_position_both_change_the_draw():
    logits = np.zeros((3, 4096), np.float32)
    batch = batch_of([{"seed": 1, "position": 1}, {"seed": 1, "position": 2}, {"seed": 2, "position": 1}])
    tokens = np.asarray(sample_compiled(logits, batch, np.zeros((3, 1), np.int32)))
    assert len(set(tokens.tolist())) == 3


def test_inactive_rows_ask_for_nothing():
    """What is left in an idle seat must not touch the others: not even that their history is read."""
    logits, _, history = random_case(3, 2)
    logits[1] = np.nan
    left_over = {"active": False, "temperature": 1.0, "top_k": 3, "repetition": 2.0, "position": 9}
    batch = batch_of([{"temperature": 0.0}, left_over])
    assert not batch.random.any()
    assert sample_compiled(logits, batch, history)[0] == logits[0].argmax()


def test_greedy_takes_the_first_of_equals_and_reads_bfloat16():
    logits = jnp.asarray([[0.0, 2.0, 2.0, -1.0], [-3.0, -2.0, -2.5, -9.0]], jnp.bfloat16)
    batch = batch_of([{"temperature": 0.0}, {"temperature": 0.0}])
    assert sample_compiled(logits, batch, np.zeros((2, 1), np.int32)).tolist() == [1, 1]


def test_held_back_ids_are_never_drawn():
    draws = 500
    batch = batch_of([{"banned": [0, 2, -1, -1, -1, -1, -1, -1], "seed": seed} for seed in range(draws)])
    logits = np.tile(np.float32([9.0, 0.0, 5.0, 0.0]), (draws, 1))
    assert set(sample_compiled(logits, batch, np.zeros((draws, 1), np.int32)).tolist()) == {1, 3}


def test_equals_at_the_boundary():
    """Top-k keeps every token that equals the k-th; top-p only as many as it needs, smaller ids first."""
    draws = 400
    logits = np.tile(np.log(np.float32([0.1, 0.2, 0.5, 0.2])), (draws, 1))
    history = np.zeros((draws, 1), np.int32)
    by_rank = batch_of([{"top_k": 2, "seed": seed} for seed in range(draws)])
    assert set(sample_compiled(logits, by_rank, history).tolist()) == {1, 2, 3}
    by_mass = batch_of([{"top_p": 0.6, "seed": seed} for seed in range(draws)])
    assert set(sample_compiled(logits, by_mass, history).tolist()) == {1, 2}


def test_positive_and_negative_zero_are_equals():
    draws = 200
    logits = np.tile(np.float32([0.0, -0.0, -5.0]), (draws, 1))
    batch = batch_of([{"top_k": 1, "seed": seed} for seed in range(draws)])
    assert set(sample_compiled(logits, batch, np.zeros((draws, 1), np.int32)).tolist()) == {0, 1}


def primitives(jaxpr) -> set[str]:
    """Names of all primitives."""
    inner = [each for equation in jaxpr.eqns for each in jaxprs_in_params(equation.params)]
    return {equation.primitive.name for equation in jaxpr.eqns}.union(*(primitives(each) for each in inner))


def test_a_level_holds_no_more_than_it_needs_and_no_condition():
    """A condition on the device would make the host wait for its outcome."""
    logits, rows, history = random_case(0, 4)
    batch = batch_of(rows)
    held = [
        primitives(jax.make_jaxpr(functools.partial(sample, level=level))(logits, batch, history).jaxpr)
        for level in SamplingLevel
    ]
    costly = {"random_bits", "scan", "cumsum", "scatter", "scatter-add", "sort", "while", "cond"}
    noise, filters, penalties = {"random_bits"}, {"scan", "cumsum"}, {"scatter", "scatter-add"}
    assert [names & costly for names in held] == [set(), noise, noise | filters, noise | filters | penalties]


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ({"temperature": 0.0}, SamplingLevel.GREEDY),
        ({"temperature": 0.0, "top_p": 0.5}, SamplingLevel.GREEDY),
        ({}, SamplingLevel.RANDOM),
        ({"min_p": 0.1}, SamplingLevel.RANDOM),
        ({"top_k": 4}, SamplingLevel.FILTERED),
        ({"top_p": 0.9}, SamplingLevel.FILTERED),
        ({"temperature": 0.0, "frequency_penalty": 0.1}, SamplingLevel.PENALISED),
        ({"temperature": 0.0, "min_tokens": 3}, SamplingLevel.PENALISED),
    ],
)
def test_level_of_a_request(options, level):
    assert SamplingParams(**options).level is level


def test_a_higher_level_draws_the_same():
    """A row's token does not depend on what its neighbours made the batch compute."""
    logits, rows, history = random_case(3, 40)
    needs = [(row["temperature"] >= 1e-5, row["top_k"] > 0 or row["top_p"] < 1) for row in rows]
    plain = [row | {"repetition": 1.0, "presence": 0.0, "frequency": 0.0, "banned": np.full(8, -1)} for row in rows]
    least = [int(random) + int(random and filtered) for random, filtered in needs]
    assert set(least) == {0, 1, 2}
    highest = np.asarray(sample_compiled(logits, batch_of(plain), history))
    for level in set(least):
        chosen = [index for index, each in enumerate(least) if each == level]
        batch = batch_of([plain[index] for index in chosen])
        tokens = sample(logits[np.array(chosen)], batch, history[np.array(chosen)], SamplingLevel(level))
        np.testing.assert_array_equal(tokens, highest[np.array(chosen)])


def test_logprobs_are_the_models_own():
    generator = np.random.default_rng(2)
    logits = generator.normal(size=(5, VOCABULARY)).astype(np.float32) * 4
    tokens = generator.integers(0, VOCABULARY, 5).astype(np.int32)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    ids = np.argsort(-exact, axis=-1)[:, :6]
    for function in (top_logprobs, prompt_logprobs):
        own, likeliest, values = function(logits, tokens, 6)
        np.testing.assert_allclose(own, exact[np.arange(5), tokens], rtol=1e-5)
        np.testing.assert_array_equal(likeliest, ids)
        np.testing.assert_allclose(values, np.take_along_axis(exact, ids, axis=-1), rtol=1e-5)
        assert likeliest.dtype == np.int32 and own.dtype == np.float32
