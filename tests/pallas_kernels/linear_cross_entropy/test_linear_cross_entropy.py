"""Head and loss in chunks against dense softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_cross_entropy
from pallas_kernels.linear_cross_entropy.cases import SMALL

COLUMNS = SMALL[2]


def oracle(hidden, head, targets, *, transposed, **_):
    hidden, head = np.asarray(hidden).astype(np.float64), np.asarray(head).astype(np.float64)
    head = head.T if transposed else head
    logits = hidden @ head
    logits -= logits.max(axis=1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss, d_hidden = np.zeros(len(hidden)), np.zeros(hidden.shape)
    for token, target in enumerate(targets):
        if target >= 0:
            loss[token] = -log_probabilities[token, target]
            d_hidden[token] = head @ np.exp(log_probabilities[token]) - head[:, target]
    return loss, d_hidden


run = jax.jit(linear_cross_entropy, static_argnames=("chunk", "transposed"))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_equals_dense_softmax_in_float64(case):
    arguments = case.make(seed=1)
    loss, d_hidden = run(**arguments)
    expected_loss, expected_d_hidden = oracle(**arguments)
    assert loss.dtype == d_hidden.dtype == jnp.float32
    # Logits and sums are float32; bfloat16 rounds the weights of the vocabulary to 2**-9 before the second product.
    relative = 2.0**-8 if case.dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_hidden, expected_d_hidden, rtol=relative, atol=relative)


def test_equals_jax_grad_of_the_dense_loss():
    arguments = COLUMNS.make(seed=2)
    head, targets = arguments["head"], arguments["targets"]

    def dense(hidden):
        log_probabilities = jax.nn.log_softmax(jnp.dot(hidden, head, precision="highest"))
        picked = jnp.take_along_axis(log_probabilities, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
        return -jnp.where(targets >= 0, picked, 0).sum()

    loss, d_hidden = run(**arguments)
    expected_loss, expected_d_hidden = jax.value_and_grad(dense)(arguments["hidden"])
    np.testing.assert_allclose(loss.sum(), expected_loss, rtol=1e-5)
    np.testing.assert_allclose(d_hidden, expected_d_hidden, rtol=1e-4, atol=1e-5)


def test_columns_and_transposed_agree():
    arguments = COLUMNS.make(seed=3)
    for got, want in zip(
        run(**arguments | {"head": arguments["head"].T, "transposed": True}), run(**arguments), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_ignored_tokens_are_exactly_zero_even_when_their_hidden_state_is_not_finite():
    arguments = COLUMNS.make(seed=4)
    ignored = arguments["targets"] < 0
    arguments["hidden"] = jnp.where(ignored[:, None], jnp.nan, arguments["hidden"])
    loss, d_hidden = run(**arguments)
    assert not np.any(np.asarray(loss)[ignored]) and not np.any(np.asarray(d_hidden)[ignored])
    assert np.all(np.isfinite(loss)) and np.all(np.isfinite(d_hidden)) and np.all(np.asarray(loss)[~ignored] > 0)


def test_large_logits_do_not_overflow():
    arguments = COLUMNS.make(seed=5)
    arguments["hidden"] *= 100
    loss, d_hidden = run(**arguments)
    expected_loss, expected_d_hidden = oracle(**arguments)
    # Logits near 1000 carry float32 errors near 1e-4.
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(d_hidden, expected_d_hidden, atol=1e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_neither_the_logits_nor_a_copy_of_the_head_is_ever_whole(transposed):
    tokens, width, vocabulary, chunk = 64, 32, 10_001, 100
    shaped = jax.ShapeDtypeStruct
    head = shaped((vocabulary, width) if transposed else (width, vocabulary), jnp.float32)
    compiled = (
        jax.jit(functools.partial(linear_cross_entropy, chunk=chunk, transposed=transposed))
        .lower(shaped((tokens, width), jnp.float32), head, shaped((tokens,), jnp.int32))
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < min(tokens, width) * vocabulary * 4 / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transposed": True}, "hidden has 32 values a token, the head takes 101"),
        ({"targets": np.zeros(3, np.int32)}, r"targets of shape \(3,\) for 9 tokens"),
        ({"chunk": 0}, "chunk is 0; at least 1 column is needed"),
        ({"implementation": "fast"}, "no implementation 'fast'; it has reference"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**COLUMNS.make(seed=0) | change)
