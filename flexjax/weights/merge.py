"""merge: an adapter added into the weights it adapts. It reads and writes no files."""

import numpy as np

from flexjax.models.config import ModelConfig
from flexjax.weights.adapter import LoraAdapter
from flexjax.weights.stacking import FUSED, StackedWeights, parts_of


def merge(tree: dict[str, np.ndarray], adapter: LoraAdapter, config: ModelConfig, tp: int = 1) -> dict[str, np.ndarray]:
    """A new tree with W + scale · A B in place of every adapted kernel, summed in float32 and rounded once.

    Args:
        tree: the canonical tree, its fused columns grouped for ``tp`` shards; it is not changed, and kernels that are
            not adapted are shared with the result.
    """
    touched = {f"layers.{FUSED[module]}" for module in adapter.weights}
    merged = StackedWeights(config, {name: a.copy() if name in touched else a for name, a in tree.items()}, tp)
    for part in parts_of(config):
        if part.name in adapter.weights and adapter.terms[part.name][part.layer] is not None:
            kernel = merged.take(part).astype(np.float32)
            merged.put(part, kernel + adapter.delta(part.name, part.layer).T)
    return merged.tree
