"""Hugging Face model directories: safetensors in, safetensors out. It knows names of files and arrays, and no jax."""

from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from flexjax.models.config import ModelConfig
from flexjax.weights.checking import check_names
from flexjax.weights.safetensors_files import SafetensorsFiles, find_files
from flexjax.weights.stacking import Part, StackedWeights, parts_of
from flexjax.weights.whole_files import write_json, write_tensors

OUTSIDE = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}

INSIDE = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}

SHARD_BYTES = 4 * 1024**3
"""Largest file that is written before another is begun."""


def huggingface_name(part: Part) -> str:
    """The name of an array in Hugging Face files."""
    if part.layer is None:
        return OUTSIDE[part.name]
    module, _, kind = part.name.partition(".")
    return f"model.layers.{part.layer}.{INSIDE[module]}.{kind or 'weight'}"


def load_directory(path: str | Path, config: ModelConfig, dtype: DTypeLike, tp: int = 1) -> dict[str, np.ndarray]:
    """Weights of a model directory (``model.safetensors``, or several files with an index).

    Memory stays at the tree plus one matrix.

    Args:
        dtype: of the tree, float32 or bfloat16; files of another float dtype are converted.
        tp: number of shards the fused columns are grouped for.

    Returns:
        The canonical tree (`flexjax.weights.stacking`).

    Raises:
        FileNotFoundError: there are no safetensors files.
        ValueError: a file is truncated; or arrays are missing, unexpected or of another shape than the configuration
            says, all of them in one message.
    """
    directory = Path(path)
    files = SafetensorsFiles(find_files(directory))
    parts = {huggingface_name(part): part for part in parts_of(config)}
    expected = {name: part.shape for name, part in parts.items()}
    check_names(f"the weights in {directory} do not fit its config.json", expected, found_shapes(files, config))
    weights = StackedWeights.allocate(config, dtype, tp)
    for name, part in parts.items():
        weights.put(part, files.read(name))
    return weights.tree


def found_shapes(files: SafetensorsFiles, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes in the files, without what is derived: rotary tables of old checkpoints, a stored copy of a tied head."""
    derived = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {
        name: shape
        for name, shape in files.shapes.items()
        if name not in derived and not name.endswith(".rotary_emb.inv_freq")
    }


def save_directory(path: str | Path, config: ModelConfig, tree: dict[str, np.ndarray], tp: int = 1) -> None:
    """Writes ``config.json`` and safetensors that transformers reads, in the dtype of the tree.

    Args:
        tree: the canonical tree, its fused columns grouped for ``tp`` shards.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    weights = StackedWeights(config, tree, tp)
    shards = shard_parts(parts_of(config), tree["embed"].dtype.itemsize)
    names = [shard_name(number, len(shards)) for number in range(len(shards))]
    for file, parts in zip(names, shards, strict=True):
        write_tensors(directory / file, {huggingface_name(part): weights.take(part) for part in parts})
    if len(shards) > 1:
        homes = {huggingface_name(part): file for file, parts in zip(names, shards, strict=True) for part in parts}
        total = sum(array.nbytes for array in tree.values())
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        write_json(directory / "model.safetensors.index.json", index)
    write_json(directory / "config.json", config.to_dict() | {"dtype": str(tree["embed"].dtype)})


def shard_parts(parts: list[Part], itemsize: int) -> list[list[Part]]:
    """Parts in order, cut where a file would grow beyond `SHARD_BYTES`."""
    shards, size = [[]], 0
    for part in parts:
        nbytes = int(np.prod(part.shape)) * itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += nbytes
    return shards


def shard_name(number: int, shards: int) -> str:
    return "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
