"""From a model configuration to a decoder: its definition, the shapes of its weights, and the weights on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flexjax.models.config import ModelConfig
from flexjax.models.llama import Llama
from flexjax.models.qwen2 import Qwen2

ARCHITECTURES = {"llama": Llama, "qwen2": Qwen2}


def abstract_decoder(config: ModelConfig, dtype, tp: int = 1) -> tuple[nnx.GraphDef, nnx.State]:
    """The definition of the decoder and the shapes of its weights; allocates nothing."""
    create = ARCHITECTURES[config.model_type]
    return nnx.split(nnx.eval_shape(lambda: create(config, dtype, tp, nnx.Rngs(0))))


def place_weights(shapes: nnx.State, tree: dict[str, np.ndarray], place: Callable) -> nnx.State:
    """Weights as loaders give them ("layers.qkv" -> array) in the decoder's state.

    Args:
        place: (name, array) -> array on the device, in its dtype and sharding.

    Raises:
        ValueError: names or shapes do not match the decoder; all of them are listed.
    """
    expected = {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    problems = [f"missing {name}" for name in expected.keys() - tree.keys()]
    problems += [f"unexpected {name}" for name in tree.keys() - expected.keys()]
    for name in expected.keys() & tree.keys():
        if tree[name].shape != expected[name].shape:
            problems.append(f"{name} has shape {tree[name].shape}, expected {expected[name].shape}")
    if problems:
        raise ValueError("weights do not fit the model: " + "; ".join(sorted(problems)))
    return jax.tree_util.tree_map_with_path(lambda path, _: place(dotted(path), tree[dotted(path)]), shapes)


def dummy_weights(
    config: ModelConfig, dtype, tp: int, seed: int, shardings: nnx.State, finish: Callable = lambda weights: weights
) -> nnx.State:
    """Random weights made where they live, for benchmarks: nothing passes through the host. ``finish`` makes of them
    what the device holds."""
    create = ARCHITECTURES[config.model_type]
    make = lambda: finish(nnx.state(create(config, dtype, tp, nnx.Rngs(seed))))
    return jax.jit(make, out_shardings=shardings)()


def dotted(path) -> str:
    """"layers.qkv" for the state path of that weight."""
    return ".".join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))


def dtype_of(name: str):
    """"float32" or "bfloat16" as a dtype."""
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]
