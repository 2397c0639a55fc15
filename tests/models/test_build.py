"""From a configuration to a decoder: names, shapes, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from flexjax.models.build import abstract_decoder, dotted, dummy_weights, place_weights
from flexjax.weights.stacking import tree_shapes
from tests.ladder import LLAMA, QWEN


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen2"])
def test_the_decoder_has_the_names_and_shapes_that_loaders_fill(config):
    _, shapes = abstract_decoder(config, jnp.bfloat16)
    leaves = {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert {name: leaf.shape for name, leaf in leaves.items()} == tree_shapes(config)
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.bfloat16)}
    assert ("head" in leaves) == (not config.tie_word_embeddings)


def test_every_misfit_is_listed_at_once():
    _, shapes = abstract_decoder(LLAMA, jnp.float32)
    tree = {name: np.zeros(shape) for name, shape in tree_shapes(LLAMA).items()}
    del tree["norm"]
    tree["layers.o"] = np.zeros((2, 32, 48))
    tree["layers.rotary"] = np.zeros(4)
    faults = "layers.o has shape (2, 32, 48), expected (2, 48, 32); missing norm; unexpected layers.rotary"
    with pytest.raises(ValueError, match=re.escape(faults)):
        place_weights(shapes, tree, lambda name, array: array)


def test_weights_go_where_their_names_say():
    _, shapes = abstract_decoder(LLAMA, jnp.float32)
    tree = {name: np.full(shape, index) for index, (name, shape) in enumerate(tree_shapes(LLAMA).items())}
    placed = place_weights(shapes, tree, lambda name, array: (name, array.flat[0]))
    flat = jax.tree_util.tree_leaves_with_path(placed, is_leaf=lambda x: isinstance(x, tuple))
    assert {dotted(path): value for path, value in flat} == {n: (n, i) for i, n in enumerate(tree_shapes(LLAMA))}


def test_dummy_weights_are_random():
    _, shapes = abstract_decoder(LLAMA, jnp.bfloat16)
    here = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    weights = dummy_weights(LLAMA, jnp.bfloat16, 1, 1, here)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), weights) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    qkv = np.float32(weights["layers"]["qkv"][...])
    assert np.abs(qkv[0] - qkv[1]).max() > 0  # no layer is like another
    assert qkv.std() == pytest.approx(LLAMA.hidden_size**-0.5, rel=0.1)


def test_biases_belong_to_qwen2():
    with pytest.raises(ValueError, match="attention_bias is True; Llama"):
        abstract_decoder(dataclasses.replace(LLAMA, attention_bias=True), jnp.float32)
    with pytest.raises(ValueError, match="attention_bias is False; Qwen2"):
        abstract_decoder(dataclasses.replace(QWEN, attention_bias=False), jnp.float32)
