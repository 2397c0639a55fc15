"""``generation_config.json``: how a model's makers want it sampled, and every id that ends its answer."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from flexjax.models.config import ModelConfig, token_ids

SAMPLING_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Key of the file -> field of `flexjax.request.SamplingParams`; the same ones as vLLM takes."""


@dataclass(frozen=True)
class GenerationDefaults:
    """Attributes:
    sampling: fields of `SamplingParams` to use where a request says nothing.
    stop_token_ids: ids that end an answer, unless a request ignores the end of sequence.
    """

    sampling: dict[str, float | int] = field(default_factory=dict)
    stop_token_ids: frozenset[int] = frozenset()


def read_generation_defaults(model: str | Path, config: ModelConfig, eos_token_id: int | None) -> GenerationDefaults:
    """Defaults of a model.

    Args:
        model: its directory; a ``.gguf`` file, or a directory without ``generation_config.json``, has no sampling
            defaults.
        eos_token_id: the tokenizer's; the ids of configuration, tokenizer and file are all stops.

    Raises:
        ValueError: the file is not valid JSON.
    """
    file = Path(model) / "generation_config.json"
    values = {}
    if file.is_file():
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
    sampling = {name: values[key] for key, name in SAMPLING_KEYS.items() if values.get(key) is not None}
    stops = {*config.eos_token_ids, *token_ids(values.get("eos_token_id")), *token_ids(eos_token_id)}
    return GenerationDefaults(sampling, frozenset(stops))
