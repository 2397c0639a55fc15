"""GGUF files, written here the way llama.cpp's converter writes them, against the safetensors they were made from."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from flexjax.models.config import Llama3RopeScaling, ModelConfig
from flexjax.models.layers import rotary_frequencies
from flexjax.tokenizer import Tokenizer
from flexjax.weights.gguf import load_gguf, open_gguf
from flexjax.weights.gguf_config import scaling_behind
from flexjax.weights.huggingface import load_directory
from flexjax.weights.source import open_model

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOKENS = ["<|end|>", "<|begin|>", *(chr(33 + n) for n in range(45)), "!!"]


def gguf_name(name: str) -> str:
    for theirs, short in NAMES.items():
        name = name.replace(theirs, short)
    return name.replace("model.layers.", "blk.")


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's permutation of q and k rows: halves of a head become neighbours."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * 46)
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)


def write_gguf(path: Path, model: str, kind: Kind = Kind.F32, change=lambda name, array: array, more=None) -> Path:
    """A golden model as a GGUF file; matrices whose rows can be quantised become ``kind``."""
    config = ModelConfig.from_directory(GOLDENS / model)
    writer = gguf.GGUFWriter(path, model)
    write_metadata(writer, config)
    if more:
        more(writer)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for name, array in load_file(GOLDENS / model / "model.safetensors").items():
        module = name.split(".")[-2]
        if model == "llama" and module in heads:
            array = interleaved(array, heads[module])
        array = change(gguf_name(name), array)
        its_kind = kind if array is not None and array.ndim == 2 and array.shape[1] % 32 == 0 else Kind.F32
        if array is not None:
            writer.add_tensor(gguf_name(name), quantize(array, its_kind), raw_dtype=its_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def expected(model: str) -> dict[str, np.ndarray]:
    return load_directory(GOLDENS / model, ModelConfig.from_directory(GOLDENS / model), np.float32)


@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_unquantised_file_has_the_tree_of_the_safetensors(model, tmp_path):
    config, tree, _ = load_gguf(write_gguf(tmp_path / "model.gguf", model), np.float32)
    for name, array in expected(model).items():
        np.testing.assert_array_equal(tree[name], array)
    theirs = ModelConfig.from_directory(GOLDENS / model)
    for field in ("hidden_size", "num_kv_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        assert getattr(config, field) == getattr(theirs, field), field
    assert (config.attention_bias, config.bos_token_id, config.eos_token_ids) == (model == "qwen2", 1, (0,))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_1, Kind.Q8_0])
def test_quantised_rows_are_dequantised_before_they_are_put_in_order(kind, tmp_path):
    """Rows are permuted whole, so quantising before or after the permutation is the same."""
    _, tree, _ = load_gguf(write_gguf(tmp_path / "model.gguf", "llama", kind), np.float32, tp=2)
    file = load_file(GOLDENS / "llama" / "model.safetensors")
    rounded = lambda name: dequantize(quantize(file[name], kind), kind)
    q, k, v = (rounded(f"model.layers.1.self_attn.{name}_proj.weight") for name in "qkv")
    np.testing.assert_array_equal(tree["layers.qkv"][1], np.concatenate([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]]))
    np.testing.assert_array_equal(tree["embed"], rounded("model.embed_tokens.weight"))
    assert kind is Kind.F32 or not np.array_equal(tree["embed"], file["model.embed_tokens.weight"])


def test_scaled_rotary_frequencies_are_recognised():
    """The converter stores plain / scaled frequencies, as float32."""
    for factor in (8.0, 32.0):
        scaling = Llama3RopeScaling(factor, 1.0, 4.0, 8192)
        sizes = dict(vocab_size=9, hidden_size=128, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        rope = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | vars(scaling)}
        plain = rotary_frequencies(ModelConfig.from_dict(sizes | {"model_type": "llama", "rope_theta": 5e5}))
        scaled = rotary_frequencies(ModelConfig.from_dict(sizes | {"model_type": "llama"} | rope))
        divisors = (np.asarray(plain) / np.asarray(scaled)).astype(np.float32)
        assert len(set(divisors.round(3))) > 3 and scaling_behind(divisors, 5e5, 64) == scaling
    with pytest.raises(ValueError, match="is no known rotary scaling"):
        scaling_behind(divisors * 1.1, 5e5, 64)


def test_source_gives_weights_tokenizer_and_stops(tmp_path):
    source = open_model(write_gguf(tmp_path / "model.gguf", "qwen2"))
    tokenizer = source.load_tokenizer()
    assert isinstance(tokenizer, Tokenizer) and tokenizer.vocabulary_size == 48
    assert tokenizer.encode("<|begin|>!!!#") == [1, 47, 2, 4]
    assert source.read_defaults(tokenizer).stop_token_ids == {0}
    assert source.load_weights(np.float32)["embed"].shape == (48, 24)


@pytest.mark.parametrize("length", [0, 3, 100, 1500, -1000])
def test_truncated_file_is_named(length, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.gguf \(\d+ bytes\) is truncated or is no GGUF file"):
        open_gguf(path)


def test_other_files(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model at all, but long enough to be one" * 10)
    with pytest.raises(ValueError, match="is truncated or is no GGUF file"):
        open_gguf(tmp_path / "model.gguf")
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        open_gguf(tmp_path / "absent.gguf")


def test_all_differences_in_one_message(tmp_path):
    def change(name, array):
        if name == "blk.0.attn_q.weight":
            return None
        return array[:, :-8] if name == "blk.1.ffn_down.weight" else array

    more = lambda writer: writer.add_tensor("blk.0.extra.weight", np.zeros((2, 3), np.float32))
    path = write_gguf(tmp_path / "model.gguf", "llama", change=change, more=more)
    with pytest.raises(ValueError, match="3 faults") as caught:
        load_gguf(path, np.float32)
    for words in (
        "missing blk.0.attn_q.weight [32, 32]",
        "unexpected blk.0.extra.weight [2, 3]",
        "blk.1.ffn_down.weight has shape [32, 32], expected [32, 40]",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.expert_count", 8, "llama.expert_count is 8"),
        ("llama.rope.scaling.type", "yarn", "llama.rope.scaling.type is 'yarn'"),
        ("llama.attention.value_length", 4, "llama.attention.value_length is 4"),
        ("llama.attention.key_length", 16, "llama.rope.dimension_count is 8; only the head size (16)"),
    ],
)
def test_unsupported_metadata_is_refused_by_name(key, value, words, tmp_path):
    add = lambda writer: writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    with pytest.raises(ValueError, match=".*") as caught:
        open_gguf(write_gguf(tmp_path / "model.gguf", "llama", more=add))
    assert words in str(caught.value)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="general.architecture is 'mamba'"):
        open_gguf(tmp_path / "other.gguf")
