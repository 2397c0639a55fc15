"""GGUF files: configuration, weights and tokenizer metadata of a Llama or Qwen2 model, dequantised.

Llama files hold the rows of q and k permuted for interleaved rotary pairs (2i, 2i+1); here pairs are (i, i + D/2) as
in Hugging Face files, so the permutation is undone. Qwen2 files are not permuted.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import DTypeLike

from flexjax.models.config import ModelConfig
from flexjax.weights.checking import check_names
from flexjax.weights.gguf_config import config_from_metadata
from flexjax.weights.stacking import Part, StackedWeights, parts_of

NAMES = {
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "input_norm": "attn_norm",
    "post_norm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}

ROPE_FREQUENCIES = "rope_freqs.weight"
"""Divisors of the rotary frequencies, [D / 2]; how a GGUF file says that rotary embedding is scaled."""


@dataclass(frozen=True)
class GgufModel:
    """An opened GGUF file: everything but the weights is read.

    Attributes:
        config: the model.
        metadata: the ``tokenizer.*`` keys, as `flexjax.tokenizer.Tokenizer.from_gguf` wants them.
    """

    path: Path
    config: ModelConfig
    metadata: dict
    tensors: dict[str, ReaderTensor]

    def load(self, dtype: DTypeLike, tp: int = 1) -> dict[str, np.ndarray]:
        """The canonical tree (`flexjax.weights.stacking`), dequantised to ``dtype``.

        Raises:
            ValueError: tensors are missing, unexpected or misshaped (all in one message), or of a type that cannot be
                dequantised.
        """
        parts = {gguf_name(part): part for part in parts_of(self.config)}
        found = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self.tensors.items()}
        found.pop(ROPE_FREQUENCIES, None)
        expected = {name: part.shape for name, part in parts.items()}
        check_names(f"the tensors in {self.path} do not fit its metadata", expected, found)
        weights = StackedWeights.allocate(self.config, dtype, tp)
        for name, part in parts.items():
            weights.put(part, self._rotate_half(part, values_of(self.tensors[name], self.path)))
        return weights.tree

    def _rotate_half(self, part: Part, values: np.ndarray) -> np.ndarray:
        """Rows of q and k of a Llama file, [heads, D/2, 2] interleaved -> [heads, 2, D/2]."""
        if self.config.model_type != "llama" or part.name not in ("q_proj", "k_proj"):
            return values
        pairs = values.reshape(-1, self.config.head_dim // 2, 2, values.shape[-1])
        return pairs.swapaxes(1, 2).reshape(values.shape)


def open_gguf(path: str | Path) -> GgufModel:
    """Reads the header of a GGUF file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, is no GGUF file, or holds a model that is not supported.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file {path}")
    try:
        reader = GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, OSError, struct.error) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) is truncated or is no GGUF file: {error}") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    divisors = tensors.get(ROPE_FREQUENCIES)
    try:
        config = config_from_metadata(
            values, "output.weight" in tensors, None if divisors is None else values_of(divisors, path)
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    metadata = {name: value for name, value in values.items() if name.startswith("tokenizer.")}
    return GgufModel(path, config, metadata, tensors)


def load_gguf(path: str | Path, dtype: DTypeLike, tp: int = 1) -> tuple[ModelConfig, dict[str, np.ndarray], dict]:
    """(configuration, canonical tree, tokenizer metadata) of a GGUF file; see `open_gguf` and `GgufModel.load`."""
    model = open_gguf(path)
    return model.config, model.load(dtype, tp), model.metadata


def gguf_name(part: Part) -> str:
    """The name of an array in GGUF files."""
    module, _, kind = part.name.partition(".")
    prefix = "" if part.layer is None else f"blk.{part.layer}."
    return f"{prefix}{NAMES[module]}.{kind or 'weight'}"


def values_of(tensor: ReaderTensor, path: Path) -> np.ndarray:
    """A tensor as float32, [out, in]."""
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise ValueError(f"tensor {tensor.name} in {path} is {kind}, which cannot be dequantised") from error
