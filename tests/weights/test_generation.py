"""generation_config.json: sampling defaults by SamplingParams' names, and every id that ends an answer."""

import json

import pytest

from flexjax.models.config import ModelConfig
from flexjax.request import SamplingParams
from flexjax.weights.generation import read_generation_defaults

SIZES = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
CONFIG = ModelConfig.from_dict(SIZES | {"model_type": "llama", "eos_token_id": 3})


def test_defaults_and_stops_of_every_source(tmp_path):
    values = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "eos_token_id": [5, 6], "min_p": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    defaults = read_generation_defaults(tmp_path, CONFIG, eos_token_id=4)
    assert defaults.sampling == {"temperature": 0.6, "top_p": 0.9, "top_k": 40}
    assert defaults.stop_token_ids == {3, 4, 5, 6}
    assert SamplingParams(**defaults.sampling).top_k == 40


def test_a_model_without_the_file(tmp_path):
    defaults = read_generation_defaults(tmp_path, CONFIG, eos_token_id=None)
    assert defaults.sampling == {} and defaults.stop_token_ids == {3}


def test_broken_file_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        read_generation_defaults(tmp_path, CONFIG, None)
