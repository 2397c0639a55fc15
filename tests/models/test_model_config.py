"""ModelConfig: what a Hugging Face configuration says is taken, what it asks beyond that is refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flexjax.models.config import Llama3RopeScaling, ModelConfig

SMALL = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GOLDENS = Path(__file__).parents[1] / "goldens"


def test_absent_keys_have_the_defaults_of_transformers():
    config = ModelConfig.from_dict(SMALL)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps, config.rope_theta) == (4, 8, 1e-6, 10000.0)
    assert config.rope_scaling is None and not config.tie_word_embeddings and not config.attention_bias
    assert config.max_position_embeddings == 2048
    assert ModelConfig.from_dict(SMALL | {"model_type": "qwen2"}).attention_bias


def test_configuration_that_transformers_5_wrote():
    config = ModelConfig.from_directory(GOLDENS / "llama")
    assert config.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 64)
    assert (config.num_kv_heads, config.head_dim, config.q_width, config.kv_width) == (2, 8, 32, 16)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    qwen2 = ModelConfig.from_directory(GOLDENS / "qwen2")
    assert qwen2.tie_word_embeddings and qwen2.attention_bias and qwen2.rope_scaling is None


def test_both_spellings_of_rotary_scaling_agree():
    old = SMALL | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | LLAMA3}
    new = SMALL | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
    assert ModelConfig.from_dict(new).rope_theta == 5e5


@pytest.mark.parametrize("extra", [{}, {"rope_scaling": {"rope_type": "llama3"} | LLAMA3, "eos_token_id": [2, 7]}])
def test_written_configuration_reads_back_equal_and_hashes(extra):
    config = ModelConfig.from_dict(SMALL | {"bos_token_id": 1} | extra)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma3"}, "model_type is 'gemma3'; supported are llama, qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096}, "sliding_window is 4096"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4; it must be a multiple"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"vocab_size": None}, "lacks vocab_size"),
    ],
)
def test_refused_by_name_and_value(change, words):
    with pytest.raises(ValueError, match=".*") as caught:
        ModelConfig.from_dict(SMALL | change)
    assert words in str(caught.value)


def test_an_unused_sliding_window_is_no_obstacle():
    config = SMALL | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}
    assert ModelConfig.from_dict(config).model_type == "qwen2"


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_directory(tmp_path)


def test_reading_a_configuration_loads_no_jax():
    code = "import sys, flexjax.models.config; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=GOLDENS.parents[1])
    assert done.stdout.strip() == b"False"
