"""FLOP counts against sums done by hand."""

import jax
import jax.numpy as jnp
import pytest

from flexjax.compiler.flops import count_flops


def flops(function, *shapes) -> int:
    return count_flops(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)).jaxpr, {})


def test_a_product_counts_multiplication_and_addition():
    assert flops(lambda x, w: jnp.tanh(x @ w) + 1, (3, 5), (5, 7)) == 2 * 3 * 5 * 7


def test_batched_products_over_several_axes():
    scores = lambda q, k: jnp.einsum("bhqd,bhkd->bhqk", q, k)
    assert flops(scores, (2, 3, 4, 5), (2, 3, 6, 5)) == 2 * (2 * 3 * 4 * 6) * 5
    project = lambda x, w: jnp.einsum("tij,ijo->to", x, w)
    assert flops(project, (7, 2, 3), (2, 3, 5)) == 2 * (7 * 5) * (2 * 3)


def test_inner_functions_scans_and_branches():
    def turns(x, w):
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, length=4)[0]

    def branches(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    one = 2 * 3 * 5 * 5
    assert flops(jax.jit(lambda x, w: x @ w), (3, 5), (5, 5)) == one
    assert flops(turns, (3, 5), (5, 5)) == 4 * one
    assert flops(branches, (3, 5), (5, 5)) == 2 * one


def test_a_while_loop_is_refused():
    with pytest.raises(ValueError, match="while loop"):
        flops(lambda x: jax.lax.while_loop(lambda v: v[0, 0] < 1, lambda v: v @ v, x), (3, 3))
