"""The canonical tree: fused rows in the order shards want them, and back."""

import ml_dtypes
import numpy as np
import pytest

from flexjax.models.config import ModelConfig
from flexjax.weights.stacking import StackedWeights, parts_of, tree_shapes

CONFIG = ModelConfig.from_dict({
    "model_type": "qwen2",
    "vocab_size": 10,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 2,
})  # fmt: skip


def random_parts(dtype=np.float32) -> dict:
    random = np.random.default_rng(0)
    return {part: random.normal(size=part.shape).astype(dtype) for part in parts_of(CONFIG)}


def filled(parts: dict, dtype, tp: int) -> StackedWeights:
    weights = StackedWeights.allocate(CONFIG, dtype, tp)
    for part, values in parts.items():
        weights.put(part, values)
    return weights


def by_name(parts: dict, name: str, layer: int) -> np.ndarray:
    return next(values for part, values in parts.items() if (part.name, part.layer) == (name, layer))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_shard_gets_its_own_heads(tp):
    """Equal cuts of the fused matrices are the fused matrices of a model with the shard's heads."""
    parts = random_parts()
    tree = filled(parts, np.float32, tp).tree
    assert {name: array.shape for name, array in tree.items()} == tree_shapes(CONFIG)
    for shard in range(tp):
        rows = lambda name, shard=shard: np.split(by_name(parts, name, 2), tp)[shard]
        qkv = np.split(tree["layers.qkv"][2], tp)[shard]
        np.testing.assert_array_equal(qkv, np.concatenate([rows(f"{n}_proj") for n in "qkv"]))
        bias = np.split(tree["layers.qkv_bias"][2], tp)[shard]
        np.testing.assert_array_equal(bias, np.concatenate([rows(f"{n}_proj.bias") for n in "qkv"]))
        gate_up = np.split(tree["layers.gate_up"][2], tp)[shard]
        np.testing.assert_array_equal(gate_up, np.concatenate([rows("gate_proj"), rows("up_proj")]))
    np.testing.assert_array_equal(tree["layers.down"][1], by_name(parts, "down_proj", 1))
    np.testing.assert_array_equal(tree["embed"], by_name(parts, "embed", None))
    np.testing.assert_array_equal(tree["head"], by_name(parts, "head", None))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_was_put_is_taken_back(tp, dtype):
    parts = random_parts(dtype)
    weights = filled(parts, dtype, tp)
    for part, values in parts.items():
        taken = weights.take(part)
        assert taken.dtype == dtype
        np.testing.assert_array_equal(taken, values)


def test_conversion_rounds_to_nearest():
    weights = filled(random_parts(), ml_dtypes.bfloat16, 1)
    expected = by_name(random_parts(), "o_proj", 0).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(weights.tree["layers.o"][0], expected)


def test_heads_that_cannot_be_dealt_out_are_named():
    with pytest.raises(ValueError, match=r"tp is 8.*num_key_value_heads is 4, intermediate_size is 12"):
        StackedWeights.allocate(CONFIG, np.float32, 8)
