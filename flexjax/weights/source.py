"""ModelSource: one model on disk, whatever its format: configuration, tokenizer, defaults, and weights on demand."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from flexjax.models.config import ModelConfig
from flexjax.tokenizer import Tokenizer
from flexjax.weights.generation import GenerationDefaults, read_generation_defaults
from flexjax.weights.gguf import GgufModel, open_gguf
from flexjax.weights.hub import resolve_model
from flexjax.weights.huggingface import load_directory


@dataclass(frozen=True)
class ModelSource:
    """Attributes:
    path: directory or ``.gguf`` file.
    config: the model.
    gguf: the opened file, None for a directory.
    """

    path: Path
    config: ModelConfig
    gguf: GgufModel | None = None

    def load_weights(self, dtype: DTypeLike, tp: int = 1) -> dict[str, np.ndarray]:
        """The canonical tree (`flexjax.weights.stacking`).

        Raises:
            FileNotFoundError, ValueError: as `load_directory` and `GgufModel.load`.
        """
        return self.gguf.load(dtype, tp) if self.gguf else load_directory(self.path, self.config, dtype, tp)

    @property
    def has_tokenizer(self) -> bool:
        return self.gguf is not None or (self.path / "tokenizer.json").is_file()

    def load_tokenizer(self) -> Tokenizer:
        """Raises FileNotFoundError or ValueError as `Tokenizer.from_directory` and `Tokenizer.from_gguf`."""
        return Tokenizer.from_gguf(self.gguf.metadata) if self.gguf else Tokenizer.from_directory(self.path)

    def read_defaults(self, tokenizer: Tokenizer | None) -> GenerationDefaults:
        """Sampling defaults and stop ids; without a tokenizer, those that the model's files give."""
        eos_token_id = None if tokenizer is None else tokenizer.eos_token_id
        return read_generation_defaults(self.path, self.config, eos_token_id)


def open_model(name_or_path: str | Path, revision: str | None = None) -> ModelSource:
    """A directory, a ``.gguf`` file or a hub name; reads the configuration and no weights.

    Raises:
        FileNotFoundError: there is no such model, or it has no ``config.json``.
        ValueError: the model is not supported, or the file is truncated.
    """
    path = resolve_model(name_or_path, revision)
    if path.is_dir():
        return ModelSource(path, ModelConfig.from_directory(path))
    gguf = open_gguf(path)
    return ModelSource(path, gguf.config, gguf)
