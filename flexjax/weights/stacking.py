"""The canonical tree of weights: matrices of all layers stacked and fused, filled and read one matrix at a time.

It knows the order of rows under tensor parallelism and no file format. With ``tp`` shards the rows of the fused
matrices are grouped by shard, so that cutting that axis into ``tp`` equal parts gives every shard its heads:

    qkv      [ q_0 | k_0 | v_0 | q_1 | k_1 | v_1 | ... ]
    gate_up  [ gate_0 | up_0 | gate_1 | up_1 | ... ]
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from flexjax.models.config import ModelConfig

FUSED = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
}
"""Matrix of a layer -> the matrix of the tree it is part of."""


@dataclass(frozen=True)
class Part:
    """One array of a model as files store it.

    Attributes:
        name: a module of `FUSED`, with ``.bias`` for its bias, or "input_norm", "post_norm", "embed", "norm", "head".
        layer: None for what stands outside the layers.
        shape: [out, in] of a matrix, [vocab, d] of embedding and head, [width] of a vector.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]


def parts_of(config: ModelConfig) -> list[Part]:
    """Every array that the files of such a model hold."""
    d, ff, q, kv = config.hidden_size, config.intermediate_size, config.q_width, config.kv_width
    layer = {"input_norm": (d,), "post_norm": (d,), "q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d)}
    layer |= {"o_proj": (d, q), "gate_proj": (ff, d), "up_proj": (ff, d), "down_proj": (d, ff)}
    if config.attention_bias:
        layer |= {"q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,)}
    outside = {"embed": (config.vocab_size, d), "norm": (d,)}
    if not config.tie_word_embeddings:
        outside["head"] = (config.vocab_size, d)
    parts = [Part(name, None, shape) for name, shape in outside.items()]
    return parts + [Part(name, n, shape) for n in range(config.num_layers) for name, shape in layer.items()]


def tree_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the canonical tree; matrices are [layers, out, in]."""
    layers, d, ff = config.num_layers, config.hidden_size, config.intermediate_size
    qkv = config.q_width + 2 * config.kv_width
    shapes = {"embed": (config.vocab_size, d), "norm": (d,)}
    shapes |= {"layers.input_norm": (layers, d), "layers.post_norm": (layers, d), "layers.qkv": (layers, qkv, d)}
    if config.attention_bias:
        shapes["layers.qkv_bias"] = (layers, qkv)
    shapes |= {"layers.o": (layers, d, config.q_width), "layers.down": (layers, d, ff)}
    shapes["layers.gate_up"] = (layers, 2 * ff, d)
    if not config.tie_word_embeddings:
        shapes["head"] = (config.vocab_size, d)
    return shapes


class StackedWeights:
    """A tree of weights under one order of rows.

    Args:
        config: the model.
        tree: canonical name -> array, as `tree_shapes` names and sizes them.
        tp: number of shards the fused rows are grouped for.

    Raises:
        ValueError: the model cannot be cut into ``tp`` shards.
    """

    def __init__(self, config: ModelConfig, tree: dict[str, np.ndarray], tp: int = 1):
        check_shards(config, tp)
        self.config, self.tree, self.tp = config, tree, tp

    @classmethod
    def allocate(cls, config: ModelConfig, dtype: DTypeLike, tp: int = 1) -> "StackedWeights":
        """Arrays to be filled by `put`; their content is undefined until then."""
        check_shards(config, tp)
        return cls(config, {name: np.empty(shape, dtype) for name, shape in tree_shapes(config).items()}, tp)

    def put(self, part: Part, values: np.ndarray) -> None:
        """Writes one array, converted to the tree's dtype."""
        target = self._target(part)
        for taken, given in self._rows(part.name):
            copy_converted(target[given], values[taken])

    def take(self, part: Part) -> np.ndarray:
        """One array as files store it, a copy in the tree's dtype."""
        target = self._target(part)
        values = np.empty(part.shape, target.dtype)
        for taken, given in self._rows(part.name):
            values[taken] = target[given]
        return values

    def _target(self, part: Part) -> np.ndarray:
        """The view of the tree that holds a part (for a fused matrix, together with others)."""
        if part.layer is None:
            return self.tree[part.name]
        module, _, bias = part.name.partition(".")
        return self.tree[f"layers.{FUSED.get(module, module)}{'_bias' if bias else ''}"][part.layer]

    def _rows(self, name: str) -> list[tuple[slice, slice]]:
        """(rows of the part, rows of the target) per shard."""
        module = name.partition(".")[0]
        widths = {other: width // self.tp for other, width in self._fused_widths(module).items()}
        if not widths:
            return [(slice(None), slice(None))]
        modules, width = list(widths), widths[module]
        before, together = sum(widths[other] for other in modules[: modules.index(module)]), sum(widths.values())
        return [
            (slice(shard * width, (shard + 1) * width), slice(first, first + width))
            for shard in range(self.tp)
            for first in [shard * together + before]
        ]

    def _fused_widths(self, module: str) -> dict[str, int]:
        """Output widths of the modules that share a matrix with this one, in their order; empty for none."""
        q, kv, ff = self.config.q_width, self.config.kv_width, self.config.intermediate_size
        fused = {"qkv": {"q_proj": q, "k_proj": kv, "v_proj": kv}, "gate_up": {"gate_proj": ff, "up_proj": ff}}
        return fused.get(FUSED.get(module), {})


def check_shards(config: ModelConfig, tp: int) -> None:
    """Raises ValueError naming every size that ``tp`` does not divide."""
    sizes = {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
    }
    uneven = [f"{name} is {size}" for name, size in sizes.items() if tp < 1 or size % tp]
    if uneven:
        raise ValueError(f"tp is {tp}, which must divide the model evenly, but {', '.join(uneven)}")


def copy_converted(target: np.ndarray, values: np.ndarray) -> None:
    """target = values, converted to target's dtype."""
    if target.dtype == values.dtype and target.dtype.itemsize == 2:
        target, values = target.view(np.uint16), values.view(np.uint16)  # bfloat16 copies five times slower than bits
    target[...] = values
